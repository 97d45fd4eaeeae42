"""The kernels that are compiled offline, as Triton's compiler takes them, and the key of a call."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from .compile_jobs import Job

__all__ = ["key_of", "source_of"]


@lru_cache(maxsize=256)
def _kernel_of(name: str) -> Any:
    """The kernel of that name."""
    modules = _hopper_modules() if name.startswith("hopper_") else _modules()
    return next(getattr(module, name) for module in modules if name in module.__all__)


def _modules() -> tuple[Any, ...]:
    from ..kernels import (
        backward,
        codes,
        combine,
        experts,
        few_codes,
        few_four_bits,
        few_tokens,
        forward,
        gain,
        gated,
        input_grad,
        mx,
        packed,
        persistent,
    )

    modules = (backward, codes, combine, experts, few_codes, few_four_bits, few_tokens, forward, gain, gated)
    return *modules, input_grad, mx, packed, persistent


def _hopper_modules() -> tuple[Any, ...]:
    from ..kernels.hopper import (
        group_dx,
        group_outer,
        group_product,
        group_shrink,
        group_small,
        outer,
        product,
        product_h,
        shrink,
        small,
    )

    return outer, product, product_h, shrink, small, group_dx, group_outer, group_product, group_shrink, group_small


def source_of(job: Job) -> Any:
    """What ``triton.compile`` takes."""
    from triton.compiler import ASTSource

    kernel = _kernel_of(job.kernel)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.aligned}
    made: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        made = GluonASTSource
    return made(fn=kernel, signature=job.signature, constexprs=job.constants, attrs=attributes)


def key_of(job: Job, reading: str) -> str:
    """Of all that a record comes from but Triton's release: kernel, helpers, constants, types, target, ``reading``."""
    source = source_of(job).hash()  # of the kernel's source and its helpers', by Triton
    text = json.dumps([source, job.arch, job.exact, sorted(job.options.items()), reading])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
