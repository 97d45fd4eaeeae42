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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dora
from .branches import Branch
from .errors import InvalidTypeError
from .gate import run_branch

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = [
    "everywhere",
    "forward",
    "is_finite",
    "is_sharded",
    "merged_weight",
    "moved_weight",
    "put",
    "row_norms",
]

_STEP = 0x9E3779B97F4A7C15  # odd, so no two parts of x ever have one seed; far from small numbers, as seeds often are


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor. By name: torch.distributed.tensor takes a second to import."""
    return type(tensor).__name__ == "DTensor"


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
    """What this process has of ``tensor`` once it lies as ``placements``; its gradient there lies as ``grads``.

    A tensor that lies so already goes through ``redistribute``, which takes time, for the sake of a gradient alone.
    """
    sums = tensor.requires_grad and grads is not None and grads != placements
    if sums or tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    local: Tensor = tensor.to_local(grad_placements=grads)
    return local


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
    bias: Any = layer.total_bias
    fused = None if bias is None or layout.sums else _local(bias, layout.vector, layout.dvector)
    gains = _gains(layer, layout, own) if layer.use_dora else None
    y = run_branch(own.x, Branch(own.weight, own.a, own.b, fused, layer.scaling, gains), p, layout.share)
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


def _gains(layer: LoRALayer, layout: Layout, own: _Parts) -> Tensor:
    """DoRA's gains of this process's rows."""
    magnitude = layer.lora_magnitude_vector
    assert magnitude is not None
    norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    return dora.gain(_local(magnitude, layout.vector, layout.dvector), norms)


def _at_rest(weight: Any, lora_a: Any, lora_b: Any) -> tuple[Layout, _Parts]:
    """What this process has of W (N, K), A and B, for what is computed of the weight alone."""
    layout = Layout.of(weight)
    w = _local(weight, layout.weight)
    a, b = (tensor if is_sharded(tensor) else everywhere(tensor, layout.mesh) for tensor in (lora_a, lora_b))
    return layout, _Parts(w, w, _local(a, layout.a), _local(b, layout.b))


def everywhere(tensor: Tensor, mesh: Any) -> Any:
    """A tensor that all processes have alike, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


@torch.no_grad()
def row_norms(layer: LoRALayer) -> Any:
    """‖W + s B A‖ of each row, (N,), a DTensor that lies as W's rows do."""
    from torch.distributed.tensor import DTensor

    layout, own = _at_rest(layer.matrix(layer.base_weight), layer.lora_A, layer.lora_B)
    norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    return DTensor.from_local(
        norms, layout.mesh, layout.vector, run_check=False, shape=torch.Size((layer.out_features,)), stride=(1,)
    )


@torch.no_grad()
def merged_weight(layer: LoRALayer) -> Any:
    """The merged weight as it is stored: each process computes its own part."""
    layout, own = _at_rest(layer.matrix(layer.weight), layer.lora_A, layer.lora_B)
    magnitude, norms = layer.lora_magnitude_vector, None
    if magnitude is not None:
        magnitude = _local(magnitude, layout.vector)  # type: ignore[assignment]
        norms = layout.sum_squares(dora.row_norms(own.weight, own.a, own.b, layer.scaling))
    return _stored(layer, dora.merged(own.weight, own.a, own.b, layer.scaling, magnitude, norms))


@torch.no_grad()
def moved_weight(layer: LoRALayer, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Any:
    """``weight`` + scaling B A as it is stored, likewise; A and B may be plain, and are the same everywhere then."""
    _, own = _at_rest(layer.matrix(weight), lora_a, lora_b)
    return _stored(layer, dora.merged(own.weight, own.a, own.b, scaling, None, None))


def _stored(layer: LoRALayer, local: Tensor) -> Any:
    """This process's part (N, K) of a weight, put together as ``layer.weight`` lies."""
    from torch.distributed.tensor import DTensor

    like: Any = layer.weight
    stored = layer.matrix(local).contiguous()
    return DTensor.from_local(
        stored, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
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
def put(target: Any, value: Any) -> None:
    """Writes ``value`` into ``target``'s memory, which FSDP2 holds on to; each may be sharded or plain.

    Plain values for a sharded target are the first process's.
    """
    if not is_sharded(target):
        target.copy_(value)
        return
    if not is_sharded(value):
        value = value.contiguous()
        for i in range(target.device_mesh.ndim):
            torch.distributed.broadcast(value, group=target.device_mesh.get_group(i), group_src=0)
        value = everywhere(value, target.device_mesh)
    target.to_local().copy_(value.redistribute(placements=target.placements).to_local())
