"""What a machine takes for bytes, flops, chains of loads and launches: the terms that every cost model is made of.

``ASSUMED`` is everything in them that was not counted, in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

from .blocks import Machine

__all__ = [
    "ASSUMED",
    "Assumptions",
    "chain_seconds",
    "draw_seconds",
    "flop_rate",
    "idle_seconds",
    "l2_seconds",
    "launch_seconds",
    "memory_seconds",
    "read_seconds",
]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the large product, and what share of the library's rate each kernel reaches with it."""

    rows: int
    columns: int
    library: float
    pointer: float
    persistent: float
    dx_pointer: float
    dx_persistent: float


@dataclass(frozen=True, slots=True)
class Assumptions:
    """The constants, in seconds where they are no shares.

    Measured on an H100 (``bench/results/nvidia-h100``): ``memory`` (a read of x alone), ``adapter_bytes``'s default is
    the package's. Fitted to hopper_step.json: what is named ``gluon``,
    ``masked``, ``inside``, ``draw`` or ``joint``. Fitted to tune.json, cells without dropout, together with it: the
    rest. tune.json's cells with dropout drew the mask anew in every tile, which no kernel does any more, so none of
    them is used: of the plain plans under dropout only the mask's bytes and its own kernel are modelled.

    ``member_tile`` is fitted to an H200's ``step-profile.json``: q, k and v of 4096 to 4096, 1024 and 1024 columns,
    r = 16, p = 0.1. Of 2048 tokens masked da took 53.7 us beside a dx of 145.0, of 8192 tokens 97.4 beside 616.1. Where
    dx has a tile less, on 16 and on 64 multiprocessors, da began a 4th and a 16th of dx before its end. Elsewhere it
    began when dx ended. So a program of 8 steps took 17.4 us, one of 32 steps 58.9: 1.7 us a step of three members. The
    machine code agrees: a step masks for 1026 cycles, multiplies for 768 and stores for 512, in turn, and waits at
    barriers. The figures are means of ten calls; in some of those of 8192 tokens da may have begun before dx.

    Attributes:
        library: share of the tensor cores' peak that the library's large product reaches.
        tiles: what a tile reaches of that.
        low_rank_step, dx_low_rank_step: what a wave of tiles waits for h and B, for dh and A and the mask.
        memory: share of the data sheet's bandwidth that a kernel reaches; ``l2`` times that from the L2 cache.
        multiprocessor: how many times its even share of the bandwidth one multiprocessor can draw.
        latency, outer_latency: of a load, until the product that uses it is done; of da, db and dh with db.
        ramp: until the large product's first loads arrive and its last programs end; ``read_ramp`` likewise of what
            reads a matrix at the memory's pace, at most as long as it reads.
        launch, early_launch: what a launch costs, in order and by programmatic dependent launch.
        fork: what forking and joining streams costs the device; ``overlap``: of what could hide beside the library's
            product, what does: it is launched with it, and takes multiprocessors from the first wave too.
        joint: share of the bandwidth that dh with db reaches; ``dx_expand`` what D * (dh A) does.
        draw: 32-bit operations that drawing the packed mask takes an element, which loads do not hide; ``draw_step``
            what a step of the Gluon shrink waits for its words.
        adapter_bytes: bytes of an element of lora_a and lora_b: fp32 over a 16-bit base is the default.
        gluon, gluon_narrow: what the Gluon product reaches of the library's rate, with 256 columns and with 128.
        gluon_step, masked_step: what a wave of it adds, and one that masks the low-rank term.
        inside: what forming h adds to a tile, as a share of it; the tiles of two columns do.
        masked_read: share of the bandwidth that da reaches under a mask.
        member_tile: what a group's masked da takes a member and tile of 64 x 128, where a program is alone on its
            multiprocessor; ``member_pair``: what share of their sum two programs take there. That one is not
            measured: by the machine code 0.4 at best, and 1, which is assumed, if neither fills the other's waits.
    """

    library: float = 0.745
    tiles: tuple[Tile, ...] = (
        Tile(128, 256, 1.0, 0.88, 0.90, 0.88, 0.95),
        Tile(128, 128, 0.95, 0.80, 0.86, 0.75, 0.86),
        Tile(64, 256, 0.85, 0.50, 0.55, 0.60, 0.80),
        Tile(64, 128, 0.80, 0.50, 0.58, 0.50, 0.56),
        Tile(64, 64, 0.60, 0.40, 0.40, 0.40, 0.40),
        Tile(32, 64, 0.40, 0.30, 0.30, 0.30, 0.30),
    )
    low_rank_step: float = 0.4e-6
    dx_low_rank_step: float = 1.6e-6
    memory: float = 0.88
    l2: float = 1.6
    multiprocessor: float = 2.4
    latency: float = 0.8e-6
    outer_latency: float = 1.33e-6
    ramp: float = 0.9e-6
    read_ramp: float = 2.7e-6
    launch: float = 1.85e-6
    early_launch: float = 1.3e-6
    fork: float = 1.4e-6
    overlap: float = 0.4
    joint: float = 0.92
    dx_expand: float = 0.58
    draw: float = 3.9
    draw_step: float = 0.12e-6
    adapter_bytes: int = 4
    gluon: float = 1.01
    gluon_narrow: float = 0.95
    gluon_step: float = 0.06e-6
    masked_step: float = 0.8e-6
    inside: float = 0.24
    masked_read: float = 0.87
    member_tile: float = 0.56e-6
    member_pair: float = 1.0


ASSUMED = Assumptions()

# Flops of 16-bit products with fp32 sums, a multiprocessor and cycle, by compute capability (data sheets, dense); TF32
# has half. fp32 on the plain units: 128, or 64 before 8.6 and 10.0's 128, multiply-adds.
_FLOPS_A_CYCLE = ((100, 8192), (90, 4096), (86, 1024), (80, 2048))
_INTEGER_OPERATIONS_A_CYCLE = 64


def flop_rate(machine: Machine, itemsize: int, tf32: bool) -> float:
    """Flop/s of the library's large product."""
    flops = next((flops for capability, flops in _FLOPS_A_CYCLE if machine.capability >= capability), 1024)
    if itemsize == 4:
        flops = flops // 2 if tf32 else (128 if machine.capability == 80 else 256)
    return ASSUMED.library * flops * machine.sm_count * machine.clock


def memory_seconds(machine: Machine, moved: float, programs: float = float("inf")) -> float:
    """Seconds to move ``moved`` bytes; few programs cannot draw the whole bandwidth."""
    share = min(1.0, ASSUMED.multiprocessor * programs / machine.sm_count)
    return moved / (ASSUMED.memory * machine.bandwidth * share)


def l2_seconds(machine: Machine, moved: float) -> float:
    """Seconds to move ``moved`` bytes from and to the L2 cache."""
    return memory_seconds(machine, moved) / ASSUMED.l2


def chain_seconds(machine: Machine, programs: float, steps: float, tile: float, stages: int, latency: float) -> float:
    """Seconds of a loop of ``steps`` loads of ``tile`` bytes, ``stages`` - 1 of them in flight; two programs share a
    multiprocessor."""
    rounds = -(-programs // (2 * machine.sm_count))
    one = ASSUMED.multiprocessor * ASSUMED.memory * machine.bandwidth / machine.sm_count
    return rounds * steps * (latency + tile / one) / max(1, stages - 1)


def read_seconds(seconds: float) -> float:
    """Of a kernel that reads a matrix in ``seconds``: with its ramp and its launch."""
    return seconds + min(ASSUMED.read_ramp, seconds) + ASSUMED.launch


def draw_seconds(machine: Machine, elements: float) -> float:
    """Seconds of the arithmetic that draws the mask of ``elements``, packed."""
    return ASSUMED.draw * elements / (_INTEGER_OPERATIONS_A_CYCLE * machine.sm_count * machine.clock)


def launch_seconds(early: bool = False) -> float:
    """Seconds of a launch; ``early``: by programmatic dependent launch."""
    return ASSUMED.early_launch if early else ASSUMED.launch


def idle_seconds(
    machine: Machine, tiles: int, waves: int, large: float, rest: float, share: float | None = None
) -> float:
    """Of ``rest`` seconds on a second stream, what the multiprocessors do that the last of ``waves`` of a product of
    ``large`` seconds leaves idle.

    ``share``: how many times its even share of ``rest`` one multiprocessor can do, if that is not a read of bytes.
    """
    idle = waves - tiles / machine.sm_count
    return min(rest, min(1.0, (share or ASSUMED.multiprocessor) * idle) * large / waves)
