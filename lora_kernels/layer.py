"""``LoRALayer``: all that a linear layer with an adapter has and does.

``nn.py`` has the two layers themselves, which differ in how their weight is stored: (N, K) or (K, N).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import assigning, called, dora, fsdp, initialisation, merging, pissa, sharded, storage, switching, telling
from .branches import Branch, PackedBranch
from .config import AdapterOptions, scaling_of
from .dispatch import Problem
from .errors import InvalidArgumentError, LoRAStateError
from .explaining.report import IN_PARTS, of_packed
from .gate import run_branch, run_frozen, run_packed, run_plain
from .shared_input import NO_OTHERS, SharedInput, known_forward, mark
from .tensors import PLAIN_TENSORS
from .weights import known
from .weights.by_codes import number_of
from .weights.packed import Packed

__all__ = ["LoRALayer", "RestoreEnabled", "names_of_layers"]

Layer = TypeVar("Layer", bound="LoRALayer")
Switched = TypeVar("Switched", bound=nn.Module)  # what else may be switched: experts


class LoRALayer(nn.Module):
    """The adapter of a linear layer: its Parameters, merging, switching it off, saving and loading.

    A subclass has ``weight`` and ``bias``, and says in ``is_transposed`` whether the weight is stored (K, N).
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
    is_transposed: ClassVar[bool] = False
    _left_off: bool = False  # switched off by a call, not for the block of a ``with``
    _called: bool = False  # whether forward ran, and in training with the adapter; see called.py
    _trained: bool = False
    _asks: bool = False  # whether the flag alone does not tell if the adapter acts; see switching.py
    activation: str = "identity"  # of the class too: layers pickled before there were others have none of their own
    _initial_scaling: float | None  # that with which a part of the weight was taken, if one was; see pissa.py
    _base: merging.Base | None  # the base's weight, and bias where that is merged too, while merged; see merging.py
    _shared: tuple[SharedInput, int] | None = None  # the pass in common with layers that read the same x; and the place

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as it is stored, as (N, K), and the other way round: it is its own inverse. No copy."""
        return weight.t() if self.is_transposed else weight

    def to_plain(self) -> nn.Module:
        """A module of the kind that was replaced, around this layer's current weight and bias."""
        raise NotImplementedError

    def add_adapter(self, options: AdapterOptions, draw: bool = True) -> None:
        """Freezes the base and adds the adapter's Parameters; ``draw=False`` leaves them unset."""
        o, r = options, options.r
        packed = known.is_packed(self.weight)
        if packed and initialisation.splits(o.init_lora_weights):
            raise InvalidArgumentError(
                f"init_lora_weights={o.init_lora_weights!r} was given for a layer with a quantized weight: it takes a "
                "part of the weight, and the rest would have to be quantized again. Give True, or start from the "
                "weight before it is quantized."
            )
        if not packed:
            initialisation.check_weight(o.init_lora_weights, r, self.in_features, self.out_features, self.weight)
        self.r, self.lora_alpha, self.lora_dropout = r, o.lora_alpha, o.lora_dropout
        self.use_rslora, self.use_dora, self.init_lora_weights = o.use_rslora, o.use_dora, o.init_lora_weights
        self.scaling, self.activation = scaling_of(r, o.lora_alpha, o.use_rslora), o.activation
        self._lora_enabled = True
        object.__setattr__(self, "_base", None)
        assigning.watch(LoRALayer)
        weight = self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        adapter_dtype = o.adapter_dtype
        if adapter_dtype is None:
            adapter_dtype = weight.dtype if weight.dtype.itemsize > 2 and not packed else torch.float32

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=weight.device, dtype=adapter_dtype))

        self.lora_A = parameter(r, self.in_features)
        self.lora_B = parameter(self.out_features, r)
        self.register_parameter("lora_bias", parameter(self.out_features) if o.lora_bias else None)
        self.register_parameter("lora_magnitude_vector", parameter(self.out_features) if o.use_dora else None)
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
        self.reset_magnitude()

    @property
    def total_bias(self) -> Tensor | None:
        """What is added to y: bias, with ``lora_bias`` bias + s b_B, (N,), in the wider of their dtypes; or None."""
        bias: Tensor | None = self.bias
        return bias if self.lora_bias is None else merging.with_offset(bias, self.lora_bias, self.scaling)

    def branch(self) -> Branch:
        """All that y depends on besides x, dropout and merging; of Parameters that are plain tensors.

        Who has them in parts (:mod:`.sharded`) makes a branch of its own part.
        """
        weight: Any = self.weight
        weight = known.read(self, weight) if known.is_packed(weight, self) else self.matrix(weight)
        return self._branch_of(weight, self.lora_A, self.lora_B, self.total_bias)

    def _branch_of(self, weight: Any, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> Branch:
        gains = None
        if self.use_dora and (magnitude := self.lora_magnitude_vector) is not None:
            gains = dora.gain(magnitude, self.row_norms())  # the norm is no part of a graph
        kind = PackedBranch if type(weight) is Packed else Branch
        return kind(weight, lora_a, lora_b, bias, self.scaling, gains, self.activation)

    @known_forward
    def forward(self, input: Tensor) -> Tensor:
        """y (..., N) in ``input``'s dtype (autocast's under autocast) for ``input`` (..., K); see the class."""
        off = (not self._lora_enabled or self._asks) and not self._is_on()
        if is_compiling():
            if self.training:
                called.note_compiled()
        elif not self._called or (not self._trained and self.training and torch.is_grad_enabled()):
            called.note(self, self._base is None and not off)
        if self._base is not None or off:
            kept, added = merging.acting(self, not off)
            if known.is_packed(kept, self):
                return run_frozen(input, known.read(self, kept), added)
            if not self.is_transposed:
                return F.linear(input, kept, added)
            rows = input.reshape(-1, self.in_features)  # as transformers' Conv1D
            return torch.addmm(added, rows, kept).view(*input.shape[:-1], self.out_features)
        if (
            self._shared is not None
            and self.training
            and (y := self._shared[0].take(self._shared[1], input)) is not None
        ):
            return y
        p = self.lora_dropout if self.training else 0.0
        own: dict[str, Any] = self._parameters  # nn.Module's __getattr__ takes a microsecond a name
        try:
            weight, lora_a, lora_b, bias, lora_bias = (
                own["weight"],
                own["lora_A"],
                own["lora_B"],
                own["bias"],
                own["lora_bias"],
            )
        except KeyError:  # a parametrization or a sharding wrapper has put something else in their place
            weight, lora_a, lora_b, bias, lora_bias = (self.weight, self.lora_A, self.lora_B, self.bias, self.lora_bias)
        if type(weight) not in PLAIN_TENSORS:
            if sharded.is_sharded(weight):
                return sharded.forward(self, input, p)
            if known.is_packed(weight, self):
                if self.use_dora or self.activation != "identity" or is_compiling():
                    return run_branch(input, self.branch(), p)
                bias = self.total_bias if lora_bias is not None else bias
                return run_packed(input, known.read(self, weight), lora_a, lora_b, bias, self.scaling, p)
        if lora_bias is not None:
            bias = merging.with_offset(bias, lora_bias, self.scaling)
        weight = weight.t() if self.is_transposed else weight
        if self.use_dora or self.activation != "identity":
            return run_branch(input, self._branch_of(weight, lora_a, lora_b, bias), p)
        return run_plain(input, weight, lora_a, lora_b, bias, self.scaling, p, None)

    def _is_on(self) -> bool:
        """Whether the adapter is switched on, in this call."""
        flag: bool = self._lora_enabled
        return flag if flag and not self._asks else switching.is_on(self, flag)

    def row_norms(self) -> Tensor:
        """‖W + s B A‖ of each row, (N,), in fp32 or better."""
        if sharded.is_sharded(self.base_weight):
            norms: Tensor = sharded.row_norms(self)
            return norms
        return dora.row_norms(self._base_values(), self.lora_A, self.lora_B, self.scaling)

    def _base_values(self) -> Tensor:
        """The base weight's values (N, K): of a packed one, made now."""
        weight = self.base_weight
        return known.read(self, weight).dequantize() if known.is_packed(weight, self) else self.matrix(weight)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        if self.lora_magnitude_vector is not None and not self.weight.is_meta:
            sharded.put(self.lora_magnitude_vector, self.row_norms())

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

    def merge(self, quantize: bool = False) -> None:
        """Puts W + s B A (DoRA: its rows rescaled), computed in fp32 and rounded once, in the place of ``weight``.

        With ``lora_bias``, bias + s b_B in the place of ``bias`` as well; a layer without one then has one while it is
        merged. The original Parameters are kept, so :meth:`unmerge` is exact and modules tied to them see nothing; the
        cost is one more weight in memory. While merged the layer is its base product alone and dropout does not act;
        ``state_dict()`` and ``named_parameters()`` still give the base weight and the adapters. What the merged values
        were computed from cannot be assigned to until :meth:`unmerge`; assigning the very same Parameter, as
        transformers' ``tie_weights`` does, changes nothing.

        A quantised weight is merged only with ``quantize=True``: W + s B A is quantised again, with the same settings.
        :attr:`merge_error` then says how far that is from W + s B A. The original packed tensors are kept.

        Args:
            quantize: quantise the merged values again where the weight is quantised; of other weights it says nothing.

        Raises:
            LoRAStateError: a quantised weight without ``quantize=True``; merged already, on the meta device,
                with an activation between A and B, managed by
                ``fully_shard`` (:func:`merge_lora` does those), or the merged values are not finite where the base's
                are; or FSDP1 or ZeRO-3 would not keep the merged values. The layer is left as it was.
        """
        fsdp.check_own(self, "merge")
        storage.check_merging("merge", [("", self)])
        merging.merge(self, quantize)

    @property
    def merge_error(self) -> float | None:
        """‖Q(W + s B A) - (W + s B A)‖ / ‖W + s B A‖ of a merged weight that was quantised again; None of others."""
        base = merging.base_of(self)
        return None if base is None else getattr(base, "error", None)

    def check_is_lora(self, function: str) -> None:
        """Raises ``LoRAStateError`` where an activation stands between A and B: ``function`` needs ``W + s B A``."""
        if self.activation != "identity":
            raise LoRAStateError(
                f"{function} was called on a layer with activation={self.activation!r}: W + s B A does not exist for "
                "an activation, so no weight and none of PEFT's files can hold it. Keep the layer as it is, and its "
                "adapter with lora_state_dict(model)."
            )

    def unmerge(self) -> None:
        """Puts the original weight and bias back, exactly.

        Raises:
            LoRAStateError: the layer is not merged, ``fully_shard`` manages it (:func:`unmerge_lora` does those), or
                FSDP1 or ZeRO-3 would not keep the original values.
        """
        fsdp.check_own(self, "unmerge")
        storage.check_merging("unmerge", [("", self)])
        merging.unmerge(self)

    def enable_lora(self: Layer, enabled: bool = True) -> RestoreEnabled[Layer]:
        """Switches the adapter on or off (then: base output only, merged or not). In a ``with``, for its block only.

        With PiSSA and OLoRA, as in PEFT, that is the output of the residual weight, which lacks the adapter's part.

        Example:
            >>> import torch
            >>> from lora_kernels import FusedLoRALinear
            >>> layer = FusedLoRALinear(4, 4, r=2)
            >>> with layer.enable_lora(False):
            ...     base = layer(torch.ones(4))
        """
        restore = RestoreEnabled(self, self._lora_enabled, self._left_off)
        self._lora_enabled, self._left_off = enabled, not enabled
        telling.forget(merging.TRAINING)
        return restore

    def shared_branch(self, x: Tensor) -> tuple[Branch, float] | None:
        """See :class:`~lora_kernels.shared_input.Member`. DoRA with dropout needs two products of W: not in common."""
        if (branch := self._plain_branch()) is not None:
            return branch, self.lora_dropout
        return None if self.why_alone(x) is not None else (self.branch(), self.lora_dropout)

    def _plain_branch(self) -> Branch | None:
        """``branch()`` in the least host time, of a layer that nothing can keep alone: its Parameters as they are. None
        where it has to be looked at closer."""
        own: dict[str, Any] = self._parameters
        try:
            weight, lora_a, lora_b, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
            others = own["lora_bias"] is not None or own["lora_magnitude_vector"] is not None
        except KeyError:  # as in forward
            return None
        if others or self.is_transposed or self._base is not None or not self._lora_enabled or self._asks:
            return None
        kind = nn.Parameter
        held = type(weight) is type(lora_a) is type(lora_b) is kind and (bias is None or type(bias) is kind)
        if not held or not self.training or weight.is_meta or not weight.dim() == lora_a.dim() == lora_b.dim() == 2:
            return None
        return Branch(weight, lora_a, lora_b, bias, self.scaling, None, self.activation)

    def why_alone(self, x: Tensor | None) -> str | None:
        """Why it cannot run in a pass with other layers now, in a clause; None: it can."""
        if not self.training:
            return "it is in evaluation"
        if self._base is not None or not self._is_on():
            return f"its adapter is {'off' if self._base is None else 'merged'}"
        owned = [own for own in self._parameters.values() if own is not None]
        if not all(type(own) in PLAIN_TENSORS or known.is_packed(own) for own in owned):
            return "its Parameters are no plain tensors"
        if not storage.is_here(self, self.weight, self.lora_A, self.lora_B):
            return "its values are elsewhere"
        if self.lora_dropout == 0.0:
            return None
        if self.use_dora:
            return "DoRA with dropout takes two products"
        if x is None or not known.is_packed(self.weight):
            return None
        # Dropout's state is drawn for x as it is multiplied.
        other = known.compute_dtype(self, self.weight) not in (None, x.dtype)
        return "x is multiplied in another dtype" if other else None

    def note_pass(self) -> None:
        """Notes that it ran in a pass with others, its adapter acting, as its own call would."""
        if is_compiling():
            called.note_compiled()
        elif not self._called or not self._trained:
            called.note(self, True)

    def sharing_state(self) -> tuple[Any, ...]:
        # A parametrization is a module, and its result depends on what it reads.
        held = self.parameters() if self._modules else self._parameters.values()
        tensors = (mark(tensor) for tensor in held if tensor is not None)
        of_call = (self.training, self._is_on(), self.merged, self.scaling, self.lora_dropout, self.activation)
        return (*of_call, *tensors)

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about."""
        weight, sizes = self.weight, (self.in_features, self.out_features, self.r)
        if known.is_packed(weight):
            packed = known.read(self, weight)
            dtype, codes = packed.dtype or self.lora_A.dtype, number_of(packed.layout)
            return Problem(weight.device.type, dtype, *sizes, self.lora_dropout, False, self._aside(), codes=codes)
        transposed = weight.dim() == 2 and self.matrix(weight) is not weight
        aside, others = self._aside(), NO_OTHERS
        if not aside and self._shared is not None:
            shared, index = self._shared
            aside, others = shared.told(index)
        return Problem(weight.device.type, weight.dtype, *sizes, self.lora_dropout, transposed, aside, others)

    def _aside(self) -> str:
        """What makes forward another than that of a plain layer in training, in a sentence."""
        if self.merged or not self._lora_enabled:
            state, base = "merged" if self.merged else "off", self.weight
            told = f" {of_packed(known.read(self, base).kernels)}" if known.is_packed(base) else ""
            return f"The adapter is {state}: forward is the product by W alone, without a plan.{told}"
        if sharded.is_sharded(self.weight):
            return "The Parameters are sharded: each process runs the plan of its own part of the sizes."
        if known.is_packed(self.weight):
            return f"{IN_PARTS} {of_packed(known.read(self, self.weight).kernels)}"
        if self.use_dora or self.activation != "identity":
            return IN_PARTS
        if self._shared is not None:
            return ""  # it tells itself
        return "" if self.training or not self.lora_dropout else "In eval, as it is now, nothing is dropped."

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
        return state if self.merge_error is None else merging.to_merge_again(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        again = state.pop(merging.AGAIN, False)
        super().__setstate__(state)
        known.recover(self)
        merging.adopt(self)
        merging.show(self)
        assigning.watch(LoRALayer)
        if again:
            merging.merge(self, quantize=True)

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
        with merging.aside(self):
            super()._apply(fn, recurse)
            known.recover(self)
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
        shown = self.__dict__.pop("weight", None)  # packages read the statistics of self.weight: the base's are meant
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            if shown is not None:
                self.__dict__["weight"] = shown
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
        merged, quantize = self.merged, self.merge_error is not None
        if merged:
            storage.check_merging("load_state_dict", [(prefix.rstrip("."), self)])
            merging.unmerge(self)
        plain = pissa.before_loading(self, state_dict, prefix)
        with assigning.allowed(self):
            super()._load_from_state_dict(state_dict, prefix, *args)
        known.recover(self)
        self._load_packed(state_dict, prefix, *args)
        pissa.after_loading(self, state_dict, prefix, plain)
        if prefix + "weight" in state_dict and prefix + "lora_magnitude_vector" not in state_dict:
            self.reset_magnitude()
        if merged:
            merging.merge(self, quantize)

    def _load_packed(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """What belongs to a packed weight in ``state_dict``, beside its own tensor."""
        weight: Any = self._parameters.get("weight")
        if (form := known.form_of(weight)) is not None and prefix + "weight" in state_dict:
            unexpected = args[3]
            taken = form.load(self, weight, state_dict, prefix)
            unexpected[:] = [key for key in unexpected if key not in taken]


def _whole_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty plain tensor of ``parameter``'s shape, also where that is sharded."""
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)


class RestoreEnabled(Generic[Switched]):
    """What ``enable_lora`` returns: leaving its ``with`` block puts the former state back."""

    def __init__(self, layer: Switched, enabled: bool, left_off: bool) -> None:
        self._layer, self._former = layer, (enabled, left_off)
        self._blocks: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Switched:
        layer: Any = self._layer
        enabled, layer._left_off = self._former
        self._blocks.append(switching.switched([layer], layer._lora_enabled, before=enabled))
        self._blocks[-1].__enter__()
        return self._layer

    def __exit__(self, *exception: object) -> None:
        self._blocks.pop().__exit__(None, None, None)


@cache
def names_of_layers() -> frozenset[str]:
    """What a LoRA layer calls its own, beside what any ``nn.Linear`` has; no class with such a name can become one."""
    layer = LoRALayer()
    layer.in_features = layer.out_features = 1
    layer.register_parameter("weight", nn.Parameter(torch.empty(1, 1, device="meta")))
    layer.register_parameter("bias", None)
    layer.add_adapter(AdapterOptions(1, 1.0))
    held = {*dir(LoRALayer), *vars(layer), *layer._parameters, *layer._buffers, *merging.BUFFERS.values()}
    plain = {*dir(nn.Linear), *vars(nn.Module()), "in_features", "out_features", "weight", "bias"}
    return frozenset(name for name in held - plain if not name.startswith("__"))
