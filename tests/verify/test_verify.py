"""``verify`` passes what is right, and fails for every fault that is put in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import autograd, ops, verify
from lora_kernels.accuracy import OUTPUTS, tf32_allowed
from lora_kernels.backends.triton import interpreter_fault
from lora_kernels.cli import main
from lora_kernels.console import one_thread
from lora_kernels.dispatch import select
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.verify import checks, interpreted
from lora_kernels.verify.cases import CASES, make

NAN = torch.tensor(float("nan"))
pytestmark = pytest.mark.usefixtures("_one_thread")
FP32 = {"backends": ["eager"], "dtypes": ["fp32"], "device": "cpu"}


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def report(_one_thread: None) -> verify.Report:
    return verify.run(backends=["eager"], device="cpu")


def test_eager_passes_in_every_dtype(report: verify.Report) -> None:
    assert report.passed, report.failures
    assert [(row.dtype, row.output) for row in report.rows] == [(d, o) for d in checks.DTYPES for o in OUTPUTS]
    assert not report.not_run


def test_every_ratio_of_eager_is_at_most_two(report: verify.Report) -> None:
    assert all(row.ratio is None if row.dtype == "fp64" else row.ratio <= 2.0 for row in report.rows)


def test_gradients_are_checked_against_finite_differences_and_twice(report: verify.Report) -> None:
    named = [check.name for check in report.checks if check.dtype == "fp64"]
    assert named == ["the same bits twice", "gradcheck", "gradgradcheck"]


def test_the_rounding_table_begins_with_peft(report: verify.Report) -> None:
    peft, addmm, eager = report.rounding
    assert (peft.over_peft, addmm.composition) == (1.0, "base, then addmm_")
    assert eager.composition == "lora_kernels, eager"


def test_a_report_survives_json(report: verify.Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert data.pop("passed")
    assert verify.Report.from_dict(data) == report


def test_the_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    verify.run(**FP32)
    assert torch.equal(before, torch.get_rng_state())


def test_cases_have_adapter_terms_as_large_as_base_terms() -> None:
    for case in (case for case in CASES if case.m and not case.zero):
        i = make(case, torch.float64, torch.device("cpu"), seed=0)
        base = (i.x @ i.weight.t()).norm()
        adapter = checks.SCALING * (i.x @ i.lora_a.double().t() @ i.lora_b.double().t()).norm()
        assert 0.3 < adapter / base < 3.0, case.name


Operator = Callable[..., Any]


def wrong_scaling(right: Operator) -> Operator:
    return lambda x, w, a, b, bias, s, p, state: right(x, w, a, b, bias, s * 1.001, p, state)


def faulty_gradient(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Operator], Operator]:
    """A ``backward`` whose gradient ``index`` (of dx, da, db, dbias) is changed where it is due."""

    def fault(right: Operator) -> Operator:
        def backward(*arguments: Any) -> tuple[Tensor, ...]:
            gradients = list(right(*arguments))
            if gradients[index].numel():
                gradients[index] = change(gradients[index])
            return tuple(gradients)

        return backward

    return fault


last_column_of_da_skipped = faulty_gradient(1, lambda da: torch.cat([da[:, :-1], torch.zeros_like(da[:, -1:])], 1))
nan_in_a_corner_of_dx = faulty_gradient(0, lambda dx: dx.index_put_((torch.tensor(-1), torch.tensor(-1)), NAN))
last_bias_skipped = faulty_gradient(3, lambda dbias: torch.cat([dbias[:-1], torch.zeros_like(dbias[-1:])]))


def stale_hidden(right: Operator) -> Operator:
    return lambda dy, x, w, a, b, bias, h, *rest: right(dy, x, w, a, b, bias, h.roll(1, 0), *rest)


def mask_ignored_in_dx(right: Operator) -> Operator:
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        return right(*arguments[:-2], 0.0, None)[0], *right(*arguments)[1:]

    return backward


def mask_off_by_one(right: Operator) -> Operator:
    return lambda state, m, k, p: right(state, m, k, p).roll(1, 1)


def gain_ignored(right: Operator) -> Operator:
    return lambda x, w, b, h, bias, gain, scaling, keep: (
        right(x, w, b, h, bias, None, scaling, False)[0],
        right(x, w, b, h, bias, gain, scaling, keep)[1],
    )


def last_gain_skipped(right: Operator) -> Operator:
    def faulty(*arguments: Any) -> tuple[Tensor, ...]:
        dlinear, dgain, dbias = right(*arguments)
        return dlinear, torch.cat([dgain[:-1], torch.zeros_like(dgain[-1:])]), dbias

    return faulty


def last_branch_forgotten(right: Operator) -> Operator:
    return lambda dls, ws, dzs, das, p, states: right(
        dls, ws, [*dzs[:-1], 0 * dzs[-1]] if len(dzs) > 1 else dzs, das, p, states
    )


def raises(right: Operator) -> Operator:
    def faulty(*arguments: object) -> Tensor:
        raise RuntimeError("CUDA error: misaligned address")

    return faulty


FAULTS = [
    ("forward", wrong_scaling, {"y"}),
    ("backward", stale_hidden, {"db"}),
    ("backward", last_column_of_da_skipped, {"da"}),
    ("backward", mask_ignored_in_dx, {"dx"}),
    ("mask", mask_off_by_one, {"y", "dx", "da", "db", "dgain"}),
    ("backward", nan_in_a_corner_of_dx, {"dx"}),
    ("backward", last_bias_skipped, {"dbias"}),
    ("backward", raises, set(OUTPUTS)),
    ("product", gain_ignored, {"y"}),
    ("gain_grad", last_gain_skipped, {"dgain"}),
    ("input_grad", last_branch_forgotten, {"dx"}),
]


@pytest.mark.parametrize(("operator", "fault", "outputs"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_fails_the_outputs_it_touches(
    operator: str, fault: Callable[[Operator], Operator], outputs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    select("cpu", torch.float32, "eager")
    right = ops.operators("eager")
    monkeypatch.setitem(ops._direct, "eager", replace(right, **{operator: fault(getattr(right, operator))}))
    found = verify.run(**FP32)
    assert not found.passed
    assert {row.output for row in found.rows if not row.passed} == outputs
    assert found.failures


def test_a_backend_that_differs_from_run_to_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    select("cpu", torch.float32, "eager")
    right = ops.operators("eager")
    signs = iter([1.0, -1.0] * 100)
    restless = faulty_gradient(0, lambda dx: dx * (1.0 + next(signs) * torch.finfo(torch.float32).eps))
    monkeypatch.setitem(ops._direct, "eager", replace(right, backward=restless(right.backward)))
    found = verify.run(**FP32)
    assert [check.name for check in found.checks if not check.passed] == ["the same bits twice"]


def test_dropout_that_keeps_too_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    select("cpu", torch.float32, "eager")
    keep = replace(ops.operators("eager"), mask=lambda state, m, k, p: torch.rand(m, k) >= 0.5 * p)
    monkeypatch.setitem(ops._direct, "eager", keep)
    found = verify.run(**FP32)
    assert "dropout keeps 1 - p" in [check.name for check in found.checks if not check.passed]


def test_a_wrong_second_derivative_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = autograd._differentiable_backward
    monkeypatch.setattr(autograd, "_differentiable_backward", lambda ctx, dy: right(ctx, dy * 1.001))
    found = verify.run(["eager"], ["fp64"], "cpu")
    assert [check.name for check in found.checks if not check.passed] == ["gradgradcheck"]
    assert not found.passed


def test_the_command_fails_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    select("cpu", torch.float32, "eager")
    right = ops.operators("eager")
    monkeypatch.setitem(ops._direct, "eager", replace(right, backward=last_column_of_da_skipped(right.backward)))
    arguments = ["verify", "--backend", "eager", "--dtype", "fp32", "--device", "cpu"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "da FAILS: error" in shown
    assert main([*arguments, "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


def test_the_command_prints_pure_json_and_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "eager", "--dtype", "fp32", "bf16", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"]
    assert (found["device"], found["seed"], len(found["rows"])) == ("cpu", 0, 2 * len(OUTPUTS))
    assert "verify: eager bf16 1/" in captured.err


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_interpreter")
def test_triton_passes_on_a_cpu_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if fault := interpreter_fault():
        pytest.skip(fault)
    few = "import sys; from lora_kernels.verify import cases, checks; checks.CASES = cases.CASES[3:4]; "
    few += "from lora_kernels.cli import main; sys.exit(main(sys.argv[3:]))"
    started: list[list[str]] = []
    popen = interpreted.subprocess.Popen

    def fewer_cases(command: list[str], **options: Any) -> Any:
        started.append(command)
        assert options["env"]["TRITON_INTERPRET"] == "1"
        return popen([command[0], "-c", few, *command[1:]], **options)

    monkeypatch.setattr(interpreted.subprocess, "Popen", fewer_cases)
    told: list[str] = []
    found = verify.run(["triton"], ["bf16", "fp64"], "cpu", progress=lambda label, done, total: told.append(label))
    assert found.passed, found.failures
    assert len(started) == 1
    assert {(row.backend, row.dtype) for row in found.rows} == {("triton", "bf16")}
    assert [item.dtypes for item in found.not_run] == [("fp64",)]
    assert set(told) == {"triton bf16, interpreted"}
    errors = {item.composition: item.over_peft for item in found.rounding}
    assert errors["lora_kernels, triton"] < 1.0


@pytest.mark.usefixtures("no_interpreter")
def test_a_dtype_that_triton_does_not_take_is_told_and_no_failure() -> None:
    pytest.importorskip("triton")
    found = verify.run(dtypes=["fp64"], device="cpu")
    assert found.passed
    (not_run,) = found.not_run
    assert (not_run.backend, not_run.dtypes) == ("triton", ("fp64",))
    assert "float64 is not supported" in not_run.reasons


@pytest.mark.parametrize("name", ["cpu:3", "meta", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_sentence(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"device '{name}' was given"):
        verify.run(device=name)


@pytest.mark.usefixtures("no_interpreter")
def test_a_named_backend_that_cannot_begin_raises_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    popen = interpreted.subprocess.Popen
    refusing = "import sys; print('lora-kernels: the moon is full.', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(
        interpreted.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", refusing], **options)
    )
    with pytest.raises(BackendUnavailableError, match=r"^the moon is full\.$"):
        verify.run(backends=["triton"], device="cpu")


@pytest.mark.usefixtures("no_interpreter")
def test_an_interpreter_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    popen = interpreted.subprocess.Popen
    dying = "import sys; print('Segmentation fault', file=sys.stderr); sys.exit(139)"
    monkeypatch.setattr(
        interpreted.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", dying], **options)
    )
    found = verify.run(["eager", "triton"], ["fp32"], "cpu")
    assert not found.passed
    assert [failure.sentence for failure in found.failures] == [
        "Triton's interpreter stopped with status 139: Segmentation fault"
    ]


@pytest.mark.parametrize(
    ("everywhere", "products", "allowed"),
    [("none", "none", False), ("tf32", "none", True), ("none", "tf32", True), ("tf32", "ieee", False)],
)
def test_tf32_is_seen_however_it_is_allowed(everywhere: str, products: str, allowed: bool) -> None:
    """Where the older ``allow_tf32`` would raise, too."""
    settings = (torch.backends, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting, value in zip(settings, (everywhere, products), strict=True):
            setting.fp32_precision = value
        assert tf32_allowed() == allowed
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    assert [setting.fp32_precision for setting in settings] == before
