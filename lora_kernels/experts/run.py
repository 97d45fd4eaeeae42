"""What a mixture's experts module computes of its tokens, with adapters inside its projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import storage
from ..dispatch import COMPUTE_DTYPES
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from ..gate import autocast_input, chosen, device_type_of, is_autocast_enabled
from ..ops import operators
from ..tensors import PLAIN_TENSORS, as_dtype
from ..weights.stacked import PackedExperts
from .autograd import check, project
from .gate import apply_gate, number_of
from .held import packed
from .mlp_autograd import Stack, run_mlp
from .problem import Adapter
from .routing import Routing, combine
from .suitable import DOWN, UP

__all__ = ["base", "run", "stacked"]


def stacked(module: Any, name: str) -> Tensor | PackedExperts:
    """The weight that ``module`` calls ``name``, as (E, N, K): the one place where experts' weights are read.

    A quantised one is read as it is stored.

    Raises:
        LoRAStateError: it is no plain tensor, or its values are not gathered here.
    """
    if (quantised := packed(module, name)) is not None:
        return quantised
    weight = getattr(module, name)
    if weight.dim() != 3:
        raise LoRAStateError(
            f"{type(module).__name__}.{name} is {tuple(weight.shape)}: {storage.owner(module) or 'something else'} "
            "holds its values, and they are not gathered here. Call the module within the model that gathers them, or "
            "within deepspeed.zero.GatheredParameters or FSDP.summon_full_params."
        )
    if type(weight) not in PLAIN_TENSORS and type(weight) is not FakeTensor:  # torch.export's
        raise LoRAStateError(
            f"{type(module).__name__}.{name} is a {type(weight).__name__}: LoRA on stacked experts needs whole plain "
            "weights in its forward, which tensor and expert parallelism do not give. Restore the layer, or shard "
            "the model by FSDP, which gathers them."
        )
    return _as_matrices(module, weight)


def base(module: Any, name: str) -> Tensor | PackedExperts:
    """The same of the frozen weight, whatever a merged module reads by its name."""
    if (quantised := packed(module, name)) is not None:
        return quantised
    return _as_matrices(module, module._parameters[name])


def _as_matrices(module: Any, weight: Tensor) -> Tensor:
    return weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight


def run(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, Adapter],
    dropout: Mapping[str, float],
    weight_of: Callable[[Any, str], Tensor | PackedExperts] = stacked,
) -> Tensor:
    """What ``grouped_mm_experts_forward`` of transformers computes, with the adapters inside.

    Args:
        module: transformers' experts module.
        hidden_states, top_k_index, top_k_weights: (T, H), (T, k) and (T, k), as its forward takes them.
        adapters: by the name of the Parameter beside which each acts.
        dropout: likewise p of each, 0 where it has no entry.
        weight_of: gives a Parameter as (E, N, K).
    """
    _check(hidden_states, top_k_index, top_k_weights)
    routing = Routing(top_k_index, module.num_experts, getattr(module, "_is_expert_parallel", False))

    def projected(x: Tensor, name: str, spread: bool) -> Tensor:
        p = dropout.get(name, 0.0)
        return _project(module, x, name, weight_of(module, name), adapters.get(name), p, routing, spread)

    up = UP[getattr(module, "has_gate", True)]
    in_one = _in_one(module, hidden_states, up, top_k_weights, adapters, dropout, weight_of, routing)
    if in_one is not None:
        return in_one
    x = projected(hidden_states, up, True)
    x = apply_gate(module, x) if up == "gate_up_proj" else module.act_fn(x)
    x = projected(x, DOWN, False)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    return combine(x, top_k_weights, routing, hidden_states.dtype)


def _in_one(
    module: Any,
    hidden_states: Tensor,
    up: str,
    weights: Tensor,
    adapters: Mapping[str, Adapter],
    dropout: Mapping[str, float],
    weight_of: Callable[[Any, str], Tensor | PackedExperts],
    routing: Routing,
) -> Tensor | None:
    """y by the operators that have all of it in one, where the module does nothing that those do not."""
    if not hidden_states.is_cpu or up != "gate_up_proj" or up not in adapters or DOWN not in adapters:
        return None
    number = number_of(module)
    if number is None or getattr(module, "has_bias", False) or getattr(module, "has_post_expert_norm", False):
        return None
    stacks: list[Stack] = []
    for name in (up, DOWN):
        weight, adapter = weight_of(module, name), adapters[name]
        if isinstance(weight, PackedExperts):
            return None
        _check_projection(module, name, weight, adapter, hidden_states if name == up else None)
        check(weight, hidden_states, weights, adapter.a, adapter.b)
        stacks.append(Stack(weight, adapter, dropout.get(name, 0.0)))
    first, second = stacks
    autocast = is_autocast_enabled("cpu")
    x = autocast_input(hidden_states, "cpu") if autocast else as_dtype(hidden_states, first.weight.dtype)
    # A row's gradient before its weight, which backward's products make here, may be out of fp16's range.
    if x.dtype is torch.float16 or (not autocast and second.weight.dtype is not x.dtype):
        return None
    backend_name = chosen(x)
    if operators(backend_name).experts_mlp_forward is None:
        return None
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        return run_mlp(x, first, second, weights, routing, number, hidden_states.dtype, backend_name)


def _project(
    module: Any,
    x: Tensor,
    name: str,
    weight: Tensor | PackedExperts,
    adapter: Adapter | None,
    p: float,
    routing: Routing,
    spread: bool,
) -> Tensor:
    """(M, N) of x (M, K), or with ``spread`` (T, K), with the experts' bias."""
    _check_projection(module, name, weight, adapter, x)
    device_type = device_type_of(x)
    if is_autocast_enabled(device_type):
        x = autocast_input(x, device_type)
        with torch.autocast(device_type, enabled=False):
            y = project(x, weight, adapter, routing, p, spread)
    else:
        y = project(as_dtype(x, weight.dtype or x.dtype), weight, adapter, routing, p, spread)
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    return y if bias is None else y.add_(bias.index_select(0, routing.experts))


def _check_projection(
    module: Any, name: str, weight: Tensor | PackedExperts, adapter: Adapter | None, x: Tensor | None
) -> None:
    if x is not None and x.shape[1] != weight.shape[2]:
        raise InvalidArgumentError(
            f"{type(module).__name__}.{name} was given tokens of {x.shape[1]} numbers: its weights take "
            f"{weight.shape[2]}. Pass hidden_states (T, {weight.shape[2]})."
        )
    if adapter is not None and adapter.a.shape[0] != weight.shape[0]:
        raise LoRAStateError(
            f"{type(module).__name__}.{name} has the weights of {weight.shape[0]} experts here and adapters of "
            f"{adapter.a.shape[0]}: its experts were split over processes after they were adapted, and which adapter "
            "is whose is not known. Train them by FSDP2, which gathers the weights, or in one process."
        )


def _check(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    if x.dim() != 2 or top_k_index.shape[:1] != x.shape[:1] or top_k_weights.shape != top_k_index.shape:
        raise InvalidArgumentError(
            f"shapes that do not fit were given: hidden_states {tuple(x.shape)}, top_k_index "
            f"{tuple(top_k_index.shape)}, top_k_weights {tuple(top_k_weights.shape)}. They must be (T, H), (T, k) and "
            "(T, k)."
        )
    for name, given in (("hidden_states", x), ("top_k_weights", top_k_weights)):
        if given.dtype not in COMPUTE_DTYPES:  # a cast to W's dtype and back would change what it holds
            raise InvalidTypeError(
                f"{name} of {given.dtype} was given: it must be floating (torch.float16, torch.bfloat16, "
                "torch.float32, torch.float64). Convert it first."
            )
