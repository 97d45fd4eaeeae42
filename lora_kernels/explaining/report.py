"""What a backend tells of the way in which it runs a pass: data, one text for people, and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["IN_PARTS", "Launch", "Other", "PassPlan", "by_how_much", "of_packed", "size"]

# Of layers with DoRA or an activation.
IN_PARTS = (
    "This layer runs in parts: h, then the product of the plan, and so in backward. A plan of one pass over W gives "
    "way to the next, and the numbers are a plain layer's."
)

_PACKED = "Its weight is quantized: each pass dequantizes it once, which the numbers leave out, and keeps no values."
_CODED = (
    "Its weight is quantized: {kernels} multiplies up to 16 tokens with its codes. Else each pass dequantizes it once. "
    "The numbers leave that out, and no values are kept."
)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, or one call of PyTorch: what it does, and the bytes that it moves from and to memory.

    ``times``: so many of them, in all of which these bytes are moved.
    """

    what: str
    bytes: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.what} ({f'{self.times} calls, ' if self.times > 1 else ''}{size(self.bytes)})"


@dataclass(frozen=True, slots=True)
class Other:
    """A way that is not taken.

    Attributes:
        plan: its name.
        why: why not, in words.
        slower: how much longer it takes, as a part of the chosen plan's time: 0.05 is 5 %. None where it cannot run, or
            nobody has measured or predicted it.
    """

    plan: str
    why: str
    slower: float | None = None


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How one pass runs, and why so; forward, or backward with dx, dA and dB due.

    Attributes:
        direction: "forward" or "backward".
        plan: the plan, in the backend's words.
        basis: "measured" (this size), "neighbour" (measured beside it), "predicted" (by a model), or "fixed": the
            backend has no other, a variable names it, or it is the interpreter's.
        why: the same in a sentence: where, when and with which versions it was measured, or what predicts it.
        us: microseconds, measured or predicted; None where the backend knows none.
        launches: what runs, in this order.
        runner_up: the next best plan.
        passed_over: the best plan of each other way.
        notes: what else bears on the choice, in sentences.
    """

    direction: str
    plan: str
    basis: str
    why: str
    us: float | None
    launches: tuple[Launch, ...]
    runner_up: Other | None = None
    passed_over: tuple[Other, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All that the launches move."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def cost(self) -> str:
        """The number of launches and the bytes, in words."""
        count = sum(launch.times for launch in self.launches)
        return f"{count} launch{'' if count == 1 else 'es'}, {size(self.bytes)}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}

    def __str__(self) -> str:
        lines = [f"{self.direction}: {self.plan}", f"  {self.why}"]
        lines += [f"  {self.cost}:"] * bool(self.launches)
        lines += [f"    {launch}" for launch in self.launches]
        if self.runner_up is not None:
            lines.append(f"  runner-up: {_told(self.runner_up)}")
        lines += ["  passed over:"] * bool(self.passed_over)
        lines += [f"    {_told(other)}" for other in self.passed_over]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def of_packed(kernels: tuple[str, ...]) -> str:
    """What is told of a layer with a quantised weight, whose codes these backends read for few tokens."""
    return _CODED.format(kernels=" and ".join(kernels)) if kernels else _PACKED


def by_how_much(slower: float) -> str:
    """ "3.2 % slower", "as fast" within 0.05 %."""
    percent = 100.0 * slower
    if abs(percent) < 0.05:
        return "as fast"
    return f"{abs(percent):.2g} % {'slower' if percent > 0 else 'faster'}"


def size(moved: float) -> str:
    """Bytes in the unit that suits them: 68.2 MB."""
    for unit in ("B", "kB", "MB"):
        if moved < 1000:
            return f"{moved:.3g} {unit}"
        moved /= 1000
    return f"{moved:.3g} GB"


def _told(other: Other) -> str:
    return f"{other.plan}: {other.why}"
