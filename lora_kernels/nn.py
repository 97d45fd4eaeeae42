"""``FusedLoRALinear``: an ``nn.Linear`` with a low-rank adapter, run by the fused operators; and GPT-2's ``Conv1D``."""

from __future__ import annotations

import types
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from . import storage
from .assigning import check_restorable
from .config import AdapterOptions
from .dispatch import COMPUTE_DTYPES
from .errors import InvalidTypeError, LoRAStateError
from .layer import LoRALayer, names_of_layers
from .replaceable import is_conv1d, not_linear, own_state, plain_kind, why_not_replaceable
from .shared_input import known_forward
from .weights import known

__all__ = ["FusedLoRAConv1D", "FusedLoRALinear"]

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
M = TypeVar("M", bound=nn.Module)
_KINDS: dict[tuple[type, type], type[Any]] = {}  # the classes of LoRA layers that stand for subclasses
_STATE_HOOK_TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class FusedLoRALinear(LoRALayer, nn.Linear):
    r"""A frozen linear layer with a trainable low-rank adapter, as one fused product.

    .. math:: y = x W^\top + b + s\,(\mathrm{drop}_p(x) A^\top) B^\top, \quad s = \alpha / r

    It is an ``nn.Linear``: ``isinstance`` holds, a plain ``nn.Linear`` state dict loads into it, inputs may have one to
    many dimensions. Source: Hu et al., "LoRA" (2021), eq. 3; DoRA: Liu et al. (2024), eq. 5, with PEFT's semantics.

    Args:
        in_features: K.
        out_features: N.
        r: rank R >= 1. A rank above min(K, N) warns once: it costs more than a full update and can say no more.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability p in [0, 1) of dropping an element of the branch's input, while training.
        bias: whether the frozen layer has a bias.
        use_rslora: ``s = lora_alpha / sqrt(r)``.
        use_dora: y's linear part is rescaled row-wise to the trainable ``lora_magnitude_vector``.
        init_lora_weights: how the adapters start: True, ``"pissa"`` and others; see
            :class:`~lora_kernels.LoRAConfig`.
        adapter_dtype: dtype of the adapters; None is fp32 over a 16-bit base and the base's dtype otherwise.
        device, dtype: of the frozen weight and bias, as for ``nn.Linear``.
        lora_bias: whether the branch has a bias b_B of its own, which adds ``s b_B`` to y; not with ``use_dora``.
        activation: σ in ``s B σ(A x)``, the parallel adapter of He et al. (2022): ``"identity"`` (LoRA), ``"relu"``,
            ``"gelu"`` or ``"silu"``; see :class:`~lora_kernels.LoRAConfig`.

    Attributes:
        weight: (N, K), frozen. bias: (N,) or None, frozen.
        lora_A: (R, K), trainable. lora_B: (N, R), trainable, zero at first.
        lora_bias: b_B (N,), trainable, zero at first; None without ``lora_bias``.
        lora_magnitude_vector: (N,), trainable; None without DoRA.
        scaling: s, a float that may be set.

    Raises:
        InvalidArgumentError: a rank, alpha, dropout, initialisation or activation that is not allowed.
        InvalidTypeError: a dtype that is not floating.

    Example:
        >>> import torch
        >>> from lora_kernels import FusedLoRALinear
        >>> layer = FusedLoRALinear(16, 32, r=4, lora_alpha=8)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 32])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
    """

    weight: nn.Parameter
    _plain_class: ClassVar[type[nn.Linear]] = nn.Linear  # of what the layer stands for

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        lora_bias: bool = False,
        activation: str = "identity",
    ) -> None:
        of_layer = r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, adapter_dtype, lora_bias
        options = AdapterOptions(*of_layer, activation)
        options.check()
        if (dtype or torch.get_default_dtype()) not in COMPUTE_DTYPES:
            raise InvalidTypeError(f"dtype={dtype} was given: it must be torch.float16, bfloat16, float32 or float64.")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        warn_of_rank(options.r, in_features, out_features, stacklevel=2)
        self.add_adapter(options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        lora_bias: bool = False,
        activation: str = "identity",
    ) -> FusedLoRALinear:
        """A layer around ``linear``'s own Parameters: nothing is copied, and they are frozen.

        With PiSSA and OLoRA the layer's weight is a Parameter of its own, and ``linear``'s keeps its values.
        ``training``, device, dtype and hooks are carried over (handles of hooks keep working). Arguments as for the
        class.

        Raises:
            InvalidArgumentError: as for the class.
            InvalidTypeError: ``linear`` is neither a plain ``nn.Linear`` with an ordinary floating weight nor a
                quantised layer that ``docs/qlora.md`` lists; the sentence says why.
            LoRAStateError: ``linear`` is a ``FusedLoRALinear`` already.

        Example:
            >>> from lora_kernels import FusedLoRALinear
            >>> from torch import nn
            >>> linear = nn.Linear(8, 4)
            >>> FusedLoRALinear.from_linear(linear, r=2).weight is linear.weight
            True
        """
        given: Any = linear
        if not isinstance(given, (nn.Linear, LoRALayer)) and not is_conv1d(given):
            raise InvalidTypeError(_not_linear(given))
        if is_conv1d(linear):
            raise InvalidTypeError(
                "a transformers Conv1D was given to from_linear, which takes an nn.Linear: FusedLoRALinear stores its "
                "weight the other way round. Call replace_linear on the model that holds it."
            )
        of_layer = r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, adapter_dtype, lora_bias
        layer = around(linear, AdapterOptions(*of_layer, activation), kind=cls)
        assert isinstance(layer, cls)
        warn_of_rank(layer.r, layer.in_features, layer.out_features, stacklevel=2)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` around this layer's current weight (merged if merged, base otherwise) and bias.

        A layer that was made around a subclass of ``nn.Linear`` gives one of that class, with its attributes.

        Raises:
            LoRAStateError: FSDP1, ZeRO-3 or accelerate's offloading holds the layer's values; or the weight or bias is
                parametrized or pruned.
        """
        storage.check_free("to_linear", [("", self)])
        check_restorable("to_linear", [("", self)])
        linear = _blank(self._plain_class)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.register_parameter("weight", self.plain_weight)
        linear.register_parameter("bias", self.bias)
        if self._plain_class is not nn.Linear:
            _hand_over_own(self, linear)
        if (form := known.form_of(linear._parameters["weight"])) is not None:
            form.settle(linear)
        hand_over(self, linear)
        return linear

    def to_plain(self) -> nn.Linear:
        return self.to_linear()


class FusedLoRAConv1D(LoRALayer):
    """transformers' ``Conv1D`` (GPT-2's linear layer, its weight stored (K, N)) with an adapter; the same product.

    It is made by :func:`lora_kernels.replace_linear` around the layer's own Parameters: nothing is copied or turned,
    names and shapes in a state dict stay. ``nf`` is N and ``nx`` is K; all else is as in ``FusedLoRALinear``.
    """

    nf: int
    nx: int
    is_transposed = True
    _plain_class: type[Any]  # of what the layer stands for

    def to_plain(self) -> nn.Module:
        check_restorable("to_plain", [("", self)])
        kind: type[Any] = self._plain_class
        conv: Any = _blank(kind)
        conv.nf, conv.nx, conv.weight, conv.bias = self.nf, self.nx, self.plain_weight, self.bias
        if kind is not plain_kind(kind):
            _hand_over_own(self, conv)
        hand_over(self, conv)
        restored: nn.Module = conv
        return restored

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # Conv1D's own, which a subclass brings, tells of no adapter

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr().removeprefix(', ')}"

    @known_forward
    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) for x (..., K)."""
        return super().forward(x)


def _not_linear(given: Any) -> str:
    """What is said of something that is no linear layer at all."""
    if isinstance(given, nn.Module) and hasattr(given, "in_features"):  # a quantised one, of a package's own class
        return why_not_replaceable(given) or f"{not_linear(given)}."
    given_as = f"an object of type {type(given).__name__} was given to from_linear, which takes an nn.Linear"
    return f"{given_as}: {not_linear(given)}." if isinstance(given, nn.Module) else f"{given_as}."


def around(
    module: nn.Module, options: AdapterOptions, draw: bool = True, kind: type[FusedLoRALinear] = FusedLoRALinear
) -> LoRALayer:
    """The LoRA layer for ``module``, an ``nn.Linear`` or ``Conv1D``, around its own Parameters.

    ``draw=False`` leaves the adapter's values unset; an ``nn.Linear`` becomes a ``kind``. Errors as for
    ``FusedLoRALinear.from_linear``.
    """
    options.check()
    if isinstance(module, LoRALayer):
        raise LoRAStateError(
            "the layer given to from_linear is a FusedLoRALinear already. Set its parameters, or call "
            "restore_linear on the model first."
        )
    if reason := why_not_replaceable(module):
        raise InvalidTypeError(reason)
    given: Any = module
    if (form := known.form_of_module(module)) is not None:
        form.prepare(module)
    turned, is_plain = is_conv1d(module), type(module) is plain_kind(type(module))
    layer: Any = _blank(_kind_for(FusedLoRAConv1D if turned else kind, type(module)))
    if turned:
        layer.in_features, layer.out_features = layer.nx, layer.nf = given.nx, given.nf
    else:
        layer.in_features, layer.out_features = given.in_features, given.out_features
    if turned and is_plain:
        layer._plain_class = type(module)
    layer.register_parameter("weight", module._parameters["weight"])
    layer.register_parameter("bias", module._parameters["bias"])
    if not is_plain:
        _hand_over_own(module, layer)
    layer.add_adapter(options, draw)
    hand_over(module, layer)
    made: LoRALayer = layer
    return made


def _kind_for(kind: type[LoRALayer], plain: type[nn.Module]) -> type[LoRALayer]:
    """The class of the LoRA layer for a ``plain``: of a subclass of ``nn.Linear``, one that derives from it too.

    So ``isinstance`` holds, and what the subclass defines beside the computation stays. So it is with ``Conv1D``'s.
    """
    if plain is plain_kind(plain):
        return kind
    if (kind, plain) in _KINDS:
        return _KINDS[kind, plain]

    def rebuilt(layer: LoRALayer, protocol: Any) -> tuple[Any, ...]:
        return _blank_for, (kind, plain), layer.__getstate__()  # a pickle finds no class that was made here by its name

    # FSDP2 gathers a quantised weight as a plain Parameter, whose bytes are no values: ``recover`` looks for one.

    def gathered(layer: Any, input: Tensor) -> Tensor:
        known.recover(layer)
        y: Tensor = kind.forward(layer, input)
        return y

    def shared_branch(layer: Any, x: Tensor) -> Any:
        known.recover(layer)
        return kind.shared_branch(layer, x)

    body: dict[str, Any] = {"_plain_class": plain, "__module__": plain.__module__, "__reduce_ex__": rebuilt}
    if known.is_of_package(plain):
        body |= {"forward": known_forward(gathered), "shared_branch": shared_branch}
    made = types.new_class(f"FusedLoRA{plain.__name__}", (kind, plain), {}, lambda names: names.update(body))
    return _KINDS.setdefault((kind, plain), made)


def _blank_for(kind: type[LoRALayer], plain: type[nn.Module]) -> nn.Module:
    return _blank(_kind_for(kind, plain))


def _blank(kind: type[M]) -> M:
    """A ``kind`` without anything in it."""
    module = nn.Module.__new__(kind)
    nn.Module.__init__(module)
    return module


def _hand_over_own(former: nn.Module, latter: nn.Module) -> None:
    """Gives ``latter`` what ``former`` has beside a linear layer's and an adapter's state: its subclass's own."""
    kept = own_state(former).keys() - names_of_layers() - {"in_features", "out_features"}
    for table in ("_parameters", "_buffers", "_modules"):
        vars(latter)[table].update((k, v) for k, v in vars(former)[table].items() if k in kept)
    latter._non_persistent_buffers_set |= former._non_persistent_buffers_set & kept
    vars(latter).update((name, value) for name, value in vars(former).items() if name in kept)
    for table in _STATE_HOOK_TABLES:
        setattr(latter, table, getattr(former, table))


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
