"""Who is said to be ahead: the automatic choice alone, the slack stated, the noise beside it, nothing left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import made_tables
from bench import tables
from lora_kernels.backends.triton.choose import candidates
from lora_kernels.benchmark import block, report, results
from lora_kernels.benchmark.grid import grid
from lora_kernels.benchmark.predicted_table import beside
from lora_kernels.benchmark.verdict import SLACK, memory_summary, summary, verdict_of
from lora_kernels.tuning.report import outcomes_table
from lora_kernels.tuning.search import Found
from lora_kernels.tuning.session import Outcome
from made_results import STEP, made_cell, result_of


def spread(cell: results.Cell, **ranges: tuple[float, float]) -> results.Cell:
    """``cell`` with the 20th and 80th percentiles of some of its providers."""
    for name, (low, high) in ranges.items():
        cell.providers[name].numbers.update(ratio_p20=low, ratio_p80=high)
    return cell


BETTER_BACKEND = made_cell(addmm=2.01, auto=2.51, eager=1.99)  # what a user gets takes 2.51


def test_a_backend_that_nobody_gets_does_not_win_for_us() -> None:
    result = result_of(BETTER_BACKEND)
    for content in (report.table(result, "step"), beside(result, "step")):
        assert content.losses == {(0, content.header.index("lora_kernels"))}
        assert content.rows[0][-1] == "−25 %"
        assert "ahead of the automatic choice by more than 2 % in 1 of 1 cells (addmm_ 1)" in " ".join(content.notes)
    assert "by more than 2 % in 1 of 1 cells" in " ".join(grid(result_of(made_cell(peft=1.0, auto=1.5)), "step").notes)


@pytest.mark.parametrize(("rival", "sign"), [(1.0, 0), (0.985, 0), (0.975, -1), (1.015, 0), (1.025, 1)])
def test_the_slack_is_the_same_both_ways_and_stated(rival: float, sign: int) -> None:
    result = result_of(made_cell(peft=rival, auto=1.0))
    verdict = verdict_of(result, result.cells[0])
    assert verdict is not None
    assert (verdict.rival, verdict.sign) == ("peft", sign)
    assert f"more than {100 * SLACK:g} %" in summary(result, result.cells)[0]


def test_the_best_of_all_rivals_counts() -> None:
    result = result_of(made_cell(peft=1.5, peft16=1.3, lorafusion=1.1, auto=1.2))
    verdict = verdict_of(result, result.cells[0])
    assert verdict is not None
    assert (verdict.rival, verdict.sign) == ("lorafusion", -1)


def test_the_noise_stands_beside_the_verdict() -> None:
    sure = spread(made_cell(peft=1.2, auto=1.0), peft=(1.188, 1.212), auto=(0.95, 1.05))
    unsure = spread(made_cell(replace(STEP, r=5), peft=1.05, auto=1.0), peft=(1.0, 1.1), auto=(0.98, 1.02))
    result = result_of(sure, unsure)
    assert [str(verdict_of(result, cell)) for cell in result.cells] == ["+20 % ±5.0", "+5 % ±4.8"]
    told = " ".join(summary(result, result.cells))
    assert "spread by ±4.9 % (20th to 80th percentile; median of the cells, at most ±5.0 %)" in told
    assert "In 1 of the cells with a lead both ranges overlap." in told


def test_a_cell_that_ours_failed_in_is_told_and_not_counted_as_won() -> None:
    failed = made_cell(replace(STEP, r=5), peft=1.2)
    failed.providers["auto"] = results.Entry("failed", "It computes something else: y.")
    result = result_of(made_cell(peft=1.5, auto=1.0), failed)
    told = " ".join(report.table(result, "step").notes)
    assert "in 0 of 1 cells" in told
    assert "1 more have no verdict" in told


def test_without_a_rival_nothing_is_said_of_who_is_ahead() -> None:
    result = result_of(made_cell(auto=0.5, eager=0.4))
    assert summary(result, result.cells) == [
        "The automatic choice has no rival beside it here: nothing is said of who is ahead."
    ]
    assert report.table(result, "step").losses == frozenset()


def test_of_memory_the_peak_is_judged_too() -> None:
    cell = results.Cell(replace(STEP, direction="memory"), {})
    for name, rest, peak in (("linear", 0, 4), ("auto", 32, 5), ("addmm", 32, 4.2), ("eager", 1, 1)):
        cell.providers[name] = results.Entry("measured", numbers={"rest": rest * 1024.0, "peak": peak * 1024.0**2})
    result = result_of(cell)
    assert memory_summary(result, result.cells) == [
        "A rival keeps less than the automatic choice in 0 of 1 cells.",
        "A rival has a lower peak than the automatic choice in 1 of 1 cells.",
    ]
    assert set(memory_summary(result, result.cells)) <= set(report.table(result, "memory").notes)


def test_without_a_rival_nothing_is_said_of_memory() -> None:
    cell = results.Cell(replace(STEP, direction="memory"), {})
    for name in ("linear", "auto"):
        cell.providers[name] = results.Entry("measured", numbers={"rest": 0.0, "peak": 1024.0})
    result = result_of(cell)
    assert memory_summary(result, result.cells) == []
    assert not any("0 of 0" in note for note in report.table(result, "memory").notes)


def test_the_readme_shows_no_predicted_number_and_the_commit() -> None:
    readme = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        marker for marker in ("<!-- predicted:", "<!-- beside:", "Predicted", "| predicted") if marker in readme
    ] == []
    captions = [line for line in readme.splitlines() if "NVIDIA H200" in line and "; torch " in line]
    assert captions
    assert all("at commit b3c28c2776bf" in line for line in captions)
    assert any("A rival is ahead of lora_kernels by more than 2 % in" in line for line in readme.splitlines())


def test_what_other_commands_wrote_does_not_hinder_the_tables() -> None:
    folder = tables.ROOT / "bench" / "results"
    assert tables.newest(folder, "nvidia-h100", "gpu-quick").environment["device"] == "NVIDIA H100 80GB HBM3"
    assert tables.newest(folder, "nvidia-h200", "gpu-quick").environment["device"] == "NVIDIA H200"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("nvidia-*/*.json"))
    assert re.findall(r'[\s"=:]/\w+/[^"]*', text) == []  # no path of the machine that measured


def test_the_block_s_table_has_its_spread_and_its_misses() -> None:
    document = json.loads((tables.ROOT / "bench/results/nvidia-h100/block.json").read_text(encoding="utf-8"))
    content = block.table(document)
    assert [row[6] for row in content.rows] == ["1.605 ±0.165", "1.353 ±0.072", "1.144 ±0.026", "1.221 ±0.040"]
    assert "1 of 4 rows miss" in content.notes[0]
    assert "1.605 ±0.165" in "\n".join(block.told(document))


@pytest.mark.parametrize(("clock", "told"), [("graph", True), ("events", False)])
def test_the_tuner_tells_its_spread_and_what_a_graph_leaves_out(clock: str, told: bool) -> None:
    every = candidates.candidates(made_tables.H200, made_tables.CELL)
    chosen = next(plan for plan in every if getattr(plan, "beside", False))
    other = next(plan for plan in every if plan.kind == "lora_first")
    timings = {
        plan: replace(made_tables.timing([ratio - 0.01, ratio, ratio + 0.01] * 3), clock=clock)
        for plan, ratio in ((chosen, 1.05), (other, 1.10))
    }
    floor = made_tables.timing([1.0] * 3)
    predicted = dict.fromkeys(timings, 4e-4)
    found = Found(made_tables.CELL, chosen, floor, timings, predicted, {}, None, other)
    outcome = Outcome(made_tables.CELL, "tuned", made_tables.row(plan=chosen), found)
    content = outcomes_table([outcome], "GPU", made_tables.H200)
    assert {"1.050 ±0.010", "1.100 ±0.010"} <= set(content.rows[0])
    sentence = "1 choices were timed in CUDA graphs, where launching costs nothing."
    assert (content.notes[-1] == sentence) is told
