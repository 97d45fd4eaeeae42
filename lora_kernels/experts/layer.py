"""``FusedLoRAExperts``: a mixture's experts module with adapters on its own stacked Parameters."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import merging as of_linear
from .. import switching, telling
from ..config import AdapterOptions, scaling_of
from ..dispatch import Problem
from ..errors import InvalidArgumentError, LoRAStateError
from ..initialisation import draw, kind_of
from ..layer import RestoreEnabled
from ..weights.stacked import PackedExperts
from . import merging
from .held import is_quantised
from .problem import Adapter
from .run import base, run, stacked
from .suitable import check_options, check_target, lacking, targets, why_not_experts

__all__ = ["FusedLoRAExperts", "around_experts"]

M = TypeVar("M", bound=nn.Module)

_TABLES = ("_parameters", "_buffers", "_modules")
_OWN = ("lora_A", "lora_B", "options", "_lora_enabled", "_left_off", "_asks", "_merged")
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

    Example:
        >>> from lora_kernels import LoRAConfig, replace_linear
        >>> from torch import nn
        >>> from transformers import Qwen3MoeConfig
        >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        >>> config = Qwen3MoeConfig(num_experts=4, hidden_size=16, moe_intermediate_size=8)
        >>> model = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
        >>> print(replace_linear(model, LoRAConfig(r=2, target_parameters=["experts.down_proj"])))
        replaced 1 layer:
          experts.down_proj (8→16) of 4 experts, r = 2, alpha = 16: 192 parameters
        trainable parameters: 192 of 1,728 (11.11 %)
        >>> layer = model["experts"]
        >>> isinstance(layer, Qwen3MoeExperts), tuple(layer.lora_A["down_proj"].shape)
        (True, (4, 2, 8))
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    options: dict[str, AdapterOptions]
    _plain_class: type[nn.Module]
    _lora_enabled: bool = True
    _left_off: bool = False  # switched off by a call, not for the block of a ``with``
    _merged: bool = False

    def scaling(self, name: str) -> float:
        """s of the adapter on the Parameter called ``name``."""
        of = self.options[name]
        return scaling_of(of.r, of.lora_alpha, of.use_rslora)

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about."""
        weight = self._parameters[next(iter(self.options))]
        assert weight is not None
        p = max(of.lora_dropout for of in self.options.values())
        return Problem(weight.device.type, weight.dtype, dropout_p=p, experts=weight.shape[0])

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapters' Parameters by name, such as ``lora_A.down_proj``."""
        both = (("lora_A", self.lora_A), ("lora_B", self.lora_B))
        return {f"{factor}.{name}": own for factor, of in both for name, own in of.items()}

    @property
    def has_moved(self) -> bool:
        """Whether an adapter adds anything to its base."""
        return any(self._adds(name) for name in self.options)

    @torch.no_grad()
    def _adds(self, name: str) -> bool:
        a, b = self.lora_A[name], self.lora_B[name]
        if a.is_meta or kind_of(self.options[name].init_lora_weights) != "orthogonal":
            return not b.is_meta and bool(torch.count_nonzero(b))
        a, b = a.double(), b.double()  # neither is zero, but their product is at first
        rounding = 4 * a.shape[1] ** 0.5 * torch.finfo(self.lora_B[name].dtype).eps * a.norm() * b.norm()
        return bool((b @ a).norm() > rounding)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws A and B of each expert anew, as ``init_lora_weights`` says.

        Raises:
            LoRAStateError: the experts are merged.
        """
        if self.merged:
            raise LoRAStateError("reset_lora_parameters was called on merged experts. Call unmerge() first.")
        for name, of in self.options.items():
            for a, b in zip(self.lora_A[name], self.lora_B[name], strict=True):
                if not a.is_meta:
                    new_a, new_b = draw(of.init_lora_weights, a, b)
                    a.copy_(new_a)
                    b.copy_(new_b)

    @property
    def merged(self) -> bool:
        """Whether the adapted Parameters' names read merged values."""
        return self._merged

    def merge(self) -> None:
        """Puts W + s B A of each expert, computed in fp32 and rounded once, in the place of each adapted Parameter.

        The original Parameters are kept, so :meth:`unmerge` is exact. The cost is one more copy of the adapted weights.
        While merged, ``state_dict()`` and ``named_parameters()`` still give the base and the adapters.

        Raises:
            LoRAStateError: merged already, on the meta device, or the merged values are not finite where the base's
                are. Nothing is changed then.
        """
        merging.merge(self)

    def unmerge(self) -> None:
        """Puts the original weights back, exactly.

        Raises:
            LoRAStateError: not merged.
        """
        merging.unmerge(self)

    def enable_lora(self, enabled: bool = True) -> Any:
        """Switches the adapters on or off (then: base output only, merged or not). In a ``with``, for its block."""
        restore = RestoreEnabled(self, self._lora_enabled, self._left_off)
        self._lora_enabled, self._left_off = enabled, not enabled
        telling.forget(of_linear.TRAINING)
        return restore

    def to_plain(self) -> nn.Module:
        """The module without its adapters, of the class that it had: around the same Parameters, or merged ones."""
        plain: nn.Module = _copy(self, self._plain_class)
        for name, values in merging.merged_values(self).items():
            plain._parameters[name] = nn.Parameter(values, requires_grad=False)
            plain._buffers.pop(merging.buffer_name(name))
            plain._non_persistent_buffers_set.discard(merging.buffer_name(name))
            plain.__dict__.pop(name, None)
        for name in _OWN:
            plain._modules.pop(name, None)
            plain.__dict__.pop(name, None)
        return plain

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) of ``hidden_states`` (T, H), its experts ``top_k_index`` (T, k) and their weights (T, k).

        An index of ``num_experts`` or more adds nothing. Where it may come on a GPU, ``_is_expert_parallel`` says so.
        """
        on = self._lora_enabled
        if not on or self.__dict__.get("_asks", False):
            on = switching.is_on(self, on)
        if on and not self._merged:
            adapters = {
                name: Adapter(self.lora_A[name], self.lora_B[name], self.scaling(name)) for name in self.options
            }
            dropout = {name: of.lora_dropout for name, of in self.options.items()} if self.training else {}
            return run(self, hidden_states, top_k_index, top_k_weights, adapters, dropout)
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.lora_B.values()):
            of_linear.tell_of_training(self)
        if (self._merged and not on) or is_quantised(self, *targets(self)):
            return run(self, hidden_states, top_k_index, top_k_weights, {}, {}, base)
        return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc,no-any-return]

    def stacked(self, name: str) -> Tensor | PackedExperts:
        """The weight called ``name`` as (E, N, K); merged, if it is."""
        return stacked(self, name)

    def extra_repr(self) -> str:
        adapted = [f"{name}: r={of.r}, lora_alpha={of.lora_alpha:g}" for name, of in self.options.items()]
        flags = {"merged": self.merged, "disabled": not self._lora_enabled}
        return ", ".join(filter(None, [super().extra_repr(), *adapted, *(f"{n}=True" for n, v in flags.items() if v)]))

    def check_rank(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raises where ``state_dict`` has an adapter of another shape under ``prefix``, or cannot be loaded now."""
        for name, own in self.adapter.items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != own.shape:
                raise InvalidArgumentError(
                    f"the state dict's {prefix}{name} is {tuple(given.shape)}, and the module has {tuple(own.shape)} "
                    "(experts, rank and size). Make it with the same rank, or leave the lora_ keys out and load with "
                    "strict=False."
                )
        named = (*self._parameters, *self.adapter)
        if self.merged and (found := next((own for own in named if prefix + own in state_dict), None)):
            raise LoRAStateError(
                f"the state dict has {prefix}{found}, and the experts there are merged: what they run was computed "
                "from the former values. Call unmerge_lora(model) first."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_rank(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("options", ()) and self._merged and value is not self.__dict__.get(name):
            raise LoRAStateError(
                f"{name} was assigned to on merged experts, whose merged values come from the former one. Call "
                "unmerge() first, then do it and merge() again."
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in self.options if self._merged else ():
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        merging.show(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAExperts:
        super()._apply(fn, recurse)
        merging.show(self)
        return self


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
        weight = stacked(made, name)
        e, n, k = weight.shape
        wide = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        dtype = of.adapter_dtype or wide
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

    body = {"_plain_class": plain, "__module__": plain.__module__, "__reduce_ex__": rebuilt, **lacking(plain)}
    made = types.new_class(
        f"FusedLoRA{plain.__name__}", (FusedLoRAExperts, plain), {}, lambda names: names.update(body)
    )
    return _KINDS.setdefault(plain, made)


def _blank_for(plain: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_kind_for(plain))
