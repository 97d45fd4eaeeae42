"""The benchmarks of whole models: a run that is interrupted goes on, and tables and picture say what the file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import convergence, convergence_report, llamas, long_context, model_memory, tables

for package in ("matplotlib", "peft", "transformers"):
    pytest.importorskip(package)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny run of what needs no compiler."""
    monkeypatch.delitem(llamas.PROVIDERS, "compiled")
    places = {"--json": "runs.json", "--plot": "curves.svg", "--base": "base"}
    return ["--small", *(text for option, name in places.items() for text in (option, str(tmp_path / name)))]


def test_an_interrupted_run_goes_on_where_it_was(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune, made = convergence.fine_tune, []

    def interrupted(*given: Any) -> dict[str, Any]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(fine_tune(*given))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "fine_tune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convergence.main(arguments)
    assert convergence.main(arguments) == 0
    result = json.loads((tmp_path / "runs.json").read_text())
    assert result["runs"][:3] == made
    assert len(result["runs"]) == 2 * 2 * 3
    first = (tmp_path / "curves.svg").read_text()
    convergence_report.draw(result, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text() == first
    rows = convergence_report.summary(result)
    names = ("peft", "again", "ours")
    assert [(row.dropout, row.provider) for row in rows] == [(p, name) for p in (0.0, 0.1) for name in names]
    assert rows[0].apart == 0.0 <= rows[1].apart < rows[0].spread
    assert 0.0 <= rows[2].apart < rows[0].spread
    with pytest.raises(SystemExit, match="other settings"):
        convergence.main([*arguments, "--steps", "5"])


def test_a_provider_that_learns_something_else_is_not_within_the_seeds() -> None:
    curves = {"peft": ([5.0, 3.0], [5.0, 3.2]), "ours": ([5.0, 3.4], [5.0, 3.5])}
    runs = [
        {"provider": provider, "dropout": 0.0, "seed": seed, "held_out": held_out}
        for provider, seeds in curves.items()
        for seed, held_out in enumerate(seeds)
    ]
    theirs, ours = convergence_report.summary({"settings": {"dropouts": [0.0]}, "runs": runs})
    assert theirs.within
    assert not ours.within
    assert "NOT within" in str(ours)


def test_memory_is_measured_and_stands_in_a_table(tmp_path: Path) -> None:
    """PEFT keeps what this package does not: the product of gate and up, and with dropout copies of x."""
    assert model_memory.main(["--small", "--json", str(tmp_path / "model-memory.json")]) == 0
    result = json.loads((tmp_path / "model-memory.json").read_text())
    assert [cell["bytes"]["ours"]["kept"] < cell["bytes"]["peft"]["kept"] for cell in result["cells"]] == [True, True]
    for cell in result["block"]["cells"]:  # over 16 bits PEFT keeps casts of x as well
        assert 0 < cell["auto"]["bytes_kept"] < cell["peft"]["bytes_kept"] < cell["peft"]["bytes_peak"]
    page = tmp_path / "page.md"
    names = ("memory", "block-memory", "convergence")
    page.write_text("".join(f"<!-- model:{name} -->\n<!-- /model -->\n" for name in names))
    where = ["--file", str(page), "--results", str(tmp_path)]
    assert tables.main(["--check", *where]) == 1
    assert tables.main(["--write", *where]) == 0
    assert tables.main(["--check", *where]) == 0
    assert "| float32 | 0.1 | no |" in page.read_text()
    assert "| 24 | 0.05 |" in page.read_text()
    assert "Not measured yet." in page.read_text()
    page.write_text("<!-- model:speed -->\n<!-- /model -->\n")
    assert tables.main(["--check", *where]) == 1


def test_ways_to_hold_less_are_measured_and_stand_in_a_table(tmp_path: Path) -> None:
    assert long_context.main(["--small", "--json", str(tmp_path / "long-context.json")]) == 0
    result = json.loads((tmp_path / "long-context.json").read_text())
    held = {cell["way"]: {name: bytes["held"] for name, bytes in cell["bytes"].items()} for cell in result["cells"]}
    assert list(held) == list(long_context.WAYS)
    assert held["nothing"]["ours"] < held["nothing"]["peft"]
    for name in long_context.MEASURED:
        assert held["a checkpoint around each block"][name] < held["nothing"][name]
        assert held["activations on the host"][name] < 1000
    page = tmp_path / "page.md"
    page.write_text("<!-- model:long-context -->\n<!-- /model -->\n")
    where = ["--file", str(page), "--results", str(tmp_path)]
    assert tables.main(["--write", *where]) == 0
    assert "| activations on the host | 0.0 | 0.0 |" in page.read_text()
