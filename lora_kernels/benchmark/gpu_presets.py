"""The grids for a GPU: the shapes of the published tables, and M from 1 to 16384.

=============== ===== ======= ======================================================================================
preset          cells seconds what for
=============== ===== ======= ======================================================================================
gpu-goals          19      45 the cells that the project's goals speak of: the first part of ``make gpu-bench``
gpu-goals-group     3      10 likewise of q, k and v together
gpu-quick          34      80 what says the most in a minute and a half
gpu-forward       480     900 the forward grid: 12 M, 5 shapes, r 8 to 128, p 0 and 0.1
gpu-compile       480    1500 the same grid with PEFT under ``torch.compile``
gpu-overhead        8      20 host time of a call at M = 1
gpu-step          480    1100 forward and backward together; gpu-backward (480, 1100): backward alone
gpu-step-compile  120     900 forward and backward of r = 16 with PEFT under ``torch.compile``
gpu-ratios         18     300 LoRA beside DoRA, several adapters, three layers of one x, a decoder block
=============== ===== ======= ======================================================================================

``gpu-block`` (``block.py``) and ``gpu-llama`` (``llama.py``), a decoder block and a whole model, are no grids.
The grids are meant to be run in parts: ``bench --preset gpu-forward --json FILE --resume --limit 330`` starts no cell
after 330 seconds, and the next such call goes on after it. The cells of the targets come first (r = 16 at M = 8192;
few tokens of 4096→4096), then the rest of r = 16, then the other ranks, so that a run that is cut off answers the most;
``gpu-compile`` goes layer by layer, r = 16 first, because a layer's cells share what was compiled for it.

Where the seconds go (estimates; a run writes down what each cell took): a cell builds up to 16 sets of 6 layers (about
0.15 s), checks each provider in float64 (0.1 s), calibrates and captures graphs (0.2 s), and times at least 7 rounds of
6 providers, each sample 1.5 to 10 ms (0.15 to 0.4 s): 0.6 to 0.9 s, and what its share of the budget (1.9 s of 900)
leaves goes into more rounds. The first cell of a shape, rank and bucket of M compiles Triton kernels, about 1.5 s each
and 70 in the grid; after ``lora-kernels tune`` on the same machine they are in Triton's cache. ``gpu-compile`` compiles
each layer (shape, rank, p) once with a symbolic M and once for M = 1 (with dropout once more, for the check without
it), 3 to 6 s each and 120 in the grid: 30 of them, 150 s, for r = 16, whose 120 cells are there in one call of nine
minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .preset import MODEL_PEERS, Preset, grid
from .workloads import Workload

__all__ = ["GPU_PRESETS"]

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096), (4096, 1024))
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
RANKS = (16, 64, 8, 128)
_RIVALS = ("peft", "peft16", "addmm", "lorafusion")


def _cells(
    direction: str,
    tokens: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    ranks: tuple[int, ...] = (16,),
    dropouts: tuple[float, ...] = (0.0, 0.1),
) -> Iterator[Workload]:
    return grid((direction,), tokens, shapes, ranks, ("bfloat16",), dropouts)


def _targets(direction: str) -> Iterator[Workload]:
    """What the targets speak of: many tokens of every shape, few of the square one."""
    yield from _cells(direction, (8192,))
    yield from _cells(direction, (1, 2, 4, 8, 16), SHAPES[:1], dropouts=(0.0,))


def _whole_grid(direction: str) -> tuple[Workload, ...]:
    cells = [*_targets(direction), *(w for r in RANKS for w in _cells(direction, TOKENS, ranks=(r,)))]
    return tuple(dict.fromkeys(cells))


def _goals() -> Iterator[Workload]:
    """``bench/gpu_targets.py --pass goals`` judges these: forward, and steps without and with dropout."""
    yield from _cells("forward", (8192,), dropouts=(0.0,))
    yield from _cells("step", (8192,), dropouts=(0.0,))
    yield from _cells("step", (8192,), dropouts=(0.1,))
    yield from _cells("step", (2048, 512), SHAPES[:1])


def _goals_of_groups() -> Iterator[Workload]:
    """q, k and v of Llama-3-8B: 4096 + 1024 + 1024 outputs of one x."""
    for direction, dropouts in (("forward", (0.0,)), ("step", (0.0, 0.1))):
        yield from grid((direction,), (8192,), SHAPES[:1], (16,), ("bfloat16",), dropouts, subject="three-layers")


def _ratios() -> tuple[Workload, ...]:
    """What the targets speak of at M = 4096, and the same of one token where only launches count."""
    cells: list[Workload] = []
    for subject in ("dora", "decoder-block", "three-layers", "two-adapters", "three-adapters", "mixed-batch"):
        direction = "forward" if subject == "mixed-batch" else "step"
        shape = (4096, 14336) if subject == "decoder-block" else (4096, 4096)
        cells += grid((direction,), (4096, 512), (shape,), (16,), ("bfloat16",), subject=subject)
    cells += grid(("step",), (4096,), ((4096, 4096),), (16,), ("bfloat16",), (0.1,), subject="dora")
    cells += grid(("step",), (4096,), SHAPES[2:], (16,), ("bfloat16",), subject="dora")
    for subject in ("dora", "three-layers"):
        cells += grid(("forward",), (1,), ((4096, 4096),), (16,), ("bfloat16",), subject=subject)
    return tuple(cells)


def _preset(name: str, describe: str, workloads: tuple[Workload, ...], peers: tuple[str, ...], **more: Any) -> Preset:
    return Preset(name, describe, workloads, peers, device="cuda", **more)


GPU_PRESETS = (
    _preset(
        "gpu-goals",
        "the cells that the project's goals speak of, in a minute",
        tuple(_goals()),
        (*_RIVALS, "auto"),
        budget=45.0,
    ),
    _preset(
        "gpu-goals-group",
        "the goals' cells of q, k and v together",
        tuple(_goals_of_groups()),
        ("peft-lora", "fused-lora", "ours-lora", "group"),
        budget=10.0,
    ),
    _preset(
        "gpu-quick",
        "the cells that say the most, in a minute and a half",
        (
            *_targets("forward"),
            *_cells("overhead", (1,), SHAPES[:1], dropouts=(0.0,)),
            *_cells("forward", (256, 2048), dropouts=(0.0,)),
            *_cells("overhead-grad", (1,), SHAPES[:1], dropouts=(0.0,)),
            *_cells("step", (8192,), dropouts=(0.1,)),
            *_cells("memory", (8192,), SHAPES[:1]),
        ),
        (*_RIVALS, "auto"),
        budget=80.0,
    ),
    _preset(
        "gpu-forward",
        "the forward grid for a GPU, a quarter of an hour, in parts (--resume, --limit)",
        _whole_grid("forward"),
        (*_RIVALS, "auto"),
        budget=900.0,
    ),
    _preset(
        "gpu-compile",
        "the forward grid with PEFT under torch.compile, apart because of what compiling takes",
        tuple(w for r in RANKS for w in _cells("forward", (8192, *(m for m in TOKENS if m != 8192)), ranks=(r,))),
        ("compile", "auto"),
        budget=1500.0,
    ),
    _preset(
        "gpu-overhead",
        "host time of a call of the layer at one token, over F.linear, on a GPU",
        (
            *_cells("overhead", (1,), (SHAPES[0], SHAPES[4])),
            *_cells("overhead-grad", (1,), (SHAPES[0], SHAPES[4])),
        ),
        ("peft", "peft16", "addmm", "auto"),
        budget=20.0,
    ),
    _preset(
        "gpu-step",
        "the grid for a GPU, forward and backward together, in parts",
        _whole_grid("step"),
        (*_RIVALS, "auto"),
        budget=1100.0,
    ),
    _preset(
        "gpu-step-compile",
        "forward and backward of r = 16 with PEFT under torch.compile, in parts",
        tuple(_cells("step", (8192, *(m for m in TOKENS if m != 8192)))),
        ("compile", "auto"),
        budget=900.0,
    ),
    _preset(
        "gpu-backward",
        "the grid for a GPU, backward alone, in parts",
        _whole_grid("backward"),
        (*_RIVALS, "auto"),
        budget=1100.0,
    ),
    _preset(
        "gpu-ratios",
        "LoRA beside DoRA, several adapters, three layers of one x, a decoder block, on a GPU",
        _ratios(),
        MODEL_PEERS,
        budget=300.0,
    ),
)
