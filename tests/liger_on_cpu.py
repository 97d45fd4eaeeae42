"""Liger on a CPU: what Triton's interpreter cannot run of it is computed by PyTorch.

Its rotary embedding and its cross entropy in chunks are interpreted. Its norm and its SwiGLU call ``.to`` on numbers,
which the interpreter passes as Python's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor


def _norm(x: Tensor, weight: Tensor, eps: float, *others: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _product(gate: Tensor, up: Tensor, *others: Any) -> Tensor:
    return F.silu(gate) * up


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Puts PyTorch's formulas in; and has ``patch`` undo what Liger changes in transformers' class of a whole Llama."""
    from liger_kernel.transformers import rms_norm, swiglu
    from transformers import LlamaForCausalLM

    patch.setattr(rms_norm, "LigerRMSNormFunction", SimpleNamespace(apply=_norm))
    patch.setattr(swiglu, "LigerSiLUMulFunction", SimpleNamespace(apply=_product))
    patch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
