"""Kernels for compute capability 9.0 in Gluon, Triton's lower level; importing this package imports none of them.

What holds in all of them. x, W, dy, y and dx are 16-bit, in rows on 16-byte boundaries; products accumulate in fp32 and
each output is rounded once. h and dh are kept as the operand that a later product loads (``choose.hidden_operand``),
with s and 1 / (1 - p) folded in: where s is 0, h's operand is 0, and so is db = dyᵀ (s h). A and B are rounded to
bf16 in their operands, over fp16 kept as two bf16 parts. A dropped element is replaced by zero, so that its NaN is not
seen. Nothing is summed by atomics: counters say who is last, and the order of sums is fixed. Offsets into h, parts and
words are 32-bit: the host sees to it that they fit.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from importlib.util import find_spec

__all__ = ["why_not"]

CAPABILITY = 90
_LANGUAGE = "triton.experimental.gluon.language"
_NEEDED = {
    "triton.experimental.gluon": ("jit",),
    _LANGUAGE: (
        "NVMMADistributedLayout",
        "NVMMASharedLayout",
        "DotOperandLayout",
        "BlockedLayout",
        "SliceLayout",
        "allocate_shared_memory",
        "atomic_add",
        "convert_layout",
        "inline_asm_elementwise",
        "num_warps",
        "static_range",
        "warp_specialize",
    ),
    f"{_LANGUAGE}.nvidia.hopper": ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"),
    "triton.experimental.gluon.nvidia.hopper": ("TensorDescriptor",),
    "triton.language.extra.cuda": ("gdc_launch_dependents", "gdc_wait"),
}
_SPECIALIZE = ("functions_and_args", "worker_num_warps", "worker_num_regs")


def why_not(capability: int | None = CAPABILITY) -> str | None:
    """A sentence where the Gluon kernels cannot run: another GPU, or a Triton that differs; None where they can.

    Args:
        capability: ten times the major compute capability plus the minor, as ``Machine`` has it; None leaves it out.
    """
    if capability is not None and capability != CAPABILITY:
        return (
            f"the Gluon kernels are for compute capability 9.0 and this GPU has {capability // 10}.{capability % 10}: "
            "the plain Triton kernels run."
        )
    lack = _lack()
    return lack and f"the Gluon kernels cannot be compiled by this Triton: {lack}. The plain Triton kernels run."


@cache
def _lack() -> str | None:
    """What the Triton that is installed lacks, as the end of a sentence."""
    if find_spec("triton") is None:
        return "triton is not installed"
    for name, wanted in _NEEDED.items():
        try:
            module = import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error})"
        for attribute in wanted:
            if not hasattr(module, attribute):
                return f"{name}.{attribute} is not there"
    language = import_module(_LANGUAGE)
    if not hasattr(language, "thread_barrier") and not hasattr(language, "barrier"):
        return f"neither {_LANGUAGE}.thread_barrier nor {_LANGUAGE}.barrier is there"
    if tuple(inspect.signature(language.warp_specialize).parameters)[: len(_SPECIALIZE)] != _SPECIALIZE:
        return f"{_LANGUAGE}.warp_specialize takes other arguments than {', '.join(_SPECIALIZE)}"
    return _lacking_members(language)


def _lacking_members(language: object) -> str | None:
    """The same of members that the kernels use by a dot."""
    hopper = import_module(f"{_LANGUAGE}.nvidia.hopper")
    for owner, names in (
        (hopper.mbarrier, ("MBarrierLayout", "init", "expect", "wait", "arrive")),
        (hopper.tma, ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")),
        (language.shared_memory_descriptor, ("index", "permute", "_reinterpret", "load", "store")),  # type: ignore[attr-defined]
        (language.NVMMASharedLayout, ("get_default_for",)),  # type: ignore[attr-defined]
    ):
        for name in names:
            if not hasattr(owner, name):
                return f"{getattr(owner, '__name__', owner)}.{name} is not there"
    return None
