"""``LoRALayer``: all that a linear layer with an adapter has and does besides its forward pass.

``nn.py`` has the two layers themselves, which differ in how their weight is stored: (N, K) or (K, N).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from . import assigning, dora, fsdp, initialisation, merging, pissa, sharded, storage, telling
from .branches import Branch
from .config import scaling_of
from .dispatch import Problem
from .errors import InvalidArgumentError, LoRAStateError
from .shared_input import SharedInput

__all__ = ["LoRALayer", "hand_over", "warn_of_rank"]

Layer = TypeVar("Layer", bound="LoRALayer")

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class LoRALayer(nn.Module):
    """The adapter of a linear layer: its Parameters, merging, switching it off, saving and loading.

    A subclass has ``weight`` and ``bias``, and says in :meth:`matrix` how the stored weight is (N, K).
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: Any  # a Parameter or None, which nn.Linear's own annotation does not say
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    lora_initial_A: Tensor | None
    lora_initial_B: Tensor | None
    _left_off: bool = False  # switched off by a call, not for the block of a ``with``
    activation: str = "identity"  # of the class too: layers pickled before there were others have none of their own
    _initial_scaling: float | None  # that with which a part of the weight was taken, if one was; see pissa.py
    _base: merging.Base | None  # the base's weight, and bias where that is merged too, while merged; see merging.py
    _shared: tuple[SharedInput, int] | None = None  # the pass in common with layers that read the same x; and the place

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as it is stored, as (N, K), and the other way round: it is its own inverse. No copy."""
        return weight

    def to_plain(self) -> nn.Module:
        """A module of the kind that was replaced, around this layer's current weight and bias."""
        raise NotImplementedError

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
        init_lora_weights: bool | str,
        adapter_dtype: torch.dtype | None,
        lora_bias: bool,
        activation: str = "identity",
        draw: bool = True,
    ) -> None:
        """Freezes the base and adds the adapter's Parameters; ``draw=False`` leaves them unset."""
        initialisation.check_weight(init_lora_weights, r, self.in_features, self.out_features, self.weight)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.use_dora, self.init_lora_weights = use_rslora, use_dora, init_lora_weights
        self.scaling, self.activation = scaling_of(r, lora_alpha, use_rslora), activation
        self._lora_enabled = True
        object.__setattr__(self, "_base", None)
        assigning.watch()
        weight = self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=weight.device, dtype=adapter_dtype))

        self.lora_A = parameter(r, self.in_features)
        self.lora_B = parameter(self.out_features, r)
        self.register_parameter("lora_bias", parameter(self.out_features) if lora_bias else None)
        self.register_parameter("lora_magnitude_vector", parameter(self.out_features) if use_dora else None)
        pissa.add_slots(self)
        if draw:
            self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Sets lora_A and lora_B anew as ``init_lora_weights`` says, lora_bias likewise, then DoRA's magnitudes.

        Values are drawn in fp32 and rounded to the adapters' dtype, as PEFT does. PiSSA and OLoRA take a part of the
        weight: ``weight`` becomes a new Parameter with the rest, in its dtype, and the initial values are kept in
        buffers; where that was done before, these are put back and the weight stays, so nothing is taken twice. On the
        meta device nothing happens: call it after ``to_empty``, with the base weights loaded.

        Raises:
            LoRAStateError: the layer is merged; FSDP1, ZeRO-3 or accelerate's offloading has its values; with PiSSA or
                OLoRA, the weight is not finite or ``scaling`` not positive.
        """
        storage.check_free("reset_lora_parameters", [("", self)])
        if self.merged:
            raise LoRAStateError("reset_lora_parameters was called on a merged layer. Call unmerge() first.")
        if self.lora_A.is_meta:
            return
        init = self.init_lora_weights
        if initialisation.splits(init):
            pissa.start(self)
        else:
            wide = torch.promote_types(self.lora_A.dtype, torch.float32)
            slots = (_whole_like(parameter, wide) for parameter in (self.lora_A, self.lora_B))
            for parameter, value in zip((self.lora_A, self.lora_B), initialisation.draw(init, *slots), strict=True):
                sharded.put(parameter, value)
        if self.lora_bias is not None:
            bound = self.r**-0.5 if init is False else 0.0
            drawn = _whole_like(self.lora_bias, torch.promote_types(self.lora_bias.dtype, torch.float32))
            sharded.put(self.lora_bias, nn.init.uniform_(drawn, -bound, bound))
        self._reset_magnitude()

    def _offset(self, bias: Tensor | None, lora_bias: Tensor) -> Tensor:
        """bias + s b_B, (N,), in the wider of their dtypes."""
        return lora_bias * self.scaling if bias is None else torch.add(bias, lora_bias, alpha=self.scaling)

    def _row_norms(self) -> Tensor:
        """‖W + s B A‖ of each row, (N,), in fp32 or better."""
        if sharded.is_sharded(self.base_weight):
            norms: Tensor = sharded.row_norms(self)
            return norms
        return dora.row_norms(self.matrix(self.base_weight), self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.lora_magnitude_vector is not None and not self.weight.is_meta:
            sharded.put(self.lora_magnitude_vector, self._row_norms())

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the merged values."""
        return self._base is not None

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight that the adapter acts beside, as it is stored, merged or not; with PiSSA, the residual."""
        base = self._base
        if base is None:
            return self.weight
        kept: Any = base._parameters["weight"]
        now: Any = kept if base.in_place else self._parameters.get("weight", kept)
        weight: nn.Parameter = now
        return weight

    @property
    def plain_weight(self) -> nn.Parameter:
        """``weight`` if merged; else the base weight as it was given, with what PiSSA or OLoRA took of it put back."""
        return self.weight if self.merged else pissa.plain_weight(self)

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The original bias (N,) or None, merged or not."""
        base, bias = self._base, self._parameters.get("bias", self.bias)
        return bias if base is None or not base.in_place else base._parameters.get("bias", bias)

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's Parameters by name: lora_A, lora_B, and lora_bias and lora_magnitude_vector where they are.

        Of one that is parametrized or pruned, what it is computed from.
        """
        named = self.named_parameters()
        return {name: p for name, p in named if name.removeprefix("parametrizations.").startswith("lora_")}

    @property
    def initial(self) -> dict[str, Tensor]:
        """What PiSSA or OLoRA took of the weight, by name: lora_initial_A and lora_initial_B; else nothing."""
        return {name: buffer for name, buffer in self.named_buffers(recurse=False) if name in pissa.NAMES}

    def merge(self) -> None:
        """Puts W + s B A (DoRA: its rows rescaled), computed in fp32 and rounded once, in the place of ``weight``.

        With ``lora_bias``, bias + s b_B in the place of ``bias`` as well; a layer without one then has one while it is
        merged. The original Parameters are kept, so :meth:`unmerge` is exact and modules tied to them see nothing; the
        cost is one more weight in memory. While merged the layer is its base product alone and dropout does not act;
        ``state_dict()`` and ``named_parameters()`` still give the base weight and the adapters. What the merged values
        were computed from cannot be assigned to until :meth:`unmerge`; assigning the very same Parameter, as
        transformers' ``tie_weights`` does, changes nothing.

        Raises:
            LoRAStateError: merged already, on the meta device, with an activation between A and B, managed by
                ``fully_shard`` (:func:`merge_lora` does those), or the merged values are not finite where the base's
                are; or FSDP1 or ZeRO-3 would not keep the merged values. The layer is left as it was.
        """
        fsdp.check_own(self, "merge")
        storage.check_merging("merge", [("", self)])
        self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        with storage.onloaded(self):
            self._merge_here()

    def _merge_here(self) -> None:
        if self.merged:
            raise LoRAStateError("merge was called on a layer that is merged already. Call unmerge() first.")
        if self.weight.is_meta:
            raise LoRAStateError("merge was called on a layer on the meta device. Load its weights first.")
        self.check_is_lora("merge")
        if "weight" not in self._parameters or "bias" not in self._parameters:
            raise LoRAStateError(
                "merge was called on a layer whose weight or bias is parametrized or pruned, so nothing can be put in "
                "its place. Call torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove "
                "first."
            )
        weight, bias = self._merged_weight(), self._merged_bias()
        _check_finite("weight", weight, self.weight)
        if bias is not None:
            _check_finite("bias", bias, self.bias)
        names = ("weight",) if bias is self.bias else ("weight", "bias")
        offloaded = storage.owner(self) == storage.OFFLOADED
        base = merging.Base(self, names, in_place=offloaded or fsdp.in_place(self))
        if offloaded:  # accelerate's map takes the merged Parameters in the place of these
            merging.exchange(self, weight, bias)
        elif base.in_place:
            fsdp.merge_in_place(self, base, weight, bias)
        else:
            merging.beside(self, base, {"weight": weight, "bias": bias})
        object.__setattr__(self, "_base", base)
        merging.show(self)
        telling.forget(merging.TRAINING)

    def check_is_lora(self, function: str) -> None:
        """Raises ``LoRAStateError`` where an activation stands between A and B: ``function`` needs ``W + s B A``."""
        if self.activation != "identity":
            raise LoRAStateError(
                f"{function} was called on a layer with activation={self.activation!r}: W + s B A does not exist for "
                "an activation, so no weight and none of PEFT's files can hold it. Keep the layer as it is, and its "
                "adapter with lora_state_dict(model)."
            )

    def _merged_weight(self) -> Tensor:
        """The merged weight as it is stored, in its dtype."""
        if sharded.is_sharded(self.weight):
            parts: Tensor = sharded.merged_weight(self)
            return parts
        magnitude = self.lora_magnitude_vector
        norms = None if magnitude is None else self._row_norms()
        base = self.matrix(self.weight)
        merged = dora.merged(base, self.lora_A, self.lora_B, self.scaling, magnitude, norms)
        return self.matrix(merged).contiguous()

    def _merged_bias(self) -> Tensor | None:
        """The bias itself, or with ``lora_bias`` one with s b_B added in fp32."""
        bias: nn.Parameter | None = self.bias
        if self.lora_bias is None:
            return bias
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        offset = self._offset(None if bias is None else bias.to(wide), self.lora_bias.to(wide))
        return offset.to(self.weight.dtype if bias is None else bias.dtype)

    def unmerge(self) -> None:
        """Puts the original weight and bias back, exactly.

        Raises:
            LoRAStateError: the layer is not merged, ``fully_shard`` manages it (:func:`unmerge_lora` does those), or
                FSDP1 or ZeRO-3 would not keep the original values.
        """
        fsdp.check_own(self, "unmerge")
        storage.check_merging("unmerge", [("", self)])
        self._unmerge()

    def _unmerge(self) -> None:
        if self._base is None:
            raise LoRAStateError("unmerge was called on a layer that is not merged. Call merge() first.")
        with storage.onloaded(self):
            weight, bias, in_place = self.base_weight, self.base_bias, self._base.in_place
            object.__setattr__(self, "_base", None)
            if not in_place:
                merging.take_away(self)
            elif storage.owner(self) == storage.OFFLOADED:
                merging.exchange(self, weight, bias)
            else:
                fsdp.unmerge_in_place(self, weight, bias)

    def enable_lora(self: Layer, enabled: bool = True) -> _RestoreEnabled[Layer]:
        """Switches the adapter on or off (then: base output only, merged or not). In a ``with``, for its block only.

        With PiSSA and OLoRA, as in PEFT, that is the output of the residual weight, which lacks the adapter's part.

        Example:
            >>> from lora_kernels import FusedLoRALinear
            >>> layer = FusedLoRALinear(4, 4, r=2)
            >>> with layer.enable_lora(False):
            ...     base = layer(torch.ones(4))
        """
        restore = _RestoreEnabled(self, self._lora_enabled, self._left_off)
        self._lora_enabled, self._left_off = enabled, not enabled
        telling.forget(merging.TRAINING)
        return restore

    def shared_branch(self, x: Tensor) -> tuple[Branch, float] | None:
        """See :class:`~lora_kernels.shared_input.Member`. DoRA with dropout needs two products of W: not in common."""
        p = self.lora_dropout
        plain = all(type(own) in (Tensor, nn.Parameter) for own in self._parameters.values() if own is not None)
        acts = self.training and self._lora_enabled and self._base is None and storage.is_here(self)
        if not acts or not plain or (p > 0.0 and self.use_dora):
            return None
        bias = self.bias if self.lora_bias is None else self._offset(self.bias, self.lora_bias)
        weight, gains = self.matrix(self.weight), self._gains()
        return Branch(weight, self.lora_A, self.lora_B, bias, self.scaling, gains, self.activation), p

    def sharing_state(self) -> tuple[Any, ...]:
        own = (tensor for tensor in self._parameters.values() if tensor is not None)
        tensors = ((id(tensor), tensor._version) for tensor in own)
        return (self.training, self._lora_enabled, self.merged, self.scaling, self.lora_dropout, *tensors)

    def _gains(self) -> Tensor | None:
        """DoRA's magnitude / ‖W + s B A‖ of each row, the norm outside of the graph; None without DoRA."""
        magnitude = self.lora_magnitude_vector
        return None if magnitude is None else dora.gain(magnitude, self._row_norms())

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about."""
        weight = self.weight
        return Problem(weight.device.type, weight.dtype, self.in_features, self.out_features, self.r, self.lora_dropout)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"]
        flags = {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "lora_bias": self.lora_bias is not None}
        flags |= {"merged": self.merged, "disabled": not self._lora_enabled}
        if self.activation != "identity":
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts + [f"{name}=True" for name, value in flags.items() if value])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_shared", None)  # who holds the layers that run together copies them, and joins them again
        if self.merged:
            for name in merging.BUFFERS:
                state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        merging.adopt(self)
        merging.show(self)
        assigning.watch()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in assigning.WATCHED and "lora_B" in self.__dict__.get("_parameters", ()):
            assigning.assign(self, name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Pruning begins with weight_orig; parallelize_module reads layer.weight and registers that, in parts.
        if (former := name.removesuffix("_orig")) in self._parameters:
            assigning.check_removable(self, former)
        super().register_parameter(name, param)

    def requires_grad_(self: Layer, requires_grad: bool = True) -> Layer:
        """As of any module; but transformers, having resized an output layer, means what an ``nn.Linear`` has."""
        if sys._getframe(1).f_code.co_name != "_resize_token_embeddings":
            return super().requires_grad_(requires_grad)
        for parameter in (self.base_weight, self.base_bias):
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
        return self

    def __delattr__(self, name: str) -> None:
        assigning.check_removable(self, name)
        super().__delattr__(name)
        if name == assigning.HOOK:
            merging.follow(self, dispatched=False)

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)
        if self._base is not None and self._base.in_place:
            self._base._apply(fn)
        merging.show(self)
        return self

    def _replicate_for_data_parallel(self: Layer) -> Layer:
        replica: Layer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_shared"] = None  # the members are not the replicas, and lie elsewhere
        for name in merging.BUFFERS if self.merged else ():
            replica.__dict__.pop(name, None)  # the merged values of this layer; the replica gets its own base's here
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is not None and self._base.in_place:
            self._base._save_to_state_dict(destination, prefix, keep_vars)

    def check_rank(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raises ``InvalidArgumentError`` if the adapter under ``prefix`` in ``state_dict`` has another rank."""
        if (own := state_dict.get(prefix + "lora_A")) is not None and own.shape[0] != self.r:
            raise InvalidArgumentError(
                f"the state dict's {prefix}lora_A has rank {own.shape[0]}, and the layer has r={self.r}. Make the "
                f"layer with r={own.shape[0]}, or leave the lora_ keys out and load with strict=False."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_rank(state_dict, prefix)
        merged = self.merged
        if merged:
            storage.check_merging("load_state_dict", [(prefix.rstrip("."), self)])
            self._unmerge()
        plain = pissa.before_loading(self, state_dict, prefix)
        with assigning.allowed(self):
            super()._load_from_state_dict(state_dict, prefix, *args)
        pissa.after_loading(self, state_dict, prefix, plain)
        if prefix + "weight" in state_dict and prefix + "lora_magnitude_vector" not in state_dict:
            self._reset_magnitude()
        if merged:
            self._merge()


def hand_over(former: nn.Module, latter: nn.Module) -> None:
    """Shares ``former``'s hook tables with ``latter``, so that handles on hooks keep working, and copies its mode."""
    latter.training = former.training
    for table in _HOOK_TABLES:
        setattr(latter, table, getattr(former, table))
    latter._is_full_backward_hook = former._is_full_backward_hook


def warn_of_rank(r: int, in_features: int, out_features: int, stacklevel: int) -> None:
    """Warns of a rank that is above both sizes; ``stacklevel`` as if the caller warned itself."""
    features = min(in_features, out_features)
    if r > features:
        warnings.warn(
            f"r={r} is above min(in_features, out_features) = {features}: the adapter costs more than a full update of "
            "the weight and can represent no more. A smaller r does the same.",
            stacklevel=stacklevel + 1,
        )


def _whole_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty plain tensor of ``parameter``'s shape, also where that is sharded."""
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)


def _check_finite(name: str, merged: Tensor, base: Tensor | None) -> None:
    """Raises for merged values that are not finite where the base's are."""
    if sharded.is_finite(merged) or (base is not None and not sharded.is_finite(base)):
        return
    raise LoRAStateError(
        f"merging gives a {name} that is not finite in {merged.dtype}: lora_A or lora_B holds NaN or inf, or the sum "
        "overflows. Nothing was changed; look at the adapters, or merge in a wider dtype."
    )


class _RestoreEnabled(Generic[Layer]):
    """What ``enable_lora`` returns: leaving its ``with`` block puts the former state back."""

    def __init__(self, layer: Layer, enabled: bool, left_off: bool) -> None:
        self._layer, self._former = layer, (enabled, left_off)

    def __enter__(self) -> Layer:
        self._layer._left_off = False
        return self._layer

    def __exit__(self, *exception: object) -> None:
        self._layer._lora_enabled, self._layer._left_off = self._former
