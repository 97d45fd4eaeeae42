"""``FusedLoRAExperts``: a mixture's experts module with adapters on its own stacked Parameters."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import switching
from ..config import AdapterOptions, scaling_of
from ..errors import InvalidArgumentError, LoRAStateError
from ..gate import autocast_input, device_type_of, is_autocast_enabled
from ..initialisation import draw
from ..tensors import as_dtype
from .autograd import project
from .problem import Adapter
from .routing import Routing, combine
from .suitable import DOWN, UP, check_options, check_target, why_not_experts

__all__ = ["FusedLoRAExperts", "around_experts"]

M = TypeVar("M", bound=nn.Module)

_TABLES = ("_parameters", "_buffers", "_modules")
_OWN = ("lora_A", "lora_B", "options", "_lora_enabled", "_asks")
_KINDS: dict[type[nn.Module], type[FusedLoRAExperts]] = {}


class FusedLoRAExperts(nn.Module):
    r"""Experts of a mixture with LoRA inside: of each token's rows, for each of its experts e,

    .. math:: y_e = x_e W_e^\top + b_e + s (\mathrm{drop}(x_e) A_e^\top) B_e^\top

    in place of each adapted projection. Activation, bias, norm and the weighted sum are the module's own.

    ``transformers.integrations.moe`` says what such a module has: ``gate_up_proj`` (E, 2I, H) or ``up_proj``
    (E, I, H), ``down_proj`` (E, H, I), or each transposed where ``is_transposed``. Its class derives from the
    module's, and its Parameters keep their names. ``config._experts_implementation`` is not touched: it holds for the
    modules without an adapter, and for this one while its adapter is off.

    Attributes:
        lora_A: by the name of the adapted Parameter, A of all experts, (E, R, K).
        lora_B: likewise B, (E, N, R).
        options: likewise, what the adapter was made with.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    options: dict[str, AdapterOptions]
    _plain_class: type[nn.Module]
    _lora_enabled: bool = True

    def scaling(self, name: str) -> float:
        """s of the adapter on the Parameter called ``name``."""
        of = self.options[name]
        return scaling_of(of.r, of.lora_alpha, of.use_rslora)

    def stacked(self, name: str) -> Tensor:
        """The Parameter called ``name`` as (E, N, K)."""
        weight = self.get_parameter(name)
        return weight.transpose(1, 2) if getattr(self, "is_transposed", False) else weight

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws A and B of each expert anew, as ``init_lora_weights`` says."""
        for name, of in self.options.items():
            for a, b in zip(self.lora_A[name], self.lora_B[name], strict=True):
                if not a.is_meta:
                    new_a, new_b = draw(of.init_lora_weights, a, b)
                    a.copy_(new_a)
                    b.copy_(new_b)

    def to_plain(self) -> nn.Module:
        """The module without its adapters, of the class that it had, around the same Parameters."""
        plain: nn.Module = _copy(self, self._plain_class)
        for name in _OWN:
            plain._modules.pop(name, None)
            plain.__dict__.pop(name, None)
        return plain

    def merge(self) -> None:
        """Refused.

        Raises:
            LoRAStateError: always.
        """
        raise LoRAStateError(
            "merge was called on stacked experts with LoRA, which cannot be merged yet. Run them as they are; or save "
            "the adapter, and merge it with PEFT."
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) of ``hidden_states`` (T, H), its experts ``top_k_index`` (T, k) and their weights (T, k).

        An index of ``num_experts`` or more adds nothing. Where it may come on a GPU, ``_is_expert_parallel`` says so.
        """
        on = self._lora_enabled
        if not on or self.__dict__.get("_asks", False):
            on = switching.is_on(self, on)
        if not on:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc,no-any-return]
        return run(self, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        adapted = (f"{name}: r={of.r}, lora_alpha={of.lora_alpha:g}" for name, of in self.options.items())
        return ", ".join(filter(None, [super().extra_repr(), *adapted]))


def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``grouped_mm_experts_forward`` of transformers computes, with the adapters inside."""
    _check_shapes(hidden_states, top_k_index, top_k_weights)
    routing = Routing(top_k_index, module.num_experts, getattr(module, "_is_expert_parallel", False))
    up = UP[getattr(module, "has_gate", True)]
    x = _project(module, hidden_states, up, routing, spread=True)
    x = module._apply_gate(x) if up == "gate_up_proj" else module.act_fn(x)
    x = _project(module, x, DOWN, routing, spread=False)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    return combine(x, top_k_weights, routing).to(hidden_states.dtype)


def _project(module: FusedLoRAExperts, x: Tensor, name: str, routing: Routing, spread: bool) -> Tensor:
    weight, adapter, p = module.stacked(name), None, 0.0
    if name in module.options:
        adapter = Adapter(module.lora_A[name], module.lora_B[name], module.scaling(name))
        p = module.options[name].lora_dropout if module.training else 0.0
    device_type = device_type_of(x)
    if is_autocast_enabled(device_type):
        x = autocast_input(x, device_type)
        with torch.autocast(device_type, enabled=False):
            y = project(x, weight, adapter, routing, p, spread)
    else:
        y = project(as_dtype(x, weight.dtype), weight, adapter, routing, p, spread)
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    return y if bias is None else y.add_(bias.index_select(0, routing.experts))


def _check_shapes(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    if x.dim() != 2 or top_k_index.shape[:1] != x.shape[:1] or top_k_weights.shape != top_k_index.shape:
        raise InvalidArgumentError(
            f"shapes that do not fit were given: hidden_states {tuple(x.shape)}, top_k_index "
            f"{tuple(top_k_index.shape)}, top_k_weights {tuple(top_k_weights.shape)}. They must be (T, H), (T, k) and "
            "(T, k)."
        )


def around_experts(module: nn.Module, options: Mapping[str, AdapterOptions], draw: bool = True) -> FusedLoRAExperts:
    """``module`` with an adapter on each Parameter that ``options`` names, around its own Parameters, frozen.

    ``draw=False`` leaves the adapters' values unset.

    Raises:
        InvalidArgumentError, InvalidTypeError, LoRAStateError: the module, a name or an option does not suit; nothing
            is changed then.
    """
    if reason := why_not_experts(module):
        raise LoRAStateError(reason)
    for name, of in options.items():
        check_target(module, name)
        check_options(of)
    made: FusedLoRAExperts = _copy(module, _kind_for(type(module)))
    a, b = nn.ParameterDict(), nn.ParameterDict()
    made.lora_A, made.lora_B, made.options = a, b, dict(options)
    for name, of in options.items():
        weight = made.stacked(name)
        e, n, k = weight.shape
        half = weight.dtype in (torch.float16, torch.bfloat16)
        dtype = of.adapter_dtype or (torch.float32 if half else weight.dtype)
        a[name] = nn.Parameter(torch.empty((e, of.r, k), dtype=dtype, device=weight.device))
        b[name] = nn.Parameter(torch.empty((e, n, of.r), dtype=dtype, device=weight.device))
    if draw:
        made.reset_lora_parameters()
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    return made


def _copy(module: nn.Module, kind: type[M]) -> M:
    """A ``kind`` with all that ``module`` has: its Parameters, children, attributes, and its very tables of hooks."""
    made = nn.Module.__new__(kind)
    vars(made).update(vars(module))
    for table in _TABLES:
        vars(made)[table] = dict(vars(module)[table])
    vars(made)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return made


def _kind_for(plain: type[nn.Module]) -> type[FusedLoRAExperts]:
    """The class of the adapted module: it derives from the module's own, so ``isinstance`` holds."""
    if plain in _KINDS:
        return _KINDS[plain]

    def rebuilt(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _blank_for, (plain,), module.__getstate__()  # a pickle finds no class that was made here by its name

    body = {"_plain_class": plain, "__module__": plain.__module__, "__reduce_ex__": rebuilt}
    made = types.new_class(
        f"FusedLoRA{plain.__name__}", (FusedLoRAExperts, plain), {}, lambda names: names.update(body)
    )
    return _KINDS.setdefault(plain, made)


def _blank_for(plain: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_kind_for(plain))
