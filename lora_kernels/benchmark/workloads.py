"""What is measured: a ``Workload`` is one cell of a table, a ``Preset`` a named grid of them. Nothing here runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InvalidArgumentError

__all__ = ["DIRECTIONS", "DTYPES", "FIELDS", "PRESETS", "Preset", "Workload", "preset"]

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = {
    "forward": "forward without a graph",
    "backward": "backward alone, of a graph that is kept",
    "dx": "backward with the input as the only gradient",
    "step": "forward and backward",
    "overhead": "host time of a forward without a graph",
    "overhead-grad": "host time of a forward that records a graph",
    "memory": "bytes kept for backward, and the peak of a step",
}


@dataclass(frozen=True)
class Workload:
    """One cell: x (tokens, in_features) through a layer of rank r.

    Attributes:
        direction: one of ``DIRECTIONS``.
        tokens, in_features, out_features, r: M, K, N, R.
        dtype: compute dtype, one of ``DTYPES``.
        adapter_dtype: dtype of the adapters; None is the package's (and PEFT's) default, fp32 over a 16-bit base.
        p: dropout probability.
        bias: whether the frozen layer has a bias.
        train_bias: whether that bias trains beside the adapters, as in the worked example.
    """

    direction: str
    tokens: int
    in_features: int
    out_features: int
    r: int
    dtype: str = "float32"
    adapter_dtype: str | None = None
    p: float = 0.0
    bias: bool = False
    train_bias: bool = False

    def has(self, name: str, values: tuple[str, ...]) -> bool:
        """Whether the field ``name`` has one of ``values``, as text."""
        return str(getattr(self, name)) in values

    @property
    def adapters(self) -> str:
        """The adapters' dtype, the default resolved."""
        return self.adapter_dtype or "float32"

    @property
    def has_backward(self) -> bool:
        return self.direction in ("backward", "dx", "step", "memory")

    @property
    def records(self) -> bool:
        """Whether x requires a gradient, as behind the first layer of a model it does."""
        return self.has_backward or self.direction == "overhead-grad"

    @property
    def shape(self) -> str:
        return f"{self.in_features}→{self.out_features}"

    def __str__(self) -> str:
        parts = [self.direction, f"M={self.tokens}", self.shape, f"r={self.r}", self.dtype]
        if self.adapter_dtype:
            parts.append(f"adapters {self.adapter_dtype}")
        if self.p:
            parts.append(f"p={self.p}")
        return " ".join([*parts, *["trainable"] * self.train_bias, *["bias"] * self.bias])


FIELDS = tuple(f.name for f in fields(Workload))


@dataclass(frozen=True)
class Preset:
    """A grid and how to run it.

    Attributes:
        device: "cpu", "cuda", or None for CUDA where there is a GPU.
        peers: providers that run unless ``--peers`` names others; "ours" is the automatic choice and every backend.
        budget: seconds for the whole preset unless ``--budget`` says otherwise; compiling and checking count.
        min_rounds: rounds of each cell even where they outlast the budget.
        max_call: seconds that one call of the floor may take; a cell where it takes longer is left out, and says so.
    """

    name: str
    describe: str
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    device: str | None = None
    budget: float = 60.0
    min_rounds: int = 7
    max_call: float = math.inf

    def only(self, conditions: dict[str, tuple[str, ...]]) -> Preset:
        """The preset with the cells whose fields have one of the given values: ``{"r": ("16",)}``.

        Raises:
            InvalidArgumentError: an unknown field, a value that no cell has, or no cell is left.
        """
        for name, values in conditions.items():
            known = dict.fromkeys(str(getattr(w, name, None)) for w in self.workloads)
            if name not in FIELDS or not set(values) <= set(known):
                raise InvalidArgumentError(
                    f"{name}={','.join(values)} was given: the fields are {', '.join(FIELDS)}"
                    + (f", and in preset {self.name!r} {name} is {', '.join(known)}." if name in FIELDS else ".")
                )
        left = tuple(w for w in self.workloads if all(w.has(name, values) for name, values in conditions.items()))
        if not left:
            raise InvalidArgumentError(f"preset {self.name!r} has no cell that meets all conditions: name fewer.")
        return replace(self, workloads=left)


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidArgumentError: there is none.
    """
    if name not in PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is not known: name one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _grid(
    directions: tuple[str, ...],
    tokens: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    ranks: tuple[int, ...],
    dtypes: tuple[str, ...] = ("float32",),
    dropouts: tuple[float, ...] = (0.0,),
    **more: Any,
) -> Iterator[Workload]:
    for dtype in dtypes:
        for direction in directions:
            for in_features, out_features in shapes:
                for p in dropouts:
                    for r in ranks:
                        for m in tokens:
                            yield Workload(direction, m, in_features, out_features, r, dtype, p=p, **more)


_SQUARE = tuple((n, n) for n in (1024, 2048, 4096))
_CPU_SHAPES = (*_SQUARE, (2048, 8192), (8192, 2048))
_GPU_SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096), (4096, 1024))
_GPU_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
_RIVALS = ("peft", "peft16", "addmm")
_ALL = (*_RIVALS, "compile", "ours")


def _cpu_grid() -> Iterator[Workload]:
    """Dtype by dtype, so that a run that is cut off has whole tables: the grid, dropout, the worked example's layer."""
    for dtype in ("float32", "bfloat16"):
        yield from _grid(("forward", "step"), (1, 16, 512, 2048), _CPU_SHAPES, (8, 16, 64), (dtype,))
        yield from _grid(("forward", "step"), (1, 16, 512, 2048), ((2048, 2048),), (16,), (dtype,), (0.1,))
        yield from _grid(("step",), (256,), ((32, 32),), (2,), (dtype,), bias=True, train_bias=True)


PRESETS = {
    p.name: p
    for p in (
        Preset(
            "quick",
            "a look at this machine in under a minute",
            (
                *_grid(("forward", "step"), (1, 16, 512), ((1024, 1024), (2048, 2048)), (16,)),
                *_grid(("forward", "step"), (512,), ((1024, 1024),), (16,), dropouts=(0.1,)),
                *_grid(("overhead", "overhead-grad"), (1,), ((64, 64),), (16,)),
                *_grid(("memory",), (512,), ((1024, 1024),), (16,), dropouts=(0.0, 0.1)),
            ),
            (*_RIVALS, "ours"),
            budget=45.0,
            min_rounds=5,
        ),
        Preset(
            "cpu-grid",
            "the CPU grid that bench/targets.py judges, a quarter of an hour for each dtype",
            tuple(_cpu_grid()),
            ("peft", "addmm", "auto"),
            device="cpu",
            budget=1800.0,
            max_call=3.0,  # PyTorch's 16-bit dy W takes minutes on some CPUs
        ),
        Preset(
            "cpu-compile",
            "PEFT under torch.compile on the CPU, r = 16; apart from the grid because each cell compiles anew",
            tuple(_grid(("forward", "step"), (1, 16, 512, 2048), _CPU_SHAPES, (16,), ("float32", "bfloat16"))),
            ("peft", "addmm", "compile", "auto"),
            device="cpu",
            budget=1800.0,
        ),
        Preset(
            "eager-order",
            "the two orders of the plain composition: base product first or LoRA first",
            tuple(_grid(("forward", "dx"), (1, 16, 512, 2048), _SQUARE, (16,), ("float32", "bfloat16"))),
            ("addmm", "lora_first"),
            budget=420.0,
            min_rounds=5,
        ),
        Preset(
            "kernels",
            "the GPU grid, forward and backward apart",
            tuple(
                _grid(("forward", "backward"), _GPU_TOKENS, _GPU_SHAPES, (8, 16, 64, 128), ("bfloat16",), (0.0, 0.1))
            ),
            _ALL,
            device="cuda",
            budget=1500.0,
        ),
        Preset(
            "layers",
            "the GPU grid, forward and backward together",
            tuple(_grid(("step",), _GPU_TOKENS, _GPU_SHAPES, (8, 16, 64, 128), ("bfloat16",), (0.0, 0.1))),
            _ALL,
            device="cuda",
            budget=1200.0,
        ),
        Preset(
            "gpu-quick",
            "what make gpu-check runs: the published shapes at r = 16, in under a minute",
            (
                *_grid(("forward", "step"), (1, 16, 512, 8192), _GPU_SHAPES, (16,), ("bfloat16",)),
                *_grid(("forward", "step"), (8192,), _GPU_SHAPES, (16,), ("bfloat16",), (0.1,)),
                *_grid(("overhead", "overhead-grad"), (1,), ((1024, 1024),), (16,), ("bfloat16",)),
                *_grid(("memory",), (8192,), ((4096, 4096),), (16,), ("bfloat16",), (0.0, 0.1)),
            ),
            (*_RIVALS, "ours"),
            device="cuda",
            budget=50.0,
        ),
        Preset(
            "overhead",
            "host time of the module at one token, over F.linear",
            (
                *_grid(("overhead", "overhead-grad"), (1,), ((64, 64), (1024, 1024)), (16,), ("float32", "bfloat16")),
                *_grid(("overhead", "overhead-grad"), (1,), ((64, 64),), (16,), dropouts=(0.1,)),
            ),
            (*_RIVALS, "ours"),
            budget=30.0,
        ),
        Preset(
            "memory",
            "bytes kept for backward, and the peak of a step",
            (
                *_grid(("memory",), (2048,), ((4096, 4096),), (16,), ("float32", "bfloat16"), (0.0, 0.1)),
                *_grid(("memory",), (2048,), ((2048, 8192),), (16,), ("bfloat16",), (0.0, 0.1)),
            ),
            (*_RIVALS, "ours"),
            budget=60.0,
        ),
        Preset(
            "demo",
            "the worked example's layer: 32→32, r = 2, at batch 256",
            (
                *_grid(("forward",), (256,), ((32, 32),), (2,), bias=True),
                *_grid(("step",), (256,), ((32, 32),), (2,), bias=True, train_bias=True),
            ),
            (*_RIVALS, "ours"),
            budget=10.0,
        ),
        Preset(
            "smoke",
            "every path in a few seconds: for tests, its numbers mean nothing",
            (
                *_grid(("forward", "backward", "dx", "step"), (3, 96), ((64, 48),), (4,), bias=True),
                *_grid(("step",), (96,), ((64, 48),), (4,), ("bfloat16",), (0.0, 0.1)),
                *_grid(("step",), (96,), ((64, 48),), (4,), bias=True, train_bias=True),
                *_grid(("overhead", "overhead-grad"), (1,), ((64, 48),), (4,)),
                *_grid(("memory",), (96,), ((64, 48),), (4,), dropouts=(0.0, 0.1)),
            ),
            (*_RIVALS, "lora_first", "ours"),
            budget=3.0,
            min_rounds=3,
        ),
    )
}
