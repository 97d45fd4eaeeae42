"""The presets by name: what runs on any machine is here, what is for a GPU in ``gpu_presets``."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import InvalidArgumentError
from .gpu_presets import GPU_PRESETS
from .preset import MODEL_PEERS, QLORA_PEERS, Preset, grid
from .workloads import LAYERS, NF4, SUBJECTS, Workload

__all__ = ["PRESETS", "WHOLE", "preset"]


# The presets of whole models, which write a document of their own, each with the option that is its alone.
WHOLE = {"gpu-block": "block", "gpu-llama": "model", "llama-small": "model"}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidArgumentError: there is none.
    """
    if name not in PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is not known: name one of {', '.join((*PRESETS, *WHOLE))}.")
    return PRESETS[name]


_SQUARE = tuple((n, n) for n in (1024, 2048, 4096))
_CPU_SHAPES = (*_SQUARE, (2048, 8192), (8192, 2048))
_RIVALS = ("peft", "peft16", "addmm")


def _cpu_grid() -> Iterator[Workload]:
    """Dtype by dtype, so that a run that is cut off has whole tables: the grid, dropout, the worked example's layer."""
    for dtype in ("float32", "bfloat16"):
        yield from grid(("forward", "step"), (1, 16, 512, 2048), _CPU_SHAPES, (8, 16, 64), (dtype,))
        yield from grid(("forward", "step"), (1, 16, 512, 2048), ((2048, 2048),), (16,), (dtype,), (0.1,))
        yield from grid(("step",), (256,), ((32, 32),), (2,), (dtype,), bias=True, train_bias=True)


def _ratios() -> Iterator[Workload]:
    """DoRA beside LoRA, a decoder block, three layers of one x, several adapters.

    Steps in fp32 alone: PyTorch's 16-bit dy W takes minutes on some CPUs. Then forward in both dtypes.
    """
    square, many = ((2048, 2048),), ("two-adapters", "three-adapters")
    yield from grid(("step",), (512,), (*square, (1024, 1024)), (16,), subject="dora")
    yield from grid(("step",), (512,), square, (16,), dropouts=(0.1,), subject="dora")
    yield from grid(("step",), (256,), ((1024, 2816),), (16,), subject="decoder-block")
    for subject in ("three-layers", *many):
        yield from grid(("step",), (512,), square, (16,), subject=subject)
    for subject in ("dora", "three-layers", *many):
        yield from grid(("forward",), (1, 512), square, (16,), ("float32", "bfloat16"), subject=subject)
    yield from grid(("forward",), (512,), square, (16,), ("float32", "bfloat16"), subject="mixed-batch")


def _cpu_goals() -> Iterator[Workload]:
    """Dtype by dtype, forward then step, in the order of the work: what takes too long ends its row."""
    for dtype, adapters in (("float32", None), ("bfloat16", None), ("bfloat16", "bfloat16")):
        for direction in ("forward", "step"):
            for m, shape, r in (
                *((256, (32, 32), 2), (1, (1024, 1024), 16), (1, (4096, 4096), 16), (16, (2048, 2048), 16)),
                *((384, (2048, 2048), 16), (1024, (2048, 2048), 16), (384, (4096, 4096), 16)),
                *((768, (3072, 3072), 64), (768, (2048, 6144), 8)),
            ):
                yield from grid((direction,), (m,), (shape,), (r,), (dtype,), adapter_dtype=adapters)


def _qlora() -> Iterator[Workload]:
    """The sizes of a projection in bf16: forward of few tokens, a step of many, and what a step holds."""
    shapes, bf16 = ((2048, 2048), (4096, 4096)), ("bfloat16",)
    yield from grid(("forward",), (1, 16, 512, 2048), shapes, (16,), bf16, subject=NF4)
    yield from grid(("step",), (1, 16, 512, 2048), shapes, (16,), bf16, subject=NF4)
    yield from grid(("memory",), (2048,), shapes, (16,), bf16, subject=NF4)


PRESETS = {
    p.name: p
    for p in (
        *GPU_PRESETS,
        Preset(
            "quick",
            "a look at this machine in under a minute",
            (
                *grid(("forward", "step"), (1, 16, 512), ((1024, 1024), (2048, 2048)), (16,)),
                *grid(("forward", "step"), (512,), ((1024, 1024),), (16,), dropouts=(0.1,)),
                *grid(("overhead", "overhead-grad"), (1,), ((64, 64),), (16,)),
                *grid(("memory",), (512,), ((1024, 1024),), (16,), dropouts=(0.0, 0.1)),
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
            "cpu-goals",
            "the cells of the goals that bench/targets.py holds for every kind of CPU, in ten minutes",
            tuple(_cpu_goals()),
            ("peft", "addmm", "auto"),
            device="cpu",
            budget=600.0,
            min_rounds=5,
            max_call=3.0,  # as above
        ),
        Preset(
            "cpu-compile",
            "PEFT under torch.compile on the CPU, r = 16; apart from the grid because each cell compiles anew",
            tuple(grid(("forward", "step"), (1, 16, 512, 2048), _CPU_SHAPES, (16,), ("float32", "bfloat16"))),
            ("peft", "addmm", "compile", "auto"),
            device="cpu",
            budget=1800.0,
        ),
        Preset(
            "eager-order",
            "the two orders of the plain composition: base product first or LoRA first",
            tuple(grid(("forward", "dx"), (1, 16, 512, 2048), _SQUARE, (16,), ("float32", "bfloat16"))),
            ("addmm", "lora_first"),
            budget=420.0,
            min_rounds=5,
        ),
        Preset(
            "ratios",
            "LoRA beside DoRA, several adapters, three layers of one x, a decoder block: a quarter of an hour",
            tuple(_ratios()),
            MODEL_PEERS,
            device="cpu",
            budget=800.0,
            min_rounds=5,
            max_call=3.0,
        ),
        Preset(
            "smoke-ratios",
            "every cell of 'ratios' in small: for tests, its numbers mean nothing",
            tuple(
                Workload("forward" if s == "mixed-batch" else "step", 8, 64, 48, 4, bias=s == "dora", subject=s)
                for s in SUBJECTS
                if s not in LAYERS
            ),
            MODEL_PEERS,
            budget=1.0,
            min_rounds=2,
        ),
        Preset(
            "qlora",
            "LoRA over a weight in NF4, beside PEFT + bitsandbytes, the frozen NF4 layer and the frozen bf16 layer",
            tuple(_qlora()),
            QLORA_PEERS,
            budget=150.0,
            min_rounds=5,
            max_call=5.0,
        ),
        Preset(
            "smoke-qlora",
            "every path of 'qlora' in small: for tests, its numbers mean nothing",
            tuple(grid(("forward", "step", "memory"), (24,), ((64, 48),), (4,), ("bfloat16",), subject=NF4)),
            QLORA_PEERS,
            budget=1.0,
            min_rounds=2,
        ),
        Preset(
            "overhead",
            "host time of the module at one token, over F.linear",
            (
                *grid(("overhead", "overhead-grad"), (1,), ((64, 64), (1024, 1024)), (16,), ("float32", "bfloat16")),
                *grid(("overhead", "overhead-grad"), (1,), ((64, 64),), (16,), dropouts=(0.1,)),
            ),
            (*_RIVALS, "ours"),
            budget=30.0,
        ),
        Preset(
            "memory",
            "bytes kept for backward, and the peak of a step",
            (
                *grid(("memory",), (2048,), ((4096, 4096),), (16,), ("float32", "bfloat16"), (0.0, 0.1)),
                *grid(("memory",), (2048,), ((2048, 8192),), (16,), ("bfloat16",), (0.0, 0.1)),
            ),
            (*_RIVALS, "ours"),
            budget=60.0,
        ),
        Preset(
            "demo",
            "the worked example's layer: 32→32, r = 2, at batch 256",
            (
                *grid(("forward",), (256,), ((32, 32),), (2,), bias=True),
                *grid(("step",), (256,), ((32, 32),), (2,), bias=True, train_bias=True),
            ),
            (*_RIVALS, "ours"),
            budget=10.0,
        ),
        Preset(
            "smoke",
            "every path in a few seconds: for tests, its numbers mean nothing",
            (
                *grid(("forward", "backward", "dx", "step"), (3, 96), ((64, 48),), (4,), bias=True),
                *grid(("step",), (96,), ((64, 48),), (4,), ("bfloat16",), (0.0, 0.1)),
                *grid(("step",), (96,), ((64, 48),), (4,), bias=True, train_bias=True),
                *grid(("overhead", "overhead-grad"), (1,), ((64, 48),), (4,)),
                *grid(("memory",), (96,), ((64, 48),), (4,), dropouts=(0.0, 0.1)),
            ),
            (*_RIVALS, "lora_first", "ours"),
            budget=3.0,
            min_rounds=3,
        ),
    )
}
