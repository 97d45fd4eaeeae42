"""``lora_linear``: validation, autocast, dropout's draw and the choice of backend; then one call into autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .autograd import LoRALinearFunction, apply_function, forward_only
from .dispatch import COMPUTE_DTYPES, backend, select
from .errors import InvalidArgumentError, InvalidTypeError, UnsupportedTransformError

__all__ = ["apply", "check", "check_dropout_p", "device_type_of", "is_autocast_enabled", "lora_linear", "prepare"]


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
        lora_a: (R, K), any of these dtypes; rounded to the compute dtype at the product.
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
        InvalidTypeError: a dtype that is not floating, x and weight of different dtypes, tensors on different devices.
        BackendUnavailableError: the backend that was named cannot run here.
        UnsupportedTransformError: called under ``torch.func`` or ``vmap``.

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
        compute = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            # The cast of W is made again in backward rather than saved; so its dtype may differ from x's here.
            return _run(x.to(compute), weight, lora_a, lora_b, bias, scaling, p, backend_name, True, share)
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
    x, name = prepare(x, backend_name)
    state = backend(name).dropout_state(x.reshape(-1, x.shape[-1]), p) if p > 0.0 else None
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
    return "cpu" if x.is_cpu else x.device.type  # the string takes PyTorch a microsecond


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast acts on such a device now."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch knows no autocast of meta


def check_dropout_p(p: float) -> None:
    """Raises unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise InvalidArgumentError(
            f"dropout probability {p} was given: it must lie in [0, 1). Use 0.0 to switch dropout off."
        )


def check(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """The quick test of what may be run; the sentences are composed only where something is wrong."""
    if x.is_nested:
        raise InvalidTypeError(
            "a nested tensor was given: LoRA's products need plain tensors. Pad it first, with "
            "torch.nested.to_padded_tensor(x, 0.0)."
        )
    shape, a_shape, b_shape = weight.shape, lora_a.shape, lora_b.shape
    if not (
        len(shape) == len(a_shape) == len(b_shape) == 2
        and x.dim() >= 1
        and x.shape[-1] == shape[1] == a_shape[1]
        and b_shape[0] == shape[0]
        and b_shape[1] == a_shape[0] >= 1
        and (bias is None or bias.shape == shape[:1])
    ):
        raise InvalidArgumentError(_shape_sentence(x, weight, lora_a, lora_b, bias))
    device, dtype = x.device, x.dtype
    if not (device == weight.device == lora_a.device == lora_b.device and (bias is None or bias.device == device)):
        tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
        listed = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
        raise InvalidTypeError(f"tensors on different devices were given: {listed}. Move all of them to one device.")
    if not (
        (weight.dtype is dtype or (autocast and weight.dtype.is_floating_point))
        and dtype in COMPUTE_DTYPES
        and lora_a.dtype.is_floating_point
        and lora_b.dtype.is_floating_point
        and (bias is None or bias.dtype.is_floating_point)
    ):
        raise InvalidTypeError(_dtype_sentence(x, weight, lora_a, lora_b, bias))


def _shape_sentence(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> str:
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items() if t is not None)
    return (
        f"shapes that do not fit were given: {shapes}. They must be x (..., K), weight (N, K), lora_a (R, K), "
        "lora_b (N, R) with R >= 1, and bias (N,) or None; make K, N and R agree in all of them."
    )


def _dtype_sentence(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> str:
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    dtypes = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items() if t is not None)
    return (
        f"dtypes that cannot run together were given: {dtypes}. All must be floating (torch.float16, torch.bfloat16, "
        "torch.float32, torch.float64), and x and weight must share one dtype; lora_a, lora_b and bias may differ. "
        "Convert x with x.to(weight.dtype), or run under torch.autocast."
    )
