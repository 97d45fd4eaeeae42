"""What a compiler is known to make wrongly of our kernels, told from the PTX before anything is launched.

Triton 3.6.0's LLVM computes two offsets of a thread t, as ``t & 31`` and ``t << 2``, as lanes of one vector: it does
both operations to both lanes, and picks. The ``t << 31`` that nobody needs is marked as one that fits in 32 bits,
which it is not. Where the two lanes are then made as one 64-bit number, what does not fit is added to the other lane:
the offsets are wrong, and so is all that is loaded by them. Seen on an H100 (``few_tokens_kernel``, x in fp32 whose
rows lie 80 numbers apart, K = 40); Triton 3.7.1 compiles it rightly.
"""

from __future__ import annotations

import re

from ....errors import BackendUnavailableError

__all__ = ["check_code", "lanes_that_overflow"]

_TAKEN_APART = re.compile(r"\bmov\.b64\s+\{_, %r\d+\}, (%rd\d+);")
_MADE = re.compile(r"^\s*(or\.b64|mul\.wide\.[us]32|shl\.b64)\s+(%rd\d+), ([^,;]+), ([^,;]+);", re.MULTILINE)
_FITS = 22  # bits that a thread's number, up to 1023, can be moved by within 32


def lanes_that_overflow(ptx: str) -> int:
    """How many 64-bit numbers of two 32-bit lanes have a low lane that is carried into the high one."""
    made = {name: (kind, left, right) for kind, name, left, right in _MADE.findall(ptx)}
    wide = [made[name] for name in _TAKEN_APART.findall(ptx) if name in made]
    ors = [parts for kind, *parts in wide if kind == "or.b64"]
    return sum(any(_overflows(made.get(part)) for part in parts) for parts in ors)


def _overflows(made: tuple[str, str, str] | None) -> bool:
    """Whether it moves a 32-bit number so far that a thread's number would not fit."""
    if made is None or not made[2].isdecimal():
        return False
    kind, number = made[0], int(made[2])
    if kind != "shl.b64" and number.bit_count() != 1:
        return False
    bits = number if kind == "shl.b64" else number.bit_length() - 1
    return _FITS <= bits < 32


def check_code(kernel: str, compiled: object) -> None:
    """Refuses what ``compiled``'s PTX shows to be wrong; nothing where there is none, as in the interpreter.

    Raises:
        BackendUnavailableError: the kernel was compiled wrongly. Another plan may serve: ``prepared.first_that_runs``.
    """
    ptx = getattr(compiled, "asm", {}).get("ptx", "")
    if lanes_that_overflow(ptx):
        raise BackendUnavailableError(
            f"Triton has compiled {kernel} wrongly for these strides, and no other kernel serves: install triton 3.7 "
            "or later, or run within use_backend('native')."
        )
