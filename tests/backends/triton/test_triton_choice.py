"""Which plans there are for a cell, which is predicted best, and how plans are written down and read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_kernels.backends.triton.choose import candidates, ranking, tuned, ways
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, ExpandConfig, Machine, ShrinkConfig
from lora_kernels.backends.triton.choose.plans import (
    GLUON_PLANS,
    UNMEASURED,
    BaseFirst,
    Cell,
    FewTokens,
    Fused,
    LoraFirst,
    Plan,
    plan_from_json,
    plan_to_json,
)
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.errors import InvalidArgumentError
from made_tables import row_of

pytestmark = pytest.mark.usefixtures("without_nvrtc")  # what was measured, or is told, had no such plan

A100, H200, B200 = ARCHITECTURES.values()
SMALL = Machine(capability=86, sm_count=84, shared_memory=101376)
MACHINES = [*ARCHITECTURES.values(), SMALL, INTERPRETER]
SQUARE = Cell("forward", 8192, 4096, 4096, 16, "bfloat16", False)
CELLS = [
    replace(SQUARE, tokens=tokens, n=n, r=r, dtype=dtype, dropout=r > 16)
    for tokens, dtype in [(1, "bfloat16"), (16, "float32"), (64, "tf32"), (512, "float16"), (8192, "bfloat16")]
    for n in (40, 1024, 14336)
    for r in (1, 16, 130)
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"sm{machine.capability}")
def test_candidates(machine: Machine) -> None:
    """They fit, the compositions are among them, the best predicted come first, and JSON keeps them as they are."""
    for cell in CELLS:
        found = candidates.candidates(machine, cell)
        assert {LoraFirst, BaseFirst, Fused} <= {type(plan) for plan in found}
        assert len(set(found)) == len(found)
        seconds = [candidates.order(machine, cell, plan) for plan in found]
        assert machine.interpreter or seconds == sorted(seconds)
        for plan in found:
            assert candidates.fits(machine, cell, plan)
            assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"sm{machine.capability}")
def test_backward_candidates(machine: Machine) -> None:
    """The same of backward; a second stream comes first only by Gluon, where it was measured to help."""
    for cell in (replace(cell, direction="backward") for cell in CELLS):
        found = candidates.candidates(machine, cell)
        assert {plan.kind for plan in found} - {"dx_hopper", "dx_inside", "ring_grads"} == {"dx_fused", "dx_lora_first"}
        assert len(set(found)) == len(found)
        found = tuple(plan for plan in found if not isinstance(plan, UNMEASURED))  # they come last
        assert not found[0].beside or (isinstance(found[0], GLUON_PLANS) and cell.tokens >= 2048)
        assert any(plan.beside for plan in found) != machine.interpreter
        seconds = [candidates.order(machine, cell, plan) for plan in found]
        assert machine.interpreter or seconds == sorted(seconds)
        for plan in found:
            assert candidates.fits(machine, cell, plan)
            assert not candidates.fits(machine, replace(cell, direction="forward"), plan)
            assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_tensor_memory_has_no_room_for_the_persistent_kernels_over_fp16(direction: str) -> None:
    """On sm_100 Triton compiles them to a trap; a table's plan is refused too, the pointer's remains."""
    cell = replace(SQUARE, direction=direction)
    over_fp16 = replace(cell, dtype="float16")
    by_tma = {getattr(plan, "variant", "") for plan in candidates.candidates(H200, over_fp16)} - {"", "pointer"}
    assert "persistent" in by_tma
    for plan in candidates.candidates(B200, cell):
        assert candidates.fits(B200, over_fp16, plan) == (getattr(plan, "variant", "") in ("", "pointer")), plan
    assert "pointer" in {getattr(plan, "variant", "") for plan in candidates.candidates(B200, over_fp16)}
    assert "persistent" in {getattr(plan, "variant", "") for plan in candidates.candidates(B200, cell)}


def test_small_kernels_of_backward_are_split_where_the_machine_is_idle() -> None:
    """dh over N for 17 to 500 tokens, da over M where K's blocks are few; and not where the machine is full."""
    for tokens, k, split_dh, split_da in (
        (64, 4096, True, False),
        (8192, 1024, False, True),
        (8192, 65536, False, False),
    ):
        cell = replace(SQUARE, direction="backward", tokens=tokens, k=k)
        assert (ways.shrink_for(H200, cell.of_dy).splits > 1) == split_dh
        assert (ways.outer_for(H200, cell.of_x).splits > 1) == split_da


def test_dy_is_read_once_unless_partial_sums_outweigh_it() -> None:
    """They grow with R."""
    for r, joint in ((16, True), (128, False)):
        assert ways.dh_db_for(H200, replace(SQUARE, r=r).of_dy).joint == joint


@pytest.mark.parametrize(
    ("machine", "changes", "kind"),
    [
        (H200, {"tokens": 1}, "few_tokens"),
        (A100, {"tokens": 16}, "base_first"),
        (H200, {"tokens": 1, "r": 300}, "fused"),  # two launches, where the host is what counts
        (H200, {}, "hopper_inside"),
        (A100, {}, "lora_first"),
        (H200, {"dtype": "float32"}, "lora_first"),
        (H200, {"tokens": 64}, "fused"),
        (INTERPRETER, {}, "fused"),
        (INTERPRETER, {"tokens": 16}, "few_tokens"),
    ],
)
def test_what_an_untuned_machine_takes(machine: Machine, changes: dict[str, Any], kind: str) -> None:
    """A product that is assumed slower than the library's is not taken where its arithmetic counts."""
    assert candidates.candidates(machine, replace(SQUARE, **changes))[0].kind == kind


def test_a_narrow_strip_is_split() -> None:
    """N / BLOCK_N programs hide no latency: K is split, more at a smaller N."""
    few = [candidates.candidates(H200, replace(SQUARE, tokens=1, n=n))[0] for n in (256, 1024, 14336)]
    assert all(isinstance(plan, FewTokens) for plan in few)
    programs = [-(-n // plan.config.block_n) * plan.splits for n, plan in zip((256, 1024, 14336), few, strict=True)]
    assert few[0].splits > 1
    assert few[2].splits < few[1].splits  # without any split it lost wherever it was measured
    assert min(programs) > H200.sm_count // 4


def test_few_rows_of_h_are_split() -> None:
    """And many are not: there the machine is full."""
    for tokens, split in ((32, True), (512, True), (8192, False)):
        best = next(p for p in candidates.candidates(H200, replace(SQUARE, tokens=tokens)) if isinstance(p, LoraFirst))
        assert (best.shrink.splits > 1) == split


def test_a_faster_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice follows the assumptions: with a product as quick as the library's, the fused plan wins."""
    from lora_kernels.backends.triton.choose import hardware

    tiles = tuple(replace(tile, pointer=1.0) for tile in hardware.ASSUMED.tiles)
    monkeypatch.setattr(hardware, "ASSUMED", replace(hardware.ASSUMED, tiles=tiles, low_rank_step=0.2e-6))
    assert isinstance(candidates.candidates.__wrapped__(A100, SQUARE)[0], Fused)


@pytest.mark.parametrize(
    ("plan", "cell"),
    [
        (replace(candidates.candidates(H200, SQUARE)[-1]), None),
        (
            next(p for p in candidates.candidates(H200, SQUARE) if isinstance(p, Fused) and p.variant == "persistent"),
            A100,
        ),
        (next(p for p in candidates.candidates(H200, replace(SQUARE, tokens=1))), replace(SQUARE, tokens=32)),
    ],
    ids=["of this machine", "of a newer machine", "of fewer tokens"],
)
def test_a_table_s_plan_is_taken_where_it_fits(plan: Plan, cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = cell if isinstance(cell, Machine) else H200
    cell = cell if isinstance(cell, Cell) else SQUARE
    monkeypatch.setattr(tuned, "lookup", lambda device, cell: row_of(cell, plan))
    chosen = ranking.plans_for.__wrapped__(torch.device("cuda", 0), machine, cell)[0]
    assert chosen == (plan if candidates.fits(machine, cell, plan) else candidates.candidates(machine, cell)[0])
    assert (chosen == plan) == (machine is H200 and cell == SQUARE)


GOOD = plan_to_json(LoraFirst(ShrinkConfig(64, 128, 16, 4, 4), ExpandConfig(64, 128, 16, 4), True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "magic"}, "one of ring, few_tokens, fused, .*, dx_fused, .*, dx_hopper_group; got"),
        ({"pdl": 1}, "pdl of LoraFirst is 1 and must be true or false"),
        ({"pdl": None, "splits": 3}, "LoraFirst has the fields shrink, expand, pdl; got"),
        ({"shrink": 5}, "ShrinkConfig has the fields block_m, .*; got 5"),
        ({"expand": {**GOOD["expand"], "block_m": 48}}, "block_m of ExpandConfig is 48 and must be .* a power of 2"),
        ({"shrink": {**GOOD["shrink"], "splits": 0}}, "splits of ShrinkConfig is 0 and must be a positive integer"),
    ],
)
def test_nonsense_is_no_plan(change: dict[str, Any], sentence: str) -> None:
    assert plan_from_json(GOOD).kind == "lora_first"
    with pytest.raises(InvalidArgumentError, match=sentence):
        plan_from_json({**GOOD, **change})
    with pytest.raises(InvalidArgumentError, match="a plan is an object"):
        plan_from_json([])  # type: ignore[arg-type]
