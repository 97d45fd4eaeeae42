"""Whether the Gluon kernels of ``kernels/hopper`` can run: by what is there, for Gluon is experimental and changes.

Nothing of Triton is imported before it is asked.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

__all__ = ["CAPABILITY", "why_not"]

CAPABILITY = 90
_SPECIALIZE = ("functions_and_args", "worker_num_warps", "worker_num_regs")


def why_not(capability: int | None = CAPABILITY) -> str | None:
    """A sentence where the Gluon kernels cannot run: another GPU, or a Triton that differs; None where they can.

    Args:
        capability: ten times the major compute capability plus the minor, as ``Machine`` has it; None leaves it out.
    """
    if capability is not None and capability != CAPABILITY:
        return (
            f"The Gluon kernels are for compute capability 9.0 and this GPU has {capability // 10}.{capability % 10}: "
            "the plain Triton kernels run."
        )
    lack = _lack()
    return lack and f"The Gluon kernels cannot be compiled by this Triton: {lack}. The plain Triton kernels run."


@cache
def _lack() -> str | None:
    """What the Triton that is installed lacks, as the end of a sentence."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        needed = _needed()
    except (ImportError, AttributeError) as error:
        return f"it has another Gluon ({error})"
    for owner, names in needed:
        for name in names:
            if not hasattr(owner, name):
                return f"{getattr(owner, '__name__', owner)}.{name} is not there"
    from triton.experimental.gluon import language

    if not hasattr(language, "thread_barrier") and not hasattr(language, "barrier"):
        return f"neither {language.__name__}.thread_barrier nor {language.__name__}.barrier is there"
    if tuple(inspect.signature(language.warp_specialize).parameters)[: len(_SPECIALIZE)] != _SPECIALIZE:
        return f"{language.__name__}.warp_specialize takes other arguments than {', '.join(_SPECIALIZE)}"
    return None


def _needed() -> tuple[tuple[Any, tuple[str, ...]], ...]:
    """What the kernels and their launches use of Gluon: modules and classes, and their members."""
    from triton.experimental import gluon
    from triton.experimental.gluon import language
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia import hopper as host
    from triton.language.extra import cuda

    layouts = ("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout")
    functions = ("allocate_shared_memory", "atomic_add", "convert_layout", "inline_asm_elementwise", "num_warps")
    return (
        (gluon, ("jit",)),
        (language, (*layouts, *functions, "static_range", "shared_memory_descriptor", "warp_specialize")),
        (hopper, ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait")),
        (host, ("TensorDescriptor",)),
        (cuda, ("gdc_launch_dependents", "gdc_wait")),
        (hopper.mbarrier, ("MBarrierLayout", "init", "expect", "wait", "arrive")),
        (hopper.tma, ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")),
        (language.shared_memory_descriptor, ("index", "permute", "_reinterpret", "load", "store")),
        (language.NVMMASharedLayout, ("get_default_for",)),
    )
