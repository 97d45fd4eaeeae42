"""The fused kernels in Triton: for NVIDIA GPUs from compute capability 8.0 on, and on the CPU in Triton's interpreter.

Importing this package imports neither Triton nor anything of CUDA; ``register`` does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import env
from ...accuracy import tf32_allowed
from ...dispatch import Problem
from ...errors import InvalidArgumentError
from ...explaining.report import PassPlan
from ...kept import Kept
from ...ops import (
    COMBINE_OPERATOR_NAMES,
    EXPERTS_OPERATOR_NAMES,
    GROUP_OPERATOR_NAMES,
    OPERATOR_NAMES,
    CodeKernels,
    register,
    register_code_kernels,
)
from .. import draw_seed, why_not_capability
from ..native import load

if TYPE_CHECKING:
    from .choose.blocks import Machine
    from .choose.launching import Launching
    from .choose.tuned import Loaded

__all__ = ["BACKEND", "interpreter_fault", "kept", "plans_on", "quantized"]

_WIDE = 8192  # output features from which on the mask is drawn again
_QUANTIZED = ("package", "own")


class TritonBackend:
    """One read of x for h, dropout's mask as one bit an element, each pass by the plan that suits the size."""

    name = "triton"

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if find_spec("triton") is None:
            reasons.append(
                "triton is not installed: pip install 'triton>=3.6' (Linux and an NVIDIA GPU), or run within "
                "use_backend('eager')."
            )
        if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(
                f"dtype {problem.dtype} is not supported: its kernels accumulate in fp32. Run within "
                "use_backend('eager'), or give tensors of torch.float16, torch.bfloat16 or torch.float32."
            )
        if problem.device_type == "cuda":
            reasons += _why_not_cuda()
        elif problem.device_type != "cpu":
            reasons.append(
                f"device type {problem.device_type!r} is not supported: it runs on NVIDIA GPUs. Run within "
                "use_backend('eager')."
            )
        elif not env.triton_interpreter_requested():
            reasons.append(
                "the tensors are on the CPU and TRITON_INTERPRET=1 is not set: move them to a CUDA device, run "
                "within use_backend('eager'), or set TRITON_INTERPRET=1 before Python starts, for the kernels in the "
                "interpreter. " + " ".join(_why_not_cuda())
            )
        elif fault := interpreter_fault():
            reasons.append(fault)
        return [reason.strip() for reason in reasons]

    def why_not_automatic(self, problem: Problem) -> list[str]:
        if problem.device_type == "cpu":
            return [
                "On the CPU its kernels run in Triton's interpreter, for tests: use_backend('triton') asks for them."
            ]
        return []

    def describe(self, problem: Problem) -> str:
        if problem.device_type == "cpu":
            told = "Triton's interpreter (TRITON_INTERPRET=1): the kernels' logic on the CPU, for tests, very slow."
            return told + _quantized_weight(problem)
        if problem.experts:
            return f"{_of_experts(problem)}{_launches()}"
        dropped = f" {kept().tells(problem)}" if problem.dropout_p else ""
        return (
            "Fused: x is read once for h. The plan for the size (measured, or predicted where nobody has tuned) adds "
            f"the low-rank term within its own product, or before or after the library's.{dropped}{_launches()}"
            f"{_quantized_weight(problem)}"
        )

    def plan(self, problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
        from .choose import blocks, tuned
        from .choose.launching import PREPARED, PYTHON

        device = torch.device("cpu")
        if problem.device_type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        table = tuned.of(device)
        name = str(device) if table.device is None else table.device.name
        launching = PYTHON if load.status("launch")["reasons"] else PREPARED
        return plans_on(blocks.machine_of(device), name, table, problem, tokens, launching)

    def register(self, device_type: str) -> None:
        from . import (
            combine_operators,
            expert_operators,
            gated_operators,
            group_operators,
            operators,
            packed_operators,
            part_operators,
        )

        modules = (operators, part_operators, gated_operators, group_operators, expert_operators, combine_operators)
        names = (*OPERATOR_NAMES, *GROUP_OPERATOR_NAMES, *EXPERTS_OPERATOR_NAMES, *COMBINE_OPERATOR_NAMES)
        own = {name: next(getattr(m, name) for m in modules if name in m.__all__) for name in names}
        known, packed = group_operators.known_group, packed_operators.OPERATORS
        register(self.name, own, kept(), (), packed, "everywhere", any_dimensions=True, known_group=known)
        if quantized(device_type) == "own":
            from . import code_operators

            register_code_kernels(device_type, CodeKernels(code_operators.values, code_operators.few_tokens))

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        return draw_seed(x)


def plans_on(
    machine: Machine, name: str, table: Loaded, problem: Problem, tokens: int, launching: Launching | None = None
) -> tuple[PassPlan, ...]:
    """How each pass of ``problem`` runs on a machine, which need not be here, with its tuned tables.

    ``launching``: how its kernels are launched outside of graphs; by default by the launcher.
    """
    from .choose import why
    from .choose.launching import PREPARED

    p = problem
    assert p.in_features is not None
    assert p.out_features is not None
    assert p.r is not None
    dtype = "tf32" if p.dtype is torch.float32 and tf32_allowed() else str(p.dtype).removeprefix("torch.")
    sizes = tokens, p.in_features, p.out_features, p.r
    launching = launching or PREPARED
    found = why.plans(machine, name, table, sizes, dtype, p.dropout_p > 0, p.transposed, launching)
    if not p.others:
        return found
    of = ((p.out_features, p.r), *p.others), tokens, p.in_features, dtype, p.dropout_p > 0
    notes = why.group_notes(machine, name, table, *of, launching)
    return tuple(replace(own, notes=(*own.notes, note)) for own, note in zip(found, notes, strict=True))


def _of_experts(problem: Problem) -> str:
    base = "The product of each projection has the low-rank term inside."
    dropped = " Dropout's mask is drawn once in each pass; backward keeps a 16-byte seed." * bool(problem.dropout_p)
    return f"Grouped kernels over the tokens sorted by expert; the host waits for nothing. {base}{dropped}"


def _quantized_weight(problem: Problem) -> str:
    """Sentences on whose kernels read a quantised weight, where those in Triton do."""
    if not problem.codes:
        return ""
    if quantized(problem.device_type) == "own":
        from .choose.blocks import FEW_TOKENS

        if problem.codes == "e2m1":
            return " Triton's kernels make the values of its weight."
        return (
            f" Triton's kernels read its weight as {problem.codes}. Up to {FEW_TOKENS} tokens are multiplied with that "
            "itself; all else with its values, which they make."
        )
    return f" Its weight's values are made by its package. {env.GPU_QUANTIZED_VARIABLE}=own takes kernels in Triton."


def _launches() -> str:
    """A sentence: who launches the kernels of a warm call."""
    found = load.status("launch")
    if found["reasons"]:
        return (
            f" Python launches its kernels one by one, for the library launch is not used: {' '.join(found['reasons'])}"
        )
    where = f"is {found['path']}" if found["path"] else f"{found['state']} by {found['compiler']}"
    return f" From the second call of a size on it is one call into C++; the library launch {where}."


def interpreter_fault() -> str | None:
    """A sentence where this Triton's interpreter fails with this NumPy: run-time loops stop at a TypeError."""
    try:
        triton, numpy = (tuple(map(int, re.findall(r"\d+", metadata.version(n))[:2])) for n in ("triton", "numpy"))
    except metadata.PackageNotFoundError:
        return None
    if triton >= (3, 7) or numpy < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton[0]}.{triton[1]} fails with NumPy {numpy[0]}.{numpy[1]}: "
        "pip install 'numpy<2.4' or 'triton>=3.7', or run within use_backend('eager')."
    )


class _Kept(Kept):
    """``keeps``: "mask" or "seed" for all layers, None for what takes less time for each.

    To draw the mask again costs about 10 us for 8192 x 4096 elements: less than 1.5 % of a step of wide layers alone.
    """

    packs_mask = True

    def __init__(self, keeps: str | None) -> None:
        self._keeps = keeps

    def hidden_dtype(self, compute: torch.dtype) -> torch.dtype:
        return torch.float32

    def h(self, x: Tensor, n: int, r: int) -> tuple[int, torch.dtype]:
        from .choose import blocks
        from .choose.hidden_operand import operand_on

        operand = operand_on(blocks.machine_of(x.device).capability, x.dtype, x.shape[1], n, r)
        return (r, torch.float32) if operand is None else (operand.columns, torch.bfloat16)

    def scaled_h(self, h: Tensor, r: int, scaling: float) -> Tensor:
        if h.dtype is not torch.bfloat16:
            return scaling * h
        from .choose.hidden_operand import HiddenOperand

        return HiddenOperand(h.shape[1] // 2).unpack(h, r)

    def prefers_words(self, n: int) -> bool:
        return n < _WIDE if self._keeps is None else self._keeps == "mask"

    def group_fault(
        self, device: torch.device, dtype: torch.dtype, k: int, sizes: tuple[tuple[int, int], ...], dropout: bool
    ) -> str | None:
        from .choose import blocks
        from .choose.group_candidates import static_fault

        return static_fault(blocks.machine_of(device), dtype, k, sizes, dropout)

    def tells(self, problem: Problem) -> str:
        """A sentence: what is kept of dropout's mask."""
        words, seed = (
            "Dropout's mask is drawn once; backward keeps its bits, K / 8 bytes a token.",
            "Dropout's mask is drawn once in each pass; backward keeps a 16-byte seed.",
        )
        if self._keeps is None and problem.out_features is None:
            return f"{words} Above {_WIDE - 1} output features it keeps a 16-byte seed and draws again."
        return words if self.prefers_words(problem.out_features or 0) else seed


@cache
def kept() -> _Kept:
    """Reads the environment once.

    Raises:
        InvalidArgumentError: the variable has an unknown word.
    """
    keeps = env.dropout_keeps()
    if keeps not in (None, "mask", "seed"):
        raise InvalidArgumentError(
            f"{env.DROPOUT_KEEPS_VARIABLE}={keeps} was given: it must be one of mask, seed. Set one of them, or unset "
            "it: then the layer's width decides."
        )
    return _Kept(keeps)


@cache
def quantized(device_type: str) -> str:
    """Whose kernels read a quantised weight: "package" or, by default on GPUs, "own". Reads the environment once.

    Raises:
        InvalidArgumentError: the variable has an unknown word.
    """
    named = env.gpu_quantized() or ("own" if device_type == "cuda" else "package")
    if named not in _QUANTIZED:
        raise InvalidArgumentError(
            f"{env.GPU_QUANTIZED_VARIABLE}={named} was given: it must be one of {', '.join(_QUANTIZED)}. Set one of "
            "them, or unset it."
        )
    return named


def _why_not_cuda() -> list[str]:
    if not torch.cuda.is_available():
        build = (
            "torch.version.cuda is None: this is a CPU build of torch; install a CUDA build"
            if torch.version.cuda is None
            else f"this torch is built for CUDA {torch.version.cuda}; check the driver with nvidia-smi"
        )
        return [f"No CUDA device is visible ({build}, or run within use_backend('eager'))."]
    return why_not_capability()


BACKEND = TritonBackend()
