"""How ``init_lora_weights`` sets the adapters: PEFT's initialisations that need nothing but the weight.

True, ``"zero"``, ``"gaussian"`` and ``"orthogonal"`` start with ``B A = 0``; False starts with any product. PiSSA and
OLoRA start with a part of the weight, which then has to leave it: the layer keeps the residual ``W - s B A``.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, InvalidTypeError, LoRAStateError

__all__ = ["ALLOWED", "allowed", "check_initialisation", "check_weight", "draw", "kind_of", "split", "splits"]

ALLOWED = (True, False, "zero", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")
_ELSEWHERE = {
    "corda": "activations of sample data",
    "eva": "activations of sample data",
    "loftq": "a quantized base",
    "lora_ga": "gradients of sample data",
    "mica": "a frozen lora_B",
}
_PISSA = re.compile(r"pissa(_niter_(?P<steps>\d+))?")


def kind_of(init: bool | str) -> bool | str:
    """``init`` in lower case: names are told apart as in PEFT, which takes "OLoRA" too."""
    return init.lower() if isinstance(init, str) else init


def allowed(init: object) -> bool:
    """Whether ``init`` is one of the initialisations.

    Example:
        >>> allowed("pissa_niter_16"), allowed("pissa_16")
        (True, False)
    """
    if isinstance(init, bool):
        return True
    if not isinstance(init, str):
        return False
    return kind_of(init) in ("zero", "gaussian", "orthogonal", "olora") or bool(_PISSA.fullmatch(init.lower()))


def splits(init: bool | str) -> bool:
    """Whether ``init`` moves a part of the weight into the adapter: PiSSA and OLoRA do."""
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


def check_initialisation(init: bool | str, r: int, lora_alpha: float) -> None:
    """Raises one sentence for an initialisation that is unknown, or that this rank or alpha cannot have."""
    if not allowed(init):
        if need := _ELSEWHERE.get(str(init).lower().partition("_niter")[0]):
            raise InvalidArgumentError(
                f"init_lora_weights={init!r} was given: it needs {need}, which replace_linear is not given. Initialise "
                "with PEFT (get_peft_model) and call lora_kernels.fuse_peft(model), which keeps PEFT's values."
            )
        raise InvalidArgumentError(
            f"init_lora_weights={init!r} was given: it must be one of {ALLOWED}, N a number of power iterations such "
            "as 16. Other initialisations can be copied into lora_A and lora_B once the layer is made."
        )
    if kind_of(init) == "orthogonal" and r % 2:
        raise InvalidArgumentError(
            f"r={r} was given with init_lora_weights='orthogonal', which halves the rank: give an even one."
        )
    if splits(init) and lora_alpha == 0:
        raise InvalidArgumentError(
            f"lora_alpha=0 was given with init_lora_weights={init!r}: an adapter that is scaled by 0 cannot hold a "
            "part of the weight. Give a positive alpha."
        )


def check_weight(init: bool | str, r: int, in_features: int, out_features: int, weight: Tensor) -> None:
    """Raises, before anything is changed, where ``weight`` cannot be split for rank ``r``."""
    if not splits(init):
        return
    if r > min(in_features, out_features):
        raise InvalidArgumentError(
            f"r={r} was given with init_lora_weights={init!r}, and a layer {in_features} -> {out_features} has no more "
            f"than {min(in_features, out_features)} directions to start from. Give a smaller r, or a rank_pattern."
        )
    if type(weight.data).__name__ == "DTensor" or (weight.numel() == 0 and not weight.is_meta):
        raise InvalidTypeError(
            f"init_lora_weights={init!r} was given, and the weight is sharded: its singular values cannot be told from "
            "a part. Replace the layers first, then distribute the model."
        )
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise LoRAStateError(
            f"init_lora_weights={init!r} was given, and the weight holds NaN or inf, which has no decomposition. Load "
            "the model's weights first."
        )


def draw(init: bool | str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Values for lora_A (R, K) and lora_B (N, R) of the initialisations that leave the weight alone.

    ``a`` and ``b`` say shape, dtype and device. Orthogonal: the rows of a random orthogonal matrix are halved into
    :math:`Q_1, Q_2`, and :math:`A = Q_1^\top G_1 / 10`, :math:`B = G_2 Q_2 / 10` with G normal, so B A = 0 with both
    of them acting (datta0.github.io/posts/rethink-lora-init).
    """
    if kind_of(init) == "orthogonal":
        r = a.shape[0]
        square, _ = torch.linalg.qr(torch.randn(r, r, dtype=a.dtype, device=a.device))
        left = torch.randn(a.shape[1], r // 2, dtype=a.dtype, device=a.device)
        right = torch.randn(r // 2, b.shape[0], dtype=a.dtype, device=a.device)
        return (left @ square[0::2]).t() / 10, right.t() @ square[1::2] / 10
    first = torch.empty_like(a)
    if kind_of(init) == "gaussian":
        nn.init.normal_(first, std=1 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
    if init is False:
        return first, nn.init.kaiming_uniform_(torch.empty_like(b), a=math.sqrt(5))
    return first, torch.zeros_like(b)


def split(init: bool | str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    r"""lora_A (R, K) and lora_B (N, R) whose product, times ``scaling``, is a part of ``weight`` (N, K).

    PiSSA (Meng et al., 2024): with :math:`W = U S V^\top` the R largest singular values,
    :math:`A = (S / s)^{1/2} V^\top` and :math:`B = U (S / s)^{1/2}`; ``pissa_niter_N`` estimates them by N steps of
    subspace iteration, at random. OLoRA (Büyükakyüz, 2024): with :math:`W = Q R`, the first R columns of Q and rows of
    R. All in ``weight``'s dtype, which is fp32 or wider.
    """
    if kind_of(init) == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    found = _PISSA.fullmatch(str(kind_of(init)))
    assert found is not None
    if found["steps"] is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(found["steps"]))
        vh = v.t()
    root = (s / scaling).sqrt()
    return root.unsqueeze(1) * vh, u * root
