"""Checks that several processes run at once (``distributed_worker.py``): one layer under a plan of torch's own.

Each process computes the same layer whole, in float64 and in its own dtype, and compares what came back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, LoRAConfig, merge_lora, replace_linear, restore_linear, save_adapter
from lora_kernels.accuracy import expected_errors, run_reference
from lora_kernels.drawn import drawn_errors
from lora_kernels.errors import InvalidTypeError, LoRAStateError
from made_models import acting, disturb
from numerics import check, check_all, same_bits

K, N, R, SCALING = 22, 26, 3, 4 / 3  # none of them is a multiple of four: the last process has less
PLANS: dict[str, Callable[[], Any]] = {
    "columns": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rows": lambda: RowwiseParallel(input_layouts=Replicate()),
    "columns, tokens apart": lambda: ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
    "rows, tokens apart": lambda: RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {},
    "bias of B": {"lora_bias": True},
    "bias of B alone": {"lora_bias": True, "bias": False},
    "DoRA": {"use_dora": True},
    "16 bit": {"dtype": torch.bfloat16},
}


def world() -> int:
    return distributed.get_world_size()


def every_case() -> Iterator[tuple[str, str]]:
    for plan in PLANS:
        for layer in LAYERS:
            yield plan, layer


def make(device: str, **arguments: Any) -> FusedLoRALinear:
    """The same layer in every process, its biases training too."""
    torch.manual_seed(1)
    layer = acting(K, N, **{"r": R, "lora_alpha": 4, "device": device, **arguments})
    for parameter in (layer.bias, layer.lora_bias, layer.lora_magnitude_vector):
        if parameter is not None:
            parameter.requires_grad_()
            parameter.data.add_(torch.rand_like(parameter) / 4)
    return layer


def batch(device: str, dtype: torch.dtype, tokens: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(tokens, K, device=device).to(dtype), torch.randn(tokens, N, device=device).to(dtype)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, plan: str) -> Tensor:
    """What a process gives to the layer."""
    return tensor.chunk(world())[distributed.get_rank()] if plan.endswith("apart") else tensor


def run(layer: nn.Module, x: Tensor, dy: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """y, dx and the gradient of each Parameter that trains; ``call`` is what runs the layer, if not itself."""
    layer.zero_grad()
    x = x.detach().requires_grad_()  # with its strides
    y = layer(x) if call is None else call(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, **grads}


def check_outputs_and_gradients_under_both_plans(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for plan, kind in every_case():
        layer = make(device, **LAYERS[kind])
        x, dy = batch(device, layer.weight.dtype)
        in_float64 = partial(run, _rounded(layer).double(), x.double(), dy.double())
        exact = in_float64()
        errors = drawn_errors(x.dtype, in_float64, exact)
        yardstick = run(copy.deepcopy(layer), x, dy)
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        found = run(split, part(x, plan), part(dy, plan))
        apart = plan.endswith("apart")
        for results in (exact, errors, yardstick):
            results |= {name: part(results[name], plan) for name in ("y", "dx") if apart}
        assert found.keys() == exact.keys()
        assert all(type(p) is DTensor for p in split.parameters())
        for name, value in found.items():
            check(f"{plan}, {kind}: {name}", whole(value), exact[name], yardstick[name], x.dtype, False, errors[name])


def _rounded(layer: FusedLoRALinear) -> FusedLoRALinear:
    """A copy whose adapter is rounded to the compute dtype, as the operators round it."""
    layer = copy.deepcopy(layer)
    for parameter in layer.adapter.values():
        parameter.data = parameter.data.to(layer.weight.dtype)
    return layer


def check_dropout_takes_one_mask_for_a_whole_x_and_one_for_each_part(device: str, folder: Path) -> None:
    mesh, p = init_device_mesh(device, (world(),)), 0.5
    for plan, dora in ((plan, dora) for plan in ("columns", "rows") for dora in (False, True)):
        layer = make(device, lora_dropout=p, use_dora=dora)
        layer.weight.data.zero_()  # so that dx is zero where the mask is
        x, dy = batch(device, torch.float32)
        gain = layer.lora_magnitude_vector.detach() / layer.row_norms() if dora else None
        tensors = x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, dy
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        torch.manual_seed(100 + distributed.get_rank())  # the processes need not be seeded alike
        found = run(split, x, dy)
        mask = found["dx"] != 0
        assert 0.4 < mask.double().mean() < 0.6
        first, second = (m[:, : K // 2] for m in (mask, mask[:, -(K // 2) :]))
        assert not torch.equal(first, second)
        given = (*tensors, layer.scaling, mask, p, gain)
        exact, yardstick = (run_reference(dtype, *given) for dtype in (torch.float64, torch.float32))
        errors = expected_errors(torch.float32, *given)
        actual = {"y": found["y"], "dx": found["dx"], "da": found["lora_A"], "db": found["lora_B"]}
        found = {name: whole(value) for name, value in actual.items()}
        check_all(found, exact, yardstick, torch.float32, expected=errors)


# On a mesh of two dimensions: how W (N, K) and x (tokens, K) lie on "data" and on "model".
ON_TWO: dict[str, tuple[tuple[Any, Any], tuple[Any, Any]]] = {
    "columns": ((Replicate(), Shard(0)), (Shard(0), Replicate())),
    "rows": ((Replicate(), Shard(1)), (Shard(0), Shard(1))),
    "tokens apart twice": ((Replicate(), Replicate()), (Shard(0), Shard(0))),
}


def check_dropout_on_two_dimensions_has_a_mask_for_each_part_of_x(device: str, folder: Path) -> None:
    mesh, p = init_device_mesh(device, (max(world() // 2, 1), 2), mesh_dim_names=("data", "model")), 0.5
    for kind, (of_w, of_x) in ON_TWO.items():
        layer = make(device, lora_dropout=p)
        layer.weight.data.zero_()  # so that dx is zero where the mask is
        x, dy = batch(device, torch.float32, tokens=4 * world())
        tensors = x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, dy
        # The bias and B lie as W's rows do, A as its columns do.
        rows = [place if place == Shard(0) else Replicate() for place in of_w]

        def lies(name: str, module: nn.Module, mesh: Any, of_w: Any = of_w, rows: Any = rows) -> None:
            for own, parameter in list(module.named_parameters(recurse=False)):
                places = of_w if own == "weight" else rows if own in ("bias", "lora_B") else [Replicate()] * 2
                value = nn.Parameter(distribute_tensor(parameter.data, mesh, places), parameter.requires_grad)
                module.register_parameter(own, value)

        split = distribute_module(copy.deepcopy(layer), mesh, lies)
        torch.manual_seed(100 + distributed.get_rank())  # the processes need not be seeded alike
        given = distribute_tensor(x, mesh, of_x).requires_grad_()
        y = split(given)
        whole_dy = distribute_tensor(dy, mesh, [place if place == Shard(0) else Replicate() for place in of_x])
        y.redistribute(placements=whole_dy.placements).backward(whole_dy)
        dx = whole(given.grad)
        mask = dx != 0
        parts = [part for rows_ in mask.chunk(world() // (1 if kind == "tokens apart twice" else 2))
                 for part in (rows_.chunk(2, 1) if kind == "rows" else (rows_,))]  # fmt: skip
        assert not any(torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i] if a.shape == b.shape), kind
        exact, yardstick = (
            run_reference(dtype, *tensors, layer.scaling, mask, p) for dtype in (torch.float64, torch.float32)
        )
        actual = {"y": y.full_tensor().detach(), "dx": dx, "da": split.lora_A.grad, "db": split.lora_B.grad}
        errors = expected_errors(torch.float32, *tensors, layer.scaling, mask, p)
        check_all(
            {name: whole(value) for name, value in actual.items()}, exact, yardstick, torch.float32, False, errors
        )


def check_activation_checkpointing_drops_the_same_again(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for plan in ("columns", "rows"):
        split = parallelize_module(make(device, lora_dropout=0.3), mesh, PLANS[plan]())
        x, dy = batch(device, torch.float32)
        results = []
        for forward in (split, lambda x, split=split: checkpoint(split, x, use_reentrant=False)):
            split.zero_grad()
            x = x.detach().clone().requires_grad_()
            torch.manual_seed(distributed.get_rank())
            forward(x).backward(dy)
            results.append([x.grad, *(whole(p.grad) for p in split.parameters() if p.requires_grad)])
        assert all(same_bits(left, right) for left, right in zip(*results, strict=True)), plan


def check_merging_a_layer_under_both_plans(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for plan, kind in ((plan, kind) for plan in ("columns", "rows") for kind in LAYERS):
        layer = make(device, **LAYERS[kind])
        x, _ = batch(device, layer.weight.dtype)
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        exact = copy.deepcopy(layer).double()
        with torch.no_grad():
            results = [(y(x), base(y, x)) for y in (split,)]
            before = {name: whole(tensor).clone() for name, tensor in split.state_dict().items()}
            split.merge()
            layer.merge()
            exact.merge()
            check("merged", whole(split.weight), exact.weight, layer.weight, x.dtype)
            check("y", split(x), partial(exact, x.double()), layer(x), x.dtype)
            assert same_bits(base(split, x), results[0][1])
            assert split.weight.placements == split.base_weight.placements
            after = {name: whole(tensor) for name, tensor in split.state_dict().items()}
            assert after.keys() == before.keys()
            assert all(same_bits(after[name], tensor) for name, tensor in before.items())
            split.unmerge()
            assert same_bits(split(x), results[0][0]), (plan, kind)


def base(layer: FusedLoRALinear, x: Tensor) -> Tensor:
    with layer.enable_lora(False):
        y: Tensor = layer(x)
    return y


def check_sharded_layers_start_like_whole_ones(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for plan in ("columns", "rows"):
        for init in (True, False, "gaussian", "orthogonal"):
            layer = make(device, r=4, lora_bias=isinstance(init, bool), init_lora_weights=init)
            split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
            torch.manual_seed(5)
            layer.reset_lora_parameters()
            torch.manual_seed(5 + distributed.get_rank())  # the first process's values count
            split.reset_lora_parameters()
            assert all(same_bits(whole(split.adapter[name]), value) for name, value in layer.adapter.items())
        layer = make(device, use_dora=True)
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        plain = {"weight": layer.weight.detach() * 2, "bias": layer.bias.detach()}
        like = {name: distribute(value, getattr(split, name)) for name, value in plain.items()}
        split.load_state_dict(like, strict=False)
        layer.load_state_dict(plain, strict=False)
        weight, a, b = (tensor.detach().double() for tensor in (layer.weight, layer.lora_A, layer.lora_B))
        exact = (weight + layer.scaling * b @ a).norm(dim=1)
        magnitude = layer.lora_magnitude_vector
        check("magnitude", whole(split.lora_magnitude_vector), exact, magnitude, torch.float32)


def check_residuals_of_sharded_layers(device: str, folder: Path) -> None:
    """PiSSA: the adapter can start again and the weight be put back; other initial values need their own weight."""
    mesh = init_device_mesh(device, (world(),))
    for plan in ("columns", "rows"):
        layer = make(device, init_lora_weights="pissa")
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        exact = copy.deepcopy(layer).double()
        started = {name: value.detach().clone() for name, value in layer.adapter.items()}
        disturb(split)
        split.reset_lora_parameters()
        assert all(same_bits(whole(split.adapter[name]), value) for name, value in started.items())
        check("weight", whole(split.plain_weight), exact.plain_weight, layer.plain_weight, torch.float32)
        assert split.plain_weight.placements == split.weight.placements
        other = {name: tensor * 2 for name, tensor in split.state_dict().items() if "initial" in name}
        load = lambda split=split, other=other: split.load_state_dict(other, strict=False)  # noqa: E731
        layer_refused_here(split, load, LoRAStateError, "lora_initial_A", "plain model first")
        split.load_state_dict({name: tensor.clone() for name, tensor in split.state_dict().items()})


def distribute(value: Tensor, like: Any) -> DTensor:
    return distribute_tensor(value, like.device_mesh, like.placements)


def check_layers_that_are_sharded_by_hand(device: str, folder: Path) -> None:
    """Tokens apart over whole Parameters, which train too; and torch's own linear layer beside."""
    mesh = init_device_mesh(device, (world(),))
    layer = make(device)
    layer.weight.requires_grad_()
    x, dy = batch(device, torch.float32)
    exact = partial(run, copy.deepcopy(layer).double(), x.double(), dy.double())
    yardstick = run(copy.deepcopy(layer), x, dy)
    split = distribute_module(copy.deepcopy(layer), mesh)
    found = run(split, *(distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (x, dy)))
    check_all({name: whole(value) for name, value in found.items()}, exact, yardstick, torch.float32)
    assert found["y"].placements == (Shard(0),)


def check_what_cannot_be_is_a_sentence(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    x, _ = batch(device, torch.float32)
    by_hand = distribute_module(make(device), mesh)
    layer_refused_here(by_hand, lambda: by_hand(x), InvalidTypeError, "a plain tensor was given", "parallelize_module")
    other = init_device_mesh(device, (world(), 1))
    on_other = distribute_tensor(x, other, [Replicate(), Replicate()])
    layer_refused_here(by_hand, lambda: by_hand(on_other), InvalidTypeError, "both must be on one mesh")
    bent, everywhere = distribute_module(make(device, activation="relu"), mesh), distribute_tensor(x, mesh)
    layer_refused_here(bent, lambda: bent(everywhere), InvalidTypeError, "activation='relu'", "fully_shard takes it")
    managed = fully_shard(nn.Sequential(make(device), nn.ReLU()), mesh=mesh)
    layer_refused_here(managed[0], managed[0].merge, LoRAStateError, "merge_lora(model)", "fully_shard")
    for function in (merge_lora, save_to(folder / "refused")):
        layer_refused_here(
            managed[0], lambda function=function: function(wrapped(managed[0])), LoRAStateError, "a part"
        )
    layer_refused_here(managed[0], lambda: restore_linear(managed), LoRAStateError, "restore_linear", "'0'")
    torch.manual_seed(0)
    plain = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), mesh=mesh)
    plain(torch.ones(2, 4, device=device))  # the root's weights stay gathered
    with pytest.raises(InvalidTypeError, match="then call parallelize_module or fully_shard"):
        replace_linear(plain, LoRAConfig(r=2, target_modules=["0"]))
    nobias = make(device, lora_bias=True, bias=False)
    without = fully_shard(nn.Sequential(nobias, nn.ReLU()), mesh=mesh)
    layer_refused_here(nobias, lambda: merge_lora(without), LoRAStateError, "without bias", "plain model")
    tied = nn.Sequential(nn.Linear(K, N, device=device), make(device))
    tied[0].weight = tied[1].weight
    fully_shard(tied, mesh=mesh)
    layer_refused_here(tied[1], lambda: merge_lora(tied), LoRAStateError, "'1'", "0.weight", "one memory")


def wrapped(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


def save_to(folder: Path) -> Callable[[nn.Module], None]:
    return lambda model: save_adapter(model, folder)


def layer_refused_here(
    layer: FusedLoRALinear, function: Callable[[], Any], error: type[Exception], *words: str
) -> None:
    """As ``models.layer_refused``, which compares values that are not sharded."""
    weight, merged = layer.weight, layer.merged
    before = {name: whole(tensor).clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(error) as caught:
        function()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert layer.weight is weight
    assert layer.merged == merged
    after = {name: whole(tensor) for name, tensor in layer.state_dict().items()}
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())
