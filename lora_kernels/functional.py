"""``lora_linear``: validation, autocast, dropout's draw and the choice of backend; then one call into autograd."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import LoRALinearFunction, apply_function, flatten, forward_only
from .dispatch import COMPUTE_DTYPES, backend, select
from .errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsError, UnsupportedTransformError

__all__ = [
    "apply",
    "autocast_input",
    "check",
    "check_dropout_p",
    "device_type_of",
    "draw_state",
    "is_autocast_enabled",
    "lora_linear",
    "number",
    "prepare",
    "refuse_tangents",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
    activation: str = "identity",
) -> Tensor:
    r"""A linear layer with a low-rank (LoRA) branch.

    .. math:: y = x W^\top + b + s\,\sigma(\mathrm{drop}_p(x) A^\top) B^\top

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), eq. 3, where :math:`\sigma` is the
    identity; with another activation, the parallel adapter of He et al. (2022), table 1. Dropout acts on the branch's
    input alone, as in PEFT. Differentiable in ``x``, ``weight``, ``lora_a``, ``lora_b`` and ``bias``; what requires no
    gradient is neither computed nor saved for.

    Args:
        x: (..., K), fp16, bf16, fp32 or fp64; any number of leading dimensions, any strides.
        weight: (N, K), x's dtype.
        lora_a: (R, K), any of these dtypes; rounded to the compute dtype at the product, but over fp16, where it and
            what it gives keep fp32's range (``reference.adapter_dtype``).
        lora_b: (N, R), likewise.
        bias: (N,) or None, likewise.
        scaling: s, usually ``lora_alpha / r``.
        dropout_p: probability p in [0, 1) of dropping an element of x from the branch; kept ones are scaled by 1/(1-p).
        training: dropout acts only where this is True.
        backend: ``"triton"``, ``"native"``, ``"eager"``, or None for ``use_backend``, the environment, else the
            automatic choice.
        activation: :math:`\sigma`, ``"identity"``, ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.

    Returns:
        (..., N) in x's dtype. Under autocast, x, weight and bias are cast to its dtype (fp64 is not), and so is y.

    Raises:
        InvalidArgumentError: shapes that do not fit (all of them are told), p outside [0, 1), an unknown backend or
            activation.
        InvalidTypeError: a dtype that is not one of these, x and weight of different dtypes, tensors on different
            devices, something else in the place of a tensor or a number.
        BackendUnavailableError: the backend that was named cannot run here.
        UnsupportedTransformError: called under ``torch.func`` or ``vmap``, or with forward-mode derivatives.

    Example:
        >>> import torch
        >>> from lora_kernels import lora_linear
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> lora_a, lora_b = torch.ones(1, 3), torch.ones(4, 1)
        >>> lora_linear(x, weight, lora_a, lora_b, scaling=0.5)
        tensor([[4.5000, 4.5000, 4.5000, 4.5000],
                [4.5000, 4.5000, 4.5000, 4.5000]])
    """
    check_dropout_p(dropout_p)
    p = dropout_p if training else 0.0
    if activation != "identity":
        from .branches import Branch, apply_branches

        return apply_branches(x, [Branch(weight, lora_a, lora_b, bias, scaling, None, activation)], p, backend)[0]
    return apply(x, weight, lora_a, lora_b, bias, scaling, p, backend)


def apply(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    backend_name: str | None,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`lora_linear` for a p that is known to be valid, 0 where dropout does not act.

    ``share`` is given dropout's state and returns the one to take: several processes may have to agree on it.
    """
    # One question that most programs answer with no, before those that take longer to answer.
    if torch._C._is_any_autocast_enabled() and is_autocast_enabled(device_type := device_type_of(x)):
        x = autocast_input(x, device_type)
        with torch.autocast(device_type, enabled=False):
            # The cast of W is made again in backward rather than saved; so its dtype may differ from x's here.
            return _run(x, weight, lora_a, lora_b, bias, scaling, p, backend_name, True, share)
    return _run(x, weight, lora_a, lora_b, bias, scaling, p, backend_name, False, share)


def _run(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    backend_name: str | None,
    autocast: bool,
    share: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    check(x, weight, lora_a, lora_b, bias, autocast)
    if type(scaling) is not float:  # a layer's may have been set to anything
        scaling = number(scaling)
    if forward_ad._current_level >= 0:
        refuse_tangents(x, weight, lora_a, lora_b, bias)
    x, name = prepare(x, backend_name)
    state = draw_state(x, p, name) if p != 0.0 else None
    if share is not None and state is not None:
        state = share(state)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_a.requires_grad
        or lora_b.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        record = LoRALinearFunction.apply if torch.compiler.is_compiling() else apply_function
        out: Tensor = record(x, weight, lora_a, lora_b, bias, scaling, p, state, name)
        return out
    return forward_only(x, weight, lora_a, lora_b, bias, scaling, p, state, name)


def prepare(x: Tensor, backend_name: str | None) -> tuple[Tensor, str]:
    """x as the operators may see it, and the backend that runs it.

    Raises:
        UnsupportedTransformError: x is within ``torch.func`` or ``vmap``.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedTransformError(
                "lora_linear was called under torch.func or vmap, which are not supported: its kernels have no "
                "batching rules. Call it on the whole batch (it takes any number of leading dimensions), or use "
                "lora_kernels.reference.forward, which is plain PyTorch."
            )
        x = torch._C._functorch.unwrap_if_dead(x)  # one that leaked out of a transform that is over
    choose = _select_constant if compiling else select
    return x, choose(device_type_of(x), x.dtype, backend_name)


def _select_constant(device_type: str, dtype: torch.dtype, backend_name: str | None) -> str:
    """``select`` as a compiled graph sees it: it holds the choice that was made when it was captured."""
    return select(device_type, dtype, backend_name)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which would import Triton.
_select_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_type_of(x: Tensor) -> str:
    """``x.device.type``."""
    try:
        return "cpu" if x.is_cpu else x.device.type  # the string takes PyTorch a microsecond
    except AttributeError as error:
        raise _kind_refusal({"x": x}) from error


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast acts on such a device now."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch knows no autocast of meta


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises where one of them has a forward-mode derivative (``torch.autograd.forward_ad``): it would be lost."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None):
        raise UnsupportedTransformError(
            "lora_linear was given a dual tensor (torch.autograd.forward_ad, torch.func.jvp), and it has no "
            "forward-mode derivative. Differentiate backward, or use lora_kernels.reference.forward, which is plain "
            "PyTorch."
        )


def draw_state(x: Tensor, p: float, backend_name: str) -> Tensor:
    """What regenerates dropout's mask of x (..., K): see ``ops.py``. A layer's p may have been set to anything."""
    check_dropout_p(p)
    return backend(backend_name).dropout_state(flatten(x), p)


def autocast_input(x: Tensor, device_type: str) -> Tensor:
    """x in autocast's dtype; as it is where autocast leaves it alone: fp64, and what is not floating (and refused)."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def check_dropout_p(p: float) -> None:
    """Raises unless 0 <= p < 1."""
    try:
        allowed = 0.0 <= p < 1.0
    except TypeError:
        allowed = False
    if not allowed:
        raise InvalidArgumentError(
            f"dropout probability {p!r} was given: it must lie in [0, 1). Use 0.0 to switch dropout off."
        )


def number(scaling: Any) -> float:
    """``scaling``, as a plain number."""
    if isinstance(scaling, (int, float)):
        return scaling
    if isinstance(scaling, Real) or (isinstance(scaling, Tensor) and scaling.dim() == 0 and not scaling.requires_grad):
        return float(scaling)
    raise InvalidTypeError(
        f"scaling={scaling!r} was given: it must be a number, such as lora_alpha / r, and gets no gradient. To learn "
        "it, give 1.0 and multiply lora_b by it."
    )


def check(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """The quick test of what may be run; the sentences are composed only where something is wrong."""
    try:
        device, dtype = x.device, x.dtype
        if (
            not x.is_nested
            and _shapes_fit(x, weight, lora_a, lora_b, bias)
            and device == weight.device == lora_a.device == lora_b.device
            and (weight.dtype is dtype or (autocast and weight.dtype.is_floating_point))
            and dtype in COMPUTE_DTYPES
            and lora_a.dtype in COMPUTE_DTYPES
            and lora_b.dtype in COMPUTE_DTYPES
            and (bias is None or (bias.device == device and bias.dtype in COMPUTE_DTYPES))
        ):
            return
    except AttributeError:  # something that is no tensor
        pass
    raise _refusal(x, weight, lora_a, lora_b, bias)


def _shapes_fit(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    shape, a_shape, b_shape = weight.shape, lora_a.shape, lora_b.shape
    return (
        len(shape) == len(a_shape) == len(b_shape) == 2
        and x.dim() >= 1
        and x.shape[-1] == shape[1] == a_shape[1]
        and b_shape[0] == shape[0]
        and b_shape[1] == a_shape[0] >= 1
        and (bias is None or bias.shape == shape[:1])
    )


def _refusal(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> LoRAKernelsError:
    """What :func:`check` raises: the first of kinds, shapes, devices and dtypes that is wrong, told of all tensors."""
    given: dict[str, Any] = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    given |= {} if bias is None else {"bias": bias}
    if not all(isinstance(tensor, Tensor) for tensor in given.values()):
        return _kind_refusal(given)
    if x.is_nested:
        return InvalidTypeError(
            "a nested tensor was given: LoRA's products need plain tensors. Pad it first, with "
            "torch.nested.to_padded_tensor(x, 0.0)."
        )
    if not _shapes_fit(x, weight, lora_a, lora_b, bias):
        return InvalidArgumentError(
            f"shapes that do not fit were given: {', '.join([f'{name} {tuple(t.shape)}' for name, t in given.items()])}"
            ". They must be x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R) with R >= 1, and bias (N,) or "
            "None; make K, N and R agree in all of them."
        )
    if len({t.device for t in given.values()}) > 1:
        listed = ", ".join([f"{name} on {t.device}" for name, t in given.items()])
        return InvalidTypeError(f"tensors on different devices were given: {listed}. Move all of them to one device.")
    return InvalidTypeError(
        f"dtypes that cannot run together were given: {', '.join([f'{name} {t.dtype}' for name, t in given.items()])}. "
        "All must be floating (torch.float16, torch.bfloat16, torch.float32, torch.float64), and x and weight must "
        "share one dtype; lora_a, lora_b and bias may differ. Convert x with x.to(weight.dtype), or run under "
        "torch.autocast."
    )


def _kind_refusal(given: dict[str, Any]) -> InvalidTypeError:
    kinds = [f"{name} of type {type(t).__name__}" for name, t in given.items() if not isinstance(t, Tensor)]
    return InvalidTypeError(
        f"{', '.join(kinds)} was given where a torch.Tensor is expected. A NumPy array becomes one by "
        "torch.from_numpy; bias alone may be None."
    )
