"""Who multiplies by W on a CPU: what a table says, what the model says, and that the numbers are right either way."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import Case, make
from lora_kernels import dispatch, ops, use_backend
from lora_kernels.backends.native import choice, choice_table, load
from lora_kernels.backends.native.choice_table import Machine, ProductCell, Row
from lora_kernels.dispatch import Problem
from lora_kernels.info import collect
from numerics import same_bits
from test_native_cpu import DTYPES, check, run

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT))

CELL = ProductCell("forward", 64, 2048, 1024, "bfloat16")
ELSEWHERE = Machine("Another CPU", "own=portable", 3, "1.0", "0" * 12)
OTHER = {"own": "library", "library": "own"}


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No table but a test's own, and no environment variable that would decide before it; the library as it was."""
    dispatch.select("cpu", torch.float32, "native")
    functions = choice._functions()
    before = functions.lora_kernels_cpu_force_product(0)
    monkeypatch.delenv(choice.PRODUCT_VARIABLE, raising=False)
    with monkeypatch.context() as patched:
        patched.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        choice.install()
        yield
    choice.install()
    functions.lora_kernels_cpu_force_product(before)


def row(cell: ProductCell = CELL, chosen: str = "own", machine: Machine | None = None) -> Row:
    ratios = {"own": 1.1, "library": 1.2, "addmm": 1.3}
    return Row(cell, chosen, ratios, 100.0, machine or choice.machine(), "2026-11-26T00:00:00Z")


# The table


def test_a_machine_is_known_by_the_library_as_it_is_now(tmp_path: Path) -> None:
    file, functions = tmp_path / "library", choice._functions()
    for content in (b"one", b"another"):
        file.write_bytes(content)
        assert choice._machine_of(functions, file).library == hashlib.sha256(content).hexdigest()[:12]
    assert choice.machine().library == hashlib.sha256(load.load("cpu").path.read_bytes()).hexdigest()[:12]


@pytest.mark.parametrize(("dtype", "direction"), [*product(choice_table.DTYPES, choice_table.DIRECTIONS)])
def test_a_row_decides_for_its_own_cell_and_for_no_other_kind(dtype: str, direction: str) -> None:
    cell = replace(CELL, dtype=dtype, direction=direction)
    others = [replace(CELL, dtype=d, direction=p) for d, p in product(choice_table.DTYPES, choice_table.DIRECTIONS)]
    others.remove(cell)
    before = [choice.chosen(other) for other in others]
    for chosen in choice_table.CHOICES:
        choice.install_rows([row(cell, chosen)])
        assert choice.chosen(cell) == chosen
        assert [choice.chosen(other) for other in others] == before


REACHED = [{"tokens": m} for m in (17, 32, 63, 65, 256)] + [{"k": 1100}, {"k": 5000}, {"n": 512}, {"n": 2500}]
NOT_REACHED = [{"tokens": 16}, {"tokens": 257}, {"k": 700}, {"k": 8192}, {"n": 300}, {"n": 4096}]


@pytest.mark.parametrize(("changes", "reached"), [*product(REACHED, [True]), *product(NOT_REACHED, [False])], ids=str)
def test_how_far_a_row_reaches(changes: dict[str, int], reached: bool) -> None:
    cell = replace(CELL, **changes)
    model = choice.model(choice.machine().features, cell)
    choice.install_rows([row(chosen=OTHER[model])])
    assert choice.chosen(cell) == (OTHER[model] if reached else model)


def test_few_tokens_say_nothing_of_many_and_512_say_something_of_all_beyond() -> None:
    few, many, most = (replace(CELL, tokens=m) for m in (16, 512, 10**6))
    for chosen in choice_table.CHOICES:
        choice.install_rows([row(few, OTHER[chosen]), row(many, chosen)])
        assert [choice.chosen(c) for c in (few, many, most)] == [OTHER[chosen], chosen, chosen]


def test_the_nearest_row_decides() -> None:
    near, far = row(replace(CELL, tokens=128), "own"), row(replace(CELL, tokens=512), "library")
    for rows in ([near, far], [far, near]):
        choice.install_rows(rows)
        assert choice.chosen(replace(CELL, tokens=64)) == "own"
        assert choice.chosen(replace(CELL, tokens=300)) == "library"


def chosen_in_a_fresh_process() -> str:
    """What a process of this cache, with the library that is loaded here, does in CELL."""
    library = choice.load.load("cpu").path.parent
    link = choice_table.table_path().parent / library.name
    if not link.exists():
        link.symlink_to(library)
    cell = (CELL.direction, CELL.tokens, CELL.k, CELL.n, CELL.dtype)
    script = f"""
import torch
from lora_kernels import dispatch
from lora_kernels.backends.native import choice
dispatch.select("cpu", torch.float32, "native")
print(choice.chosen(choice.ProductCell(*{cell!r})))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_a_table_is_read_where_the_backend_is_registered_and_told_by_info() -> None:
    chosen = OTHER[choice.chosen(CELL)]
    choice_table.merge_into(choice_table.table_path(), [row(chosen=chosen)])
    assert chosen_in_a_fresh_process() == chosen
    told = collect()["native_library"]["cpu_product"]
    assert (told["decided_by"], told["rows"], told["used"]) == ("table", 1, 1)
    assert told["path"] == str(choice_table.table_path())


@pytest.mark.parametrize(
    "difference", [{"processor": "x"}, {"features": "own=none"}, {"threads": 99}, {"torch": "2.0"}, {"library": "f"}]
)
def test_rows_of_another_machine_are_passed_over_and_kept(difference: dict[str, object]) -> None:
    path, before = choice_table.table_path(), choice.chosen(CELL)
    foreign = row(chosen=OTHER[before], machine=replace(choice.machine(), **difference))
    choice_table.merge_into(path, [foreign])
    choice.install()
    assert choice.chosen(CELL) == before
    told = choice.status()
    assert (told["decided_by"], told["rows"], told["used"]) == ("model", 1, 0)
    assert next(iter(difference)) in told["passed_over"][0]
    choice_table.merge_into(path, [row(chosen=OTHER[before])])
    choice.install()
    assert choice.chosen(CELL) == OTHER[before]
    assert foreign in choice_table.read(path)


BROKEN = ["", "[]", "{}", '{"format": 2, "rows": []}', '{"format": 1, "rows": {}}', '{"format": 1, "rows": [{}]}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_told_and_put_aside(text: str) -> None:
    path, before = choice_table.table_path(), choice.chosen(CELL)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="passed over: .*product-choices.json is no table of choices"):
        choice.install()
    assert choice.chosen(CELL) == before
    assert "is no table of choices" in choice.status()["passed_over"][0]
    choice_table.merge_into(path, [row()])
    assert choice_table.read(path) == [row()]
    assert path.with_name(f"{path.name}.unreadable").read_text() == text


@pytest.mark.parametrize(
    "changes",
    [{"choice": "best"}, {"ratios": {"own": -1}}, {"ratios": 3}, {"floor_us": True}, {"machine": {}}, {"date": None}],
)
def test_a_row_that_is_none_is_told(changes: dict[str, object], tmp_path: Path) -> None:
    document = asdict(row()) | changes
    if changes == {"date": None}:
        del document["date"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 1, "rows": [document]}))
    with pytest.raises(choice_table.ChoiceTableError, match="is no table of choices"):
        choice_table.read(path)


@pytest.mark.parametrize("changes", [{"dtype": "int8"}, {"direction": "up"}, {"tokens": 0}, {"k": True}, {"n": 2**50}])
def test_a_cell_that_is_none_is_told(changes: dict[str, object], tmp_path: Path) -> None:
    document = asdict(row())
    document["cell"] |= changes
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 1, "rows": [document]}))
    with pytest.raises(choice_table.ChoiceTableError, match="is no table of choices"):
        choice_table.read(path)


def test_the_environment_decides_before_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    choice_table.merge_into(choice_table.table_path(), [row()])
    for named in choice_table.CHOICES:
        monkeypatch.setenv(choice.PRODUCT_VARIABLE, named)
        assert choice.status()["decided_by"] == "environment"
        assert chosen_in_a_fresh_process() == named


# The model

AVX2, ZEN4 = "own=avx2", "own=avx512_bf16 avx512 avx512_bf16"
TILES = "intel avx512 avx512_bf16 avx512_fp16 amx_bf16"
XEON, HELD_DOWN = f"own=amx {TILES}", f"own=avx512_bf16 {TILES}"  # where this process may use no tiles of its own
MODEL = [
    *[(AVX2, dtype, m, "own") for dtype in ("bfloat16", "float16") for m in (1, 16, 17, 4096)],
    *[("own=portable", "bfloat16", 4096, "own"), ("own=avx512 intel avx512", "bfloat16", 4096, "own")],
    *[(ZEN4, "bfloat16", m, "own" if m <= 16 else "library") for m in (1, 8, 9, 16, 17, 4096)],
    *[(ZEN4, "float16", m, "own") for m in (1, 16, 4096)],
    *[(HELD_DOWN, "bfloat16", m, "own" if m <= 4 else "library") for m in (1, 4, 5, 16, 17, 4096)],
    *[(XEON, "bfloat16", m, "own" if m <= 16 else "library") for m in (1, 16, 17, 4096)],
    *[(XEON, "float16", m, "own" if m <= 8 else "library") for m in (1, 8, 9, 4096)],
    *[(AVX2, "float32", m, "own" if m <= 128 else "library") for m in (1, 128, 129, 4096)],
    *[(ZEN4, "float32", m, "own") for m in (1, 128, 129, 4096)],
    *[(XEON, "float32", m, "own" if m <= 4 else "library") for m in (1, 4, 5, 16, 4096)],
    *[(ZEN4, "float64", m, "own" if m <= 16 else "library") for m in (1, 16, 17)],
    *[(XEON, "float64", m, "own" if m <= 4 else "library") for m in (1, 4, 5)],
]


@pytest.mark.parametrize(("features", "dtype", "tokens", "expected"), MODEL)
@pytest.mark.parametrize("direction", choice_table.DIRECTIONS)
def test_the_model_s_answers(features: str, dtype: str, tokens: int, expected: str, direction: str) -> None:
    assert choice.model(features, ProductCell(direction, tokens, 2048, 2048, dtype)) == expected


@pytest.mark.parametrize(("features", "dtype"), [*product((AVX2, ZEN4, XEON, HELD_DOWN), choice_table.DTYPES)])
def test_the_smallest_products_are_the_kernels_own(features: str, dtype: str) -> None:
    assert choice.model(features, ProductCell("forward", 256, 32, 32, dtype)) == "own"


def test_without_a_table_the_model_of_this_machine_decides() -> None:
    features = choice.machine().features
    cells = [ProductCell(d, m, k, 512, t) for d, m, k, t in product(
        choice_table.DIRECTIONS, (1, 5, 9, 16, 17, 200, 3000), (64, 3000), choice_table.DTYPES)]  # fmt: skip
    assert [choice.chosen(c) for c in cells] == [choice.model(features, c) for c in cells]


# The numbers


@pytest.mark.parametrize("chosen", choice_table.CHOICES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17])
def test_both_are_right_of_few_tokens_and_give_the_same_bits_again(
    m: int, dtype: torch.dtype, p: float, chosen: str
) -> None:
    case, operators = Case(m=m, k=70, n=130, r=5, dtype=dtype, p=p), ops.operators("native")
    i = make(case)
    with choice.forced(chosen):
        check(operators, case, i)
        first, second = (run(operators, case, i) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


# Why


@pytest.mark.parametrize("seed", range(4))
def test_what_is_explained_is_what_the_library_does(seed: int) -> None:
    """``choice.nearest`` is the twin of the rule in C++: over random tables and cells both choose alike."""
    draw = random.Random(seed)

    def drawn() -> ProductCell:
        tokens, k, n = (int(2 ** draw.uniform(0, power)) for power in (17, 17, 17))
        return ProductCell(draw.choice(choice_table.DIRECTIONS), tokens, k, n, draw.choice(choice_table.DTYPES))

    rows = [row(drawn(), draw.choice(choice_table.CHOICES)) for _ in range(200)]
    choice.install_rows(rows)
    cells = [drawn() for _ in range(500)] + [r.cell for r in rows] + [replace(CELL, tokens=1, k=1, n=1)]
    by = set()
    for cell in cells:
        found = choice.decide(cell)
        assert found is not None
        assert found.choice == choice.chosen(cell), cell
        by.add(found.by)
    assert by == {"table", "model"}


def plans_of(
    tokens: int = CELL.tokens, transposed: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    problem = Problem("cpu", dtype, CELL.k, CELL.n, 16, transposed=transposed)
    with use_backend("native"):
        return dispatch.explain(problem, tokens).plans


@pytest.mark.parametrize("chosen", choice_table.CHOICES)
def test_a_measured_product_is_explained_as_measured(chosen: str) -> None:
    choice.install_rows([row(chosen=chosen)])
    forward, backward = plans_of()
    ratio = {"own": 1.1, "library": 1.2}[chosen]
    assert (forward.basis, forward.us) == ("measured", ratio * 100.0)
    assert f"{ratio} of the frozen layer's time" in forward.why
    assert "2026-11-26" in forward.why
    assert len(forward.launches) == {"own": 2, "library": 3}[chosen]
    assert forward.runner_up.slower == {"own": 1.2, "library": 1.1}[chosen] / ratio - 1.0
    assert backward.basis == "predicted"
    assert plans_of(tokens=100)[0].basis == "neighbour"


def test_a_variable_and_a_layout_decide_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.install_rows([row(replace(CELL, dtype="float32"), "own")])
    assert plans_of(transposed=True, dtype=torch.float32)[0].why.startswith("fixed: W is stored (K, N)")
    assert plans_of(dtype=torch.float32)[0].basis == "measured"
    monkeypatch.setenv(choice.PRODUCT_VARIABLE, "library")
    assert plans_of(dtype=torch.float32)[0].why == f"fixed: {choice.PRODUCT_VARIABLE} names it."


def test_nothing_is_compiled_to_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.load, "loaded", lambda kind: None)
    monkeypatch.setattr(choice.load, "status", lambda kind: {"path": None, "state": "none", "compiler": "gcc"})
    assert [plan.why for plan in plans_of()] == 2 * [
        "The library makes the choice, and it is not compiled yet: `lora-kernels build` does that."
    ]


def test_what_cuda_runs_is_told_without_a_gpu() -> None:
    problem = Problem("cuda", torch.bfloat16, CELL.k, CELL.n, 16)
    forward, backward = dispatch.backend("native").plan(problem, 64)
    assert (len(forward.launches), len(backward.launches)) == (3, 7)
    assert len(dispatch.backend("native").plan(replace(problem, r=17), 64)[1].launches) == 7
