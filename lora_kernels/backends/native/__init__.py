"""The kernels in C++ and CUDA: the fast path on CPUs, and on NVIDIA GPUs the one that needs no Triton.

The library is compiled ahead of time or at the first use (``build``, ``cache``, ``load``). Importing this package
compiles and loads nothing; ``register`` does.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ...dispatch import Problem
from ...explaining.report import PassPlan
from ...kept import Kept
from ...ops import EXPERTS_MLP_OPERATOR_NAMES, EXPERTS_OPERATOR_NAMES, register
from .. import draw_seed, why_not_capability
from ..composed import Composition
from . import choice, coded, load

__all__ = ["BACKEND"]


class NativeBackend:
    """PyTorch's own large product, and vectorised code for everything around it, in one operator call."""

    name = "native"

    def why_not(self, problem: Problem) -> list[str]:
        if problem.device_type == "meta":
            return []
        if problem.device_type not in ("cpu", "cuda"):
            supported = "it runs on CPUs and NVIDIA GPUs"
            return [
                f"device type {problem.device_type!r} is not supported: {supported}. Run within use_backend('eager')."
            ]
        reasons = load.why_not(problem.device_type)
        if problem.device_type == "cuda" and torch.version.cuda is not None:
            reasons += _why_not_device()
        return [reason[0].upper() + reason[1:] for reason in reasons]

    def why_not_automatic(self, problem: Problem) -> list[str]:
        if problem.device_type == "meta":
            return ["On the meta device there are shapes only, and any backend gives the same."]
        return []

    def lost(self, problem: Problem) -> list[str]:
        """What is told once where ``eager`` runs in this backend's place, and nobody chose that."""
        kind = problem.device_type
        no_gpu = kind == "cuda" and (problem.dtype is torch.float64 or bool(_why_not_device()))
        if kind not in ("cpu", "cuda") or sys.platform == "win32" or no_gpu:
            return []
        return [reason[0].upper() + reason[1:] for reason in load.lost(kind)]

    def describe(self, problem: Problem) -> str:
        if problem.device_type == "meta":
            return "Shapes only: nothing is compiled or loaded for them."
        found = load.status(problem.device_type)
        library = (
            f"is {found['path']} ({found['state']})" if found["path"] else f"{found['state']} by {found['compiler']}"
        )
        dropped = " Dropout's mask is drawn again in backward from a 16-byte seed." if problem.dropout_p else ""
        if problem.experts:
            return _of_experts(problem, library)
        does = (
            "the product by W, PyTorch's or its own, whichever is faster, and vectorised code for the rest"
            if problem.device_type == "cpu"
            else "PyTorch's product by W, and its own kernels for the rest"
        )
        return f"In one call: {does}. The library {library}.{dropped}"

    def plan(self, problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
        from . import why

        return why.plans(problem, tokens)

    def register(self, device_type: str) -> None:
        library = (*EXPERTS_OPERATOR_NAMES, *EXPERTS_MLP_OPERATOR_NAMES)
        own = Composition(_keep, _KEPT.hidden_dtype).operators
        register(self.name, own, _KEPT, library, coded.OPERATORS, "on the CPU", any_dimensions=True)
        if device_type != "meta":
            load.load(device_type)
        if device_type == "cpu":
            choice.install()

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        return draw_seed(x)


def _of_experts(problem: Problem, library: str) -> str:
    if problem.device_type != "cpu":
        return "It has kernels of stacked experts for CPUs only: on a GPU what 'eager' names runs in their place."
    return (
        "One operator a pass for all experts, gate, both projections and the sum over a token's experts within; one a "
        f"projection where a bias, another gate or fp16 is between. The library {library}."
    )


def _keep(like: Tensor, p: float, state: Tensor) -> Tensor:
    mask: Tensor = torch.ops.lora_kernels.native_mask(state, *like.shape, p)
    return mask


class _Kept(Kept):
    def hidden_dtype(self, compute: torch.dtype) -> torch.dtype:
        return torch.float64 if compute is torch.float64 else torch.float32


_KEPT = _Kept()


def _why_not_device() -> list[str]:
    if not torch.cuda.is_available():
        build = f"this torch is built for CUDA {torch.version.cuda}"
        return [
            f"No CUDA device is visible ({build}): check the driver with nvidia-smi, or move the tensors to the CPU."
        ]
    return why_not_capability()


BACKEND = NativeBackend()
