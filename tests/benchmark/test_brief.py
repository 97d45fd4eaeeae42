"""README's first number, its short table and its picture: measured, and with the losses that the rows do not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import brief, speed_plot, tables
from lora_kernels.errors import InvalidArgumentError
from made_results import STEP, made_cell, result_of

LARGE = replace(STEP, tokens=8192)
WON, LOST = made_cell(peft=1.5, addmm=1.4, auto=1.1), made_cell(LARGE, peft=1.5, addmm=1.2, auto=1.3)


def test_rows_are_chosen_and_all_cells_are_counted() -> None:
    text = brief.brief(result_of(WON, LOST), [("step", {"tokens": (str(STEP.tokens),)})])
    rows = [line for line in text.splitlines() if line.startswith("| forward + backward |")]
    assert len(rows) == 1
    assert "| 1.50 | 1.40 | **1.10** | +27 % |" in rows[0]
    assert "more than 2 % in 1 of all 2 cells that were measured (addmm_ 1);" in " ".join(text.split())
    assert "lora_kernels is ahead in 1, and 0 are level." in " ".join(text.split())


def test_a_loss_is_not_marked_as_ours() -> None:
    row = brief.brief(result_of(LOST), [("step", {})]).splitlines()[5]
    assert "| 1.50 | **1.20** | 1.30 | −8 % |" in row


def test_the_host_s_time_outside_of_graphs_is_told() -> None:
    cell = made_cell(replace(STEP, direction="overhead"), addmm=1.2, auto=1.4)
    for name, over in (("addmm", 60.4), ("auto", 103.6)):
        cell.providers[name].numbers["over_floor_us"] = over
    text = " ".join(brief.brief(result_of(WON, cell), [("step", {})]).split())
    assert "one call cost the host 104 µs more than the frozen layer does; addmm_ cost it 60 µs more." in text
    assert "in 0 of all 1 cells" in text  # host time is no cell of a pass


def test_lines_are_no_longer_than_a_page() -> None:
    lines = brief.brief(result_of(WON, LOST), [("step", {})]).splitlines()
    assert all(len(line) <= brief.WIDTH for line in lines if not line.startswith("|"))


@pytest.mark.parametrize("chosen", [("memory", {}), ("step", {"tokens": ("5",)})])
def test_rows_that_are_not_there_are_an_error(chosen: tuple[str, dict[str, tuple[str, ...]]]) -> None:
    with pytest.raises(InvalidArgumentError):
        brief.brief(result_of(WON), [chosen])


def test_passes_are_joined_in_a_brief_table_alone(tmp_path: Path) -> None:
    result_of(WON, made_cell(replace(STEP, direction="forward"), peft=1.5, auto=1.2)).save(tmp_path / "box" / "a.json")
    text = tables.fill("<!-- brief:box/smoke/step+forward -->\n<!-- /brief -->\n", tmp_path)
    assert [line.split(" |")[0] for line in text.splitlines() if "→" in line and "K→N" not in line] == [
        "| forward + backward",
        "| forward",
    ]
    assert tables.fill(text, tmp_path) == text
    with pytest.raises(InvalidArgumentError):
        tables.fill("<!-- table:box/smoke/step+forward -->\n<!-- /table -->\n", tmp_path)


def test_the_first_number_is_of_the_largest_batch_of_both() -> None:
    cells = [
        {"provider": name, "batch": batch, "again": False, "numbers": {"tokens_per_second": speed}}
        for name, batch, speed in (("peft", 1, 9.0), ("fused", 1, 10.0), ("fused", 2, 12345.6), ("fused", 4, 99.0))
    ]
    document = {
        "environment": {"device": "a card"},
        "sizes": {"tokens": 4096},
        "dropout": 0.1,
        "reached": {"common": {"batch": 2, "over peft": 1.123, "over frozen": 0.945, "peak over peft": 0.661}},
        "cells": cells,
    }
    sentence = " ".join(brief.headline(document).split())
    assert sentence.startswith("On one a card, Llama-3-8B with adapters of rank 16 ")
    assert "dropout 0.1 trained at 12346 tokens a second, 2 x 4096 a step." in sentence
    assert (
        "1.12 times the speed of PEFT with 16-bit adapters, and 0.94 times the frozen model's, in 0.66 times"
        in sentence
    )


def test_the_picture_holds_no_prediction() -> None:
    result = speed_plot.measured(tables.newest(tables.ROOT / "bench" / "results", "nvidia-h200", "gpu-quick"))
    assert {cell.workload.shape for cell in result.cells} == set(speed_plot.SHAPES)
    assert {(cell.workload.direction, cell.workload.p) for cell in result.cells} == {("forward", 0.0)}
    assert not any(entry.predicted for cell in result.cells for entry in cell.providers.values())
