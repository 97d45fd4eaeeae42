"""``FusedLoRALinear``: an ``nn.Linear`` with a low-rank adapter, run by the fused operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import check_hyperparameters, scaling_of
from .dispatch import COMPUTE_DTYPES, Problem
from .errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from .functional import apply

__all__ = ["FusedLoRALinear", "why_not_replaceable"]

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_NORM_ROWS = 1024  # rows of W that are held in fp32 at once while DoRA's norms are computed


class FusedLoRALinear(nn.Linear):
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
        init_lora_weights: True, ``"gaussian"`` or False; see :class:`~lora_kernels.LoRAConfig`.
        adapter_dtype: dtype of the adapters; None is fp32 over a 16-bit base and the base's dtype otherwise.
        device, dtype: of the frozen weight and bias, as for ``nn.Linear``.

    Attributes:
        weight: (N, K), frozen. bias: (N,) or None, frozen.
        lora_A: (R, K), trainable. lora_B: (N, R), trainable, zero at first.
        lora_magnitude_vector: (N,), trainable; None without DoRA.
        scaling: s, a float that may be set.

    Raises:
        InvalidArgumentError: a rank, alpha, dropout or initialisation that is not allowed.
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
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    _base_weight: nn.Parameter | None  # the original, kept aside while merged; no registered Parameter

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
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)
        if (dtype or torch.get_default_dtype()) not in COMPUTE_DTYPES:
            raise InvalidTypeError(f"dtype={dtype} was given: it must be torch.float16, bfloat16, float32 or float64.")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, adapter_dtype)

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
    ) -> FusedLoRALinear:
        """A layer around ``linear``'s own Parameters: nothing is copied, and they are frozen.

        ``training``, device, dtype and hooks are carried over (handles of hooks keep working). Arguments as for the
        class.

        Raises:
            InvalidArgumentError: as for the class.
            InvalidTypeError: ``linear`` is not a plain ``nn.Linear`` with an ordinary floating weight; the sentence
                says why.
            LoRAStateError: ``linear`` is a ``FusedLoRALinear`` already.

        Example:
            >>> from torch import nn
            >>> linear = nn.Linear(8, 4)
            >>> FusedLoRALinear.from_linear(linear, r=2).weight is linear.weight
            True
        """
        check_hyperparameters(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)
        if isinstance(linear, FusedLoRALinear):
            raise LoRAStateError(
                "the layer given to from_linear is a FusedLoRALinear already. Set its parameters, or call "
                "restore_linear on the model first."
            )
        if reason := why_not_replaceable(linear):
            raise InvalidTypeError(reason)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.register_parameter("weight", linear._parameters["weight"])
        layer.register_parameter("bias", linear.bias)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, adapter_dtype)
        layer._take_over(linear)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` around this layer's current weight (merged if merged, base otherwise) and bias."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        FusedLoRALinear._take_over(linear, self)
        return linear

    def _take_over(self: nn.Linear, other: nn.Linear) -> None:
        """Shares ``other``'s hook tables, so that handles on its hooks keep working, and copies its mode."""
        self.training = other.training
        for table in _HOOK_TABLES:
            setattr(self, table, getattr(other, table))
        self._is_full_backward_hook = other._is_full_backward_hook

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
        init_lora_weights: bool | str,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        features = min(self.in_features, self.out_features)
        if r > features:
            warnings.warn(
                f"r={r} is above min(in_features, out_features) = {features}: the adapter costs more than a full "
                "update of the weight and can represent no more. A smaller r does the same.",
                stacklevel=3,
            )
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.use_dora, self.init_lora_weights = use_rslora, use_dora, init_lora_weights
        self.scaling = scaling_of(r, lora_alpha, use_rslora)
        self._lora_enabled = True
        object.__setattr__(self, "_base_weight", None)
        weight = self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), device=weight.device, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), device=weight.device, dtype=adapter_dtype))
        magnitude = torch.empty(self.out_features, device=weight.device, dtype=adapter_dtype) if use_dora else None
        self.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws lora_A (and lora_B where ``init_lora_weights=False``) anew, zeroes lora_B, sets DoRA's magnitudes.

        Values are drawn in fp32 and rounded to the adapters' dtype, as PEFT does. On the meta device nothing happens:
        call it after ``to_empty``.

        Raises:
            LoRAStateError: the layer is merged.
        """
        if self.merged:
            raise LoRAStateError("reset_lora_parameters was called on a merged layer. Call unmerge() first.")
        if self.lora_A.is_meta:
            return
        drawn = torch.empty_like(self.lora_A, dtype=torch.promote_types(self.lora_A.dtype, torch.float32))
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(drawn, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        self.lora_A.copy_(drawn)
        if self.init_lora_weights is False:
            drawn = torch.empty_like(self.lora_B, dtype=drawn.dtype)
            self.lora_B.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
        else:
            self.lora_B.zero_()
        self._reset_magnitude()

    def forward(self, input: Tensor) -> Tensor:
        """y (..., N) in ``input``'s dtype (autocast's under autocast) for ``input`` (..., K); see the class."""
        if self._base_weight is not None or not self._lora_enabled:
            return F.linear(input, self.weight if self._lora_enabled else self.base_weight, self.bias)
        p = self.lora_dropout if self.training else 0.0
        if self.use_dora:
            return self._forward_dora(input, p)
        own: dict[str, Any] = self._parameters  # nn.Module's __getattr__ takes a microsecond a name
        try:
            weight, lora_a, lora_b, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        except KeyError:  # a parametrization or a sharding wrapper has put something else in their place
            weight, lora_a, lora_b, bias = self.weight, self.lora_A, self.lora_B, self.bias
        return apply(input, weight, lora_a, lora_b, bias, self.scaling, p, None)

    def _forward_dora(self, x: Tensor, p: float) -> Tensor:
        """y = g * (x Wᵀ + s h Bᵀ) + bias, g = magnitude / ‖W + s B A‖ by rows, the norm outside the graph.

        With dropout, as in PEFT: x Wᵀ + bias keeps the whole x, and what the adapter changes sees the dropped one.
        """
        magnitude = self.lora_magnitude_vector
        assert magnitude is not None
        gain = magnitude / _nonzero(self._row_norms().to(magnitude.dtype))
        dropped = F.dropout(x, p) if p > 0.0 else x
        adapted = apply(dropped, self.weight, self.lora_A, self.lora_B, None, self.scaling, 0.0, None)
        y = adapted * gain
        if p > 0.0:
            y = y + F.linear(x - dropped, self.weight, self.bias)
        elif self.bias is not None:
            y = y + self.bias
        return y.to(adapted.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + s B A‖ of each row, (N,), in fp32 or better, holding no more than ``_NORM_ROWS`` rows at once."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.cat(
            [
                torch.linalg.vector_norm(self._adapted(rows, dtype), dim=1)
                for rows in torch.arange(self.out_features, device=self.weight.device).split(_NORM_ROWS)
            ]
        )

    def _adapted(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows of W + s B A in ``dtype``, under autocast too."""
        device = self.weight.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # meta knows no autocast
            low_rank = self.lora_B[rows].to(dtype) @ self.lora_A.to(dtype)
        return torch.add(self.base_weight[rows].to(dtype), low_rank, alpha=self.scaling)

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.lora_magnitude_vector is not None and not self.weight.is_meta:
            self.lora_magnitude_vector.copy_(self._row_norms())

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the merged values."""
        return self._base_weight is not None

    @property
    def base_weight(self) -> nn.Parameter:
        """The original, frozen weight (N, K), merged or not."""
        return self.weight if self._base_weight is None else self._base_weight

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's Parameters by name: lora_A, lora_B and, with DoRA, lora_magnitude_vector."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("lora_")}

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W + s B A (DoRA: its rows rescaled), computed in fp32 and rounded once, in the place of ``weight``.

        The original Parameter is kept aside, so :meth:`unmerge` is exact and modules tied to it see nothing; the cost
        is one more weight in memory. While merged the layer is its base product alone and dropout does not act;
        ``state_dict()`` still gives the base weight and the adapters.

        Raises:
            LoRAStateError: merged already, on the meta device, or the merged values are not finite where the base's
                are; the layer is left as it was.
        """
        if self.merged:
            raise LoRAStateError("merge was called on a layer that is merged already. Call unmerge() first.")
        if self.weight.is_meta:
            raise LoRAStateError("merge was called on a layer on the meta device. Load its weights first.")
        merged = self._adapted(slice(None), torch.promote_types(self.weight.dtype, torch.float32))
        if self.lora_magnitude_vector is not None:
            merged *= (self.lora_magnitude_vector.to(merged.dtype) / _nonzero(self._row_norms())).unsqueeze(1)
        merged = merged.to(self.weight.dtype)
        if not bool(torch.isfinite(merged).all()) and bool(torch.isfinite(self.weight).all()):
            raise LoRAStateError(
                f"merging gives weights that are not finite in {self.weight.dtype}: lora_A or lora_B holds NaN or inf, "
                "or the sum overflows. Nothing was changed; look at the adapters, or merge in a wider dtype."
            )
        object.__setattr__(self, "_base_weight", self.weight)
        self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Puts the original weight back, exactly.

        Raises:
            LoRAStateError: the layer is not merged.
        """
        if self._base_weight is None:
            raise LoRAStateError("unmerge was called on a layer that is not merged. Call merge() first.")
        self.weight = self._base_weight
        object.__setattr__(self, "_base_weight", None)

    def enable_lora(self, enabled: bool = True) -> _RestoreEnabled:
        """Switches the adapter on or off (then: base output only, merged or not). In a ``with``, for its block only.

        Example:
            >>> layer = FusedLoRALinear(4, 4, r=2)
            >>> with layer.enable_lora(False):
            ...     base = layer(torch.ones(4))
        """
        restore = _RestoreEnabled(self, self._lora_enabled)
        self._lora_enabled = enabled
        return restore

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about."""
        weight = self.weight
        return Problem(weight.device.type, weight.dtype, self.in_features, self.out_features, self.r, self.lora_dropout)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"]
        flags = {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "merged": self.merged}
        flags["disabled"] = not self._lora_enabled
        return ", ".join(parts + [f"{name}=True" for name, value in flags.items() if value])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRALinear:
        super()._apply(fn, recurse)
        if self._base_weight is not None:
            aside = nn.Module()
            aside.weight = self._base_weight
            object.__setattr__(self, "_base_weight", aside._apply(fn).weight)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight if keep_vars else self._base_weight.detach()

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
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and prefix + "lora_magnitude_vector" not in state_dict:
            self._reset_magnitude()
        if merged:
            self.merge()


def _nonzero(norms: Tensor) -> Tensor:
    """``norms`` with 1 for 0: a row of zeros has no direction to scale, and stays zero where 0 / 0 would be NaN."""
    return norms.masked_fill(norms == 0, 1.0)


class _RestoreEnabled:
    """What ``enable_lora`` returns: leaving its ``with`` block puts the former state back."""

    def __init__(self, layer: FusedLoRALinear, former: bool) -> None:
        self._layer, self._former = layer, former

    def __enter__(self) -> FusedLoRALinear:
        return self._layer

    def __exit__(self, *exception: object) -> None:
        self._layer._lora_enabled = self._former


def why_not_replaceable(module: nn.Module) -> str | None:
    """A sentence that says why ``module`` cannot become a ``FusedLoRALinear``, or None if it can."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return f"{kind} has parametrized weights: call torch.nn.utils.parametrize.remove_parametrizations first."
    if type(module) is not nn.Linear:
        return (
            f"{kind} is not a plain torch.nn.Linear, and its own behaviour would be lost. Replace it with an nn.Linear "
            "first, or exclude it."
        )
    if "forward" in vars(module):
        return (
            f"{kind} has a forward of its own on the instance (accelerate's offloading does that), and it would be "
            "lost. Remove it first, with accelerate.hooks.remove_hook_from_module for example."
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{kind} computes its weight by a hook (weight_norm, spectral_norm, pruning): remove that first."
    if not weight.dtype.is_floating_point or weight.dtype not in COMPUTE_DTYPES or _is_quantized(weight):
        return (
            f"{kind} has a quantized weight ({type(weight.data).__name__}, {weight.dtype}): only fp16, bf16, fp32 and "
            "fp64 weights are supported. Dequantize it first."
        )
    if type(weight.data).__name__ == "DTensor":
        return f"{kind} has a sharded weight (DTensor): replace it first, then call parallelize_module or fully_shard."
    if weight.dim() != 2 or weight.shape != (module.out_features, module.in_features):
        return (
            f"{kind} has a weight of shape {tuple(weight.shape)} where ({module.out_features}, {module.in_features}) "
            "is expected: it is sharded, packed or not initialised. Materialise it first."
        )
    return None


def _is_quantized(weight: Tensor) -> bool:
    """Tensor subclasses that are not plain storage (torchao and others) hold something else than their dtype says."""
    inner = weight.data
    return (
        weight.is_quantized
        or (type(inner) not in (Tensor, nn.Parameter) and hasattr(inner, "dequantize_weight"))
        or (type(inner).__module__.startswith(("torchao", "bitsandbytes")))
    )
