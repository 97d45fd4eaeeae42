"""``lora_linear``: the layer as a function of its tensors."""

from __future__ import annotations

from torch import Tensor

from .branches import Branch
from .gate import check_dropout_p, run_branches, run_plain

__all__ = ["lora_linear"]


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
        return run_branches(x, [Branch(weight, lora_a, lora_b, bias, scaling, None, activation)], p, backend)[0]
    return run_plain(x, weight, lora_a, lora_b, bias, scaling, p, backend)
