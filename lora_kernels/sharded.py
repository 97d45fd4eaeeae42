"""Layers whose Parameters are DTensors: tensor parallelism (``parallelize_module``), and FSDP2 between its forwards.

The operators only ever see local tensors. :class:`Layout` says where each tensor of ``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` lies
on the device mesh, and where its gradient, from how W is cut; DTensor then moves what lies elsewhere. One row holds for
each dimension of the mesh, which is all there is to meshes of several dimensions:

================== =========== =========== =========== =========== ===========
W (N, K)           x           A (R, K)    B (N, R)    b, gains    y
================== =========== =========== =========== =========== ===========
cut on N           whole       whole       as W        as W        cut on N
its gradient       partial     partial     cut         cut         cut
cut on K           cut on K    cut on K    whole       whole       partial
its gradient       cut         cut         partial     partial     whole
whole, x in rows   rows        whole       whole       whole       rows
its gradient       rows        partial     partial     partial     rows
================== =========== =========== =========== =========== ===========

A partial result is a sum over the processes that is still to be taken. Torch's ``ColwiseParallel`` cuts every Parameter
on its first dimension, so A is gathered from ranks of R; ``RowwiseParallel`` leaves A and B whole, so A is sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import dora
from .dispatch import backend
from .errors import InvalidTypeError, LoRAStateError
from .functional import apply, prepare
from .ops import operators
from .reference import drop

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = [
    "check_own",
    "fill",
    "forward",
    "is_finite",
    "is_managed",
    "is_sharded",
    "kept_aside",
    "merge_in_place",
    "merged_weight",
    "once",
    "plain_class",
    "row_norms",
    "settle",
    "settle_for",
    "unmerge_in_place",
    "write",
]

_STEP = 0x9E3779B97F4A7C15  # odd, so no two parts of x ever have one seed; far from small numbers, as seeds often are


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor. By name: torch.distributed.tensor takes a second to import."""
    return type(tensor).__name__ == "DTensor"


def is_managed(layer: nn.Module) -> bool:
    """Whether ``fully_shard`` manages the Parameters of ``layer``: it exchanges them around each forward."""
    return getattr(layer, "_is_fsdp_managed_module", False)


def settle(model: nn.Module) -> None:
    """Has FSDP2 put the sharded Parameters back wherever it holds gathered ones: those may be in a narrower dtype."""
    for module in model.modules():
        if _is_fsdp(module):
            fsdp: Any = module
            fsdp.reshard()


def plain_class(module: nn.Module) -> type:
    """``module``'s class before ``fully_shard`` put one of its own in front of it."""
    kind = type(module)
    return kind.__bases__[-1] if _is_fsdp(module) and kind.__name__.startswith("FSDP") else kind


def check_own(layer: LoRALayer, function: str) -> None:
    """Raises where FSDP2 manages the weight: it may hold a gathered copy now, and a change of that would be lost."""
    if is_managed(layer):
        raise LoRAStateError(
            f"{function} was called on a layer that fully_shard (FSDP2) manages. Call {function}_lora(model) with the "
            "module that was given to fully_shard, which puts the shards in their places first."
        )


def settle_for(model: nn.Module, layers: Iterable[tuple[str, LoRALayer]], function: str) -> None:
    """:func:`settle`, or an error where FSDP2 manages one of the layers from outside of ``model``."""
    within = {part for module in model.modules() if _is_fsdp(module) for part in module.modules()}
    outside = [name for name, layer in layers if is_managed(layer) and layer not in within]
    if outside:
        raise LoRAStateError(
            f"{function} was called on a part of a model, and fully_shard (FSDP2) manages its layer {outside[0]!r} "
            f"from outside. Call {function} with the module that was given to fully_shard."
        )
    settle(model)


def _is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was given ``module``; by what it can do, for the import takes long."""
    return hasattr(module, "reshard") and hasattr(module, "set_reshard_after_forward")


@dataclass(frozen=True)
class Layout:
    """Placements, one for each dimension of the mesh, of tensors and (``d...``) of their gradients; see the module.

    Attributes:
        vector, dvector: of gains (N,), which are multiplied with what the processes have of y.
        sums: the dimensions of the mesh over which y is still to be summed.
        shared: the dimensions along which all processes have the same x, and so must drop the same of it.
    """

    mesh: Any
    weight: tuple[Any, ...]
    dweight: tuple[Any, ...]
    x: tuple[Any, ...]
    dx: tuple[Any, ...]
    a: tuple[Any, ...]
    da: tuple[Any, ...]
    b: tuple[Any, ...]
    db: tuple[Any, ...]
    vector: tuple[Any, ...]
    dvector: tuple[Any, ...]
    y: tuple[Any, ...]
    sums: tuple[int, ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, weight: Any, x: Any = None) -> Layout:
        """For W (N, K), and x (..., K) where there is one."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        last = 1 if x is None else x.dim() - 1
        given = [Replicate()] * len(weight.placements) if x is None else x.placements
        rows: list[tuple[Any, ...]] = []
        sums, shared = [], []
        for i, (own, x_own) in enumerate(zip(weight.placements, given, strict=True)):
            cut = getattr(own, "dim", None)
            if cut == 0:
                rows.append((own, own, *(Replicate(), Partial()) * 2, *(own, own) * 2, Shard(last)))
                shared.append(i)
            elif cut == 1:
                split = Shard(last), Shard(last), Shard(1), Shard(1)
                rows.append((own, own, *split, *(Replicate(), Partial()) * 2, Partial()))
                sums.append(i)
            else:
                of_x = x_own if getattr(x_own, "dim", last) < last else Replicate()
                to_sum = Replicate() if of_x.is_replicate() else Partial()
                shared += [i] if of_x.is_replicate() else []
                rows.append((Replicate(), to_sum, of_x, of_x, *(Replicate(), to_sum) * 3, of_x))
        columns: list[Any] = [*zip(*rows, strict=True), tuple(sums), tuple(shared)]
        return cls(weight.device_mesh, *columns)

    def share(self, state: Tensor) -> Tensor:
        """Dropout's state such that equal parts of x lose the same elements, and other parts others.

        A seed is the first process's, plus an offset for each part of x. A mask (eager on CUDA) is the first process's
        among those that have the same part.
        """
        seeds = state.dtype is torch.int64
        state = state.contiguous()
        for i in range(self.mesh.ndim) if seeds else self.shared:
            torch.distributed.broadcast(state, group=self.mesh.get_group(i), group_src=0)
        if not seeds:
            return state
        part = 0
        for i in range(self.mesh.ndim):
            if i not in self.shared:
                part = part * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return state + ((part * _STEP + 2**63) % 2**64 - 2**63)

    def sum_squares(self, norms: Tensor) -> Tensor:
        """Norms of rows of W from those of the parts that the processes have."""
        if not self.sums:
            return norms
        squares = norms.square()
        for i in self.sums:
            torch.distributed.all_reduce(squares, group=self.mesh.get_group(i))
        return squares.sqrt()


def _local(tensor: Any, placements: tuple[Any, ...], grads: tuple[Any, ...] | None = None) -> Tensor:
    """What this process has of ``tensor`` once it lies as ``placements``; its gradient there lies as ``grads``."""
    moved: Tensor = tensor.redistribute(placements=placements).to_local(grad_placements=grads)
    return moved


def forward(layer: LoRALayer, x: Any, p: float) -> Tensor:
    """y (..., N), a DTensor, for a DTensor x (..., K), as torch's own linear layer has it."""
    weight: Any = layer.matrix(layer.weight)
    if not is_sharded(x):
        raise InvalidTypeError(
            "a plain tensor was given to a layer whose weight is sharded (DTensor). With fully_shard call the module "
            "that was given to it, not a layer within; with tensor parallelism give the layer a plan "
            "(parallelize_module), or x as a DTensor on the weight's mesh."
        )
    if layer.activation != "identity":
        raise InvalidTypeError(
            f"a layer with activation={layer.activation!r} has a sharded weight, and an activation between A and B is "
            "not computed in parts. Leave the layer out of the tensor-parallel plan; fully_shard takes it."
        )
    if x.device_mesh != weight.device_mesh:
        raise InvalidTypeError(
            f"x lies on {x.device_mesh} and the layer's weight on {weight.device_mesh}: both must be on one mesh. "
            "Redistribute x, or parallelize the layer with the mesh that x is on."
        )
    layout = Layout.of(weight, x)
    moved = x if x.placements == layout.x else x.redistribute(placements=layout.x)
    own = _Parts(
        moved.to_local(grad_placements=layout.dx),
        _local(weight, layout.weight, layout.dweight),
        _local(layer.lora_A, layout.a, layout.da),
        _local(layer.lora_B, layout.b, layout.db),
    )
    bias: Any = layer.bias if layer.lora_bias is None else layer._offset(layer.bias, layer.lora_bias)
    fused = None if bias is None or layout.sums else _local(bias, layout.vector, layout.dvector)
    if layer.use_dora:
        y: Tensor = _dora(layer, layout, own, fused, p)
    else:
        y = apply(own.x, own.weight, own.a, own.b, fused, layer.scaling, p, None, layout.share)
    out: Tensor = _joined(y, layout, (*x.shape[:-1], weight.shape[0]))
    if bias is not None and layout.sums:  # once, not by each process that is summed over
        out = out + bias.to(out.dtype)
    return out


@dataclass(frozen=True)
class _Parts:
    """What this process has of x, W, A and B."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor


def _joined(local: Tensor, layout: Layout, shape: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import DTensor

    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return DTensor.from_local(
        local, layout.mesh, layout.y, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def _dora(layer: LoRALayer, layout: Layout, own: _Parts, bias: Tensor | None, p: float) -> Tensor:
    magnitude = layer.lora_magnitude_vector
    assert magnitude is not None
    norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    gains = dora.gain(_local(magnitude, layout.vector, layout.dvector), norms)
    dropped = None
    if p > 0.0:
        x, name = prepare(own.x, None)
        flat = x.reshape(-1, x.shape[-1])
        state = layout.share(backend(name).dropout_state(flat, p))
        dropped = drop(flat, operators(name).mask(state, *flat.shape, p), p).view_as(x)
    return dora.forward(own.x, own.weight, own.a, own.b, bias, layer.scaling, gains, p, dropped)


def _at_rest(layer: LoRALayer) -> tuple[Layout, _Parts]:
    """The parts of W, A and B that this process has for what is computed of the weight alone."""
    weight: Any = layer.matrix(layer.base_weight)
    layout = Layout.of(weight)
    w = _local(weight, layout.weight)
    return layout, _Parts(w, w, _local(layer.lora_A, layout.a), _local(layer.lora_B, layout.b))


@torch.no_grad()
def row_norms(layer: LoRALayer) -> Any:
    """‖W + s B A‖ of each row, (N,), a DTensor that lies as W's rows do."""
    from torch.distributed.tensor import DTensor

    layout, own = _at_rest(layer)
    norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    return DTensor.from_local(
        norms, layout.mesh, layout.vector, run_check=False, shape=torch.Size((layer.out_features,)), stride=(1,)
    )


@torch.no_grad()
def merged_weight(layer: LoRALayer) -> Any:
    """The merged weight as it is stored: each process computes its own part."""
    from torch.distributed.tensor import DTensor

    layout, own = _at_rest(layer)
    magnitude, norms = layer.lora_magnitude_vector, None
    if magnitude is not None:
        magnitude = _local(magnitude, layout.vector)  # type: ignore[assignment]
        norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    merged = layer.matrix(dora.merged(own.weight, own.a, own.b, layer.scaling, magnitude, norms)).contiguous()
    like: Any = layer.weight
    return DTensor.from_local(
        merged, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, those of other processes too."""
    if not is_sharded(tensor):
        return bool(torch.isfinite(tensor).all())
    sharded: Any = tensor
    fine = torch.isfinite(sharded.to_local()).all().to(torch.int32)
    for i in range(sharded.device_mesh.ndim):
        torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, sharded.device_mesh.get_group(i))
    return bool(fine)


@torch.no_grad()
def write(target: Any, value: Any) -> None:
    """Writes the DTensor ``value`` into ``target``'s memory, which FSDP2 holds on to."""
    target.to_local().copy_(value.redistribute(placements=target.placements).to_local())


@torch.no_grad()
def fill(target: Any, value: Tensor) -> None:
    """Writes the plain ``value``, the first process's of it, into ``target``, sharded or plain."""
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh, value = target.device_mesh, value.contiguous()
    for i in range(mesh.ndim):
        torch.distributed.broadcast(value, group=mesh.get_group(i), group_src=0)
    write(target, DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False))


def merge_in_place(layer: LoRALayer, aside: nn.Module, weight: Any, bias: Any) -> None:
    """Writes merged values into the Parameters that FSDP2 manages; copies of the former ones go into ``aside``."""
    merged = {"weight": weight} | ({"bias": bias} if "bias" in aside._parameters else {})
    if aside._parameters.get("bias", weight) is None:
        raise LoRAStateError(
            "merging gives a layer without bias one, for its lora_bias, and fully_shard (FSDP2) would not know of it. "
            "Save the adapter, and merge it on the plain model."
        )
    for name, value in merged.items():
        former: Any = getattr(layer, name)
        aside.register_parameter(name, nn.Parameter(former.detach().clone(), requires_grad=former.requires_grad))
        write(former, value)


def unmerge_in_place(layer: LoRALayer, weight: Any, bias: Any) -> None:
    """Writes the former values back."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value is not getattr(layer, name):
            write(getattr(layer, name), value)


def kept_aside(tensor: Any, now: Any) -> Any:
    """A weight or bias that merging has put aside, as FSDP2 has gathered ``now``, the one in its place."""
    if not is_sharded(tensor) or (is_sharded(now) and now.device_mesh == tensor.device_mesh):
        return tensor
    whole = tensor.full_tensor().to(now.dtype)
    if not is_sharded(now):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    copied = DTensor.from_local(whole, now.device_mesh, [Replicate()] * now.device_mesh.ndim, run_check=False)
    return copied.redistribute(placements=now.placements)


def once(tensors: Iterable[Any], action: Callable[[], None]) -> None:
    """Does ``action`` in one of the processes that hold parts of ``tensors``; where it raises there, all raise.

    That is the first process of the largest mesh. Where nothing is sharded, each process that calls this acts.
    """
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
    if not meshes:
        action()
        return
    mesh = max(meshes, key=lambda mesh: mesh.size())
    if any(mesh.get_coordinate()):
        failure = _told(mesh, None)
        if failure is not None:
            raise LoRAStateError(f"the first process of the mesh, which acts for all, has failed: {failure}")
        return
    try:
        action()
    except BaseException as error:
        _told(mesh, str(error) or type(error).__name__)
        raise
    _told(mesh, None)


def _told(mesh: Any, message: str | None) -> str | None:
    """The first process's ``message``, in all processes of the mesh, passed on along one dimension after the other."""
    told = [message]
    for i in range(mesh.ndim):
        torch.distributed.broadcast_object_list(told, group=mesh.get_group(i), group_src=0)
    return told[0]
