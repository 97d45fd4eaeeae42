"""Which way a group of layers takes: predicted, measured, explained; and what a row of it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_kernels.backends.triton import plans_on
from lora_kernels.backends.triton.choose import tuned, why
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.candidates import candidates, fits, in_order, of_row, predicted_seconds
from lora_kernels.backends.triton.choose.group_candidates import static_fault
from lora_kernels.backends.triton.choose.group_plans import GROUP_KERNELS, Apart
from lora_kernels.backends.triton.choose.hopper_group_blocks import group_da_configs
from lora_kernels.backends.triton.choose.hopper_group_cost import HopperGroupModel
from lora_kernels.backends.triton.choose.kernel_files import digest_of, files_of
from lora_kernels.backends.triton.choose.launching import GRAPH
from lora_kernels.backends.triton.choose.plans import Cell, is_of, plan_from_json, plan_to_json
from lora_kernels.backends.triton.choose.table import Row
from lora_kernels.benchmark.roofline import MACHINES
from lora_kernels.dispatch import Problem
from lora_kernels.errors import InvalidArgumentError
from made_tables import VERSIONS

H100 = MACHINES["h100"].gpu
assert H100 is not None
QKV = Cell("forward", 8192, 4096, 4096, 16, "bfloat16", False, ((1024, 16), (1024, 16)))
GATE_UP = replace(QKV, n=14336, others=((14336, 16),))
CELLS = [
    replace(cell, direction=direction, dropout=dropout, dtype=dtype)
    for cell in (QKV, GATE_UP, replace(QKV, r=64, others=((1024, 16),)))
    for direction in ("forward", "backward")
    for dropout in (False, True)
    for dtype in ("bfloat16", "float16")
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_apart_is_always_there_and_so_are_the_kernels(cell: Cell) -> None:
    plans = candidates(H100, cell)
    assert Apart() in plans
    assert {type(plan) for plan in plans} > {Apart}
    assert all(fits(H100, cell, plan) and is_of(plan, cell.direction) for plan in plans)
    seconds = [predicted_seconds(H100, cell, plan) for plan in plans]
    assert min(seconds) > 0
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_read_of_x_is_predicted_to_be_faster(direction: str) -> None:
    """Where memory counts, of many tokens: q, k and v of Llama-3-8B."""
    first = candidates(H100, replace(QKV, direction=direction))[0]
    assert isinstance(first, GROUP_KERNELS)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_prediction_is_that_of_one_layer_where_they_are_the_same(direction: str, dropout: bool) -> None:
    """A group's product is one layer's of all their columns, and never cheaper than the largest member's."""
    cell = replace(QKV, direction=direction, dropout=dropout)
    plan = next(plan for plan in candidates(H100, cell) if isinstance(plan, GROUP_KERNELS))
    largest = max(predicted_seconds(H100, own, candidates(H100, own)[0]) for own in cell.members)
    assert largest < predicted_seconds(H100, cell, plan) < predicted_seconds(H100, cell, Apart())


H200 = MACHINES["h200"].gpu
assert H200 is not None
_PROFILED = {2048: (53.7, 145.0, 4), 8192: (97.4, 616.1, 16)}  # da and dx in us, and the tiles of dx's last finisher


@pytest.mark.parametrize("tokens", _PROFILED)
def test_masked_da_is_predicted_as_it_was_profiled(tokens: int) -> None:
    """On an H200, beside dx: what da took after dx's end is what a program takes that begins there."""
    da, dx, tiles = _PROFILED[tokens]
    cell = replace(QKV, tokens=tokens, direction="backward", dropout=True)
    config = next(one for one in group_da_configs((16, 16, 16), True) if one.name == "c128")
    model = HopperGroupModel(H200, cell)
    assert model.da_is_arithmetic(config)
    assert 1e6 * model.da(config) == pytest.approx(da - dx / tiles, rel=0.05)


@pytest.mark.parametrize("machine", [H100, H200], ids=["h100", "h200"])
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_masked_da_is_by_one_program_a_multiprocessor_and_two_are_tried(machine: Machine, tokens: int) -> None:
    """They mask and multiply in turn; without masks da is bound by its bytes, and either will do."""
    cell = replace(QKV, tokens=tokens, direction="backward", dropout=True)
    plans = [plan for plan in candidates(machine, cell) if not isinstance(plan, Apart)]
    assert (plans[0].da.name, plans[0].da.ctas, plans[0].da.masked) == ("c128", 1, True)
    assert any(plan.da.name == "c128x2" for plan in plans)
    model = HopperGroupModel(machine, replace(cell, dropout=False))
    assert not any(model.da_is_arithmetic(config) for config in group_da_configs((16, 16, 16), False))


@pytest.mark.parametrize("ranks", [(16, 16), (64, 64), (64, 16), (16, 16, 16), (32, 32, 32)])
def test_two_masked_programs_share_the_registers(ranks: tuple[int, ...]) -> None:
    """What the consumers and the loading warps of both hold is what a multiprocessor has."""
    (config,) = (one for one in group_da_configs(ranks, True) if one.ctas == 2)
    assert config.consumer_registers == 232
    assert 2 * 32 * (4 * config.consumer_registers + 4 * 24) <= 65536


@pytest.mark.parametrize("tokens", [1, 16, 2**24])
def test_few_and_very_many_tokens_have_no_plan_of_the_kernels(tokens: int) -> None:
    assert candidates(H100, replace(QKV, tokens=tokens)) == (Apart(),)


def test_without_descriptors_only_apart_is_left() -> None:
    assert in_order(H100, QKV, None, descriptors=False) == (Apart(),)


def test_a_single_layer_has_no_plan_of_groups() -> None:
    single = replace(QKV, others=())
    group = next(plan for plan in candidates(H100, QKV) if isinstance(plan, GROUP_KERNELS))
    assert not fits(H100, single, group)
    assert not fits(H100, single, Apart())
    assert not fits(H100, QKV, candidates(H100, single)[0])
    assert not isinstance(in_order(H100, single, Apart())[0], Apart)


FAULTS: list[tuple[Machine, torch.dtype, tuple[tuple[int, int], ...], bool, str]] = [
    (H100, torch.bfloat16, ((64, 16),), False, "there are 1 layers and they are for 2 to 4"),
    (H100, torch.float32, ((64, 16),) * 2, False, "of layer 1, x is torch.float32"),
    (H100, torch.bfloat16, ((64, 16), (64, 129)), False, "of layer 2, rank 129"),
    (H100, torch.bfloat16, ((64, 16), (60, 16)), False, "multiples of 8"),
    (H100, torch.bfloat16, ((64, 16),) * 4, True, "masked terms of 3 layers at most"),
    (H100, torch.float16, ((4096, 128),) * 4, False, "has no tile with room for ranks 128, 128, 128, 128"),
    (replace(H100, capability=100), torch.bfloat16, ((64, 16),) * 2, False, "this GPU has 10.0"),
]


@pytest.mark.parametrize(("machine", "dtype", "sizes", "dropout", "sentence"), FAULTS)
def test_what_they_do_not_take_is_told(
    machine: Machine, dtype: torch.dtype, sizes: Any, dropout: bool, sentence: str
) -> None:
    assert sentence in (static_fault(machine, dtype, 4096, sizes, dropout) or "")


# ---- a tuned row


def a_row(cell: Cell, plan: Any) -> Row:
    return Row(
        cell, plan, 100.0, 90.0, 1.1, {plan.kind: 1.1}, 101.0, {**VERSIONS, "kernels": digest_of(plan.kind)}, "d"
    )


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_row_holds_a_group(cell: Cell) -> None:
    """Its JSON reads as it was; and its plan comes first, for this cell and its neighbours in tokens."""
    for plan in candidates(H100, cell)[-3:]:
        row = a_row(cell, plan)
        assert Row.from_json(row.to_json()) == row
        assert plan_from_json(plan_to_json(plan)) == plan
        table = tuned.Loaded(rows={cell: row})
        assert in_order(H100, cell, of_row(H100, cell, table.row(cell), GRAPH))[0] == plan
        assert table.row(replace(cell, tokens=2 * cell.tokens)) == row
        assert table.row(replace(cell, others=())) is None


def test_a_single_layer_s_row_is_as_it_was() -> None:
    single = replace(QKV, others=())
    assert "others" not in a_row(single, candidates(H100, single)[0]).to_json()["cell"]


@pytest.mark.parametrize("others", [[[1024]], [[1024, 0]], [[1024, "16"]], 5, [5]])
def test_a_row_of_no_group_is_refused(others: Any) -> None:
    document = a_row(QKV, Apart()).to_json()
    document["cell"]["others"] = others
    with pytest.raises(InvalidArgumentError, match="others of a cell"):
        Row.from_json(document)


def test_ranks_of_a_plan_are_checked() -> None:
    document = plan_to_json(candidates(H100, replace(QKV, direction="backward"))[0])
    document["da"]["ranks"] = [16, 17, 16]
    with pytest.raises(InvalidArgumentError, match="rank of HopperGroupDa is 17"):
        plan_from_json(document)


def test_a_group_s_digest_is_of_its_kernels() -> None:
    forward, backward = ({path.stem for path in files_of(kind)} for kind in ("hopper_group", "dx_hopper_group"))
    assert {"group_small", "group_shrink", "group_product", "small", "shrink", "product", "common"} <= forward
    assert {"group_small", "group_outer", "group_dx", "small", "outer", "product", "common"} <= backward
    assert not {"group_dx", "group_outer"} & forward
    assert not {"group_product", "group_shrink"} & backward
    assert {path.stem for path in files_of("apart")} >= {"few_tokens", "product_h", "backward", "persistent"}


# ---- explained


@pytest.mark.parametrize("cell", [*CELLS, replace(QKV, tokens=16)], ids=str)
def test_what_is_explained_is_what_is_taken(cell: Cell) -> None:
    told = why.pass_plan(H100, cell, tuned.Loaded(), "an H100")
    assert told.plan == str(candidates(H100, cell)[0])
    assert told.launches
    assert [other.plan for other in told.passed_over] != [told.plan]
    for plan in candidates(H100, cell):
        found = why.launches(cell, plan)
        assert all(launch.bytes > 0 for launch in found)
        assert isinstance(plan, Apart) or len(found) == plan.launches


def test_the_bytes_are_those_of_one_read_of_x() -> None:
    """Llama-3-8B's q, k, v: what stands in ``kernels/hopper/group_product.py``, in MB, A, B and h with them."""
    group, apart = (
        sum(launch.bytes for launch in why.launches(QKV, plan)) / 1e6
        for plan in (next(p for p in candidates(H100, QKV) if isinstance(p, GROUP_KERNELS)), Apart())
    )
    assert 285 < group < 300
    assert apart > group


def test_a_problem_with_others_tells_of_them() -> None:
    problem = Problem("cuda", torch.bfloat16, 4096, 4096, 16, others=QKV.others)
    for direction, told in zip(
        ("forward", "backward"), plans_on(H100, "an H100", tuned.Loaded(), problem, 8192), strict=True
    ):
        (note,) = [note for note in told.notes if "other layers of its x" in note]
        assert direction in note
        assert str(candidates(H100, replace(QKV, direction=direction))[0]) in note
        assert "apart" in note
