"""``verify --weights``: quantised forms of W pass beside their dequantised values, and a wrong value fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_kernels import branches_autograd, verify
from lora_kernels.benchmark.presets import PRESETS
from lora_kernels.benchmark.setups import make_setups
from lora_kernels.cli import main
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError, MissingExtraError
from lora_kernels.weights import samples
from quantised import OTHERS

FORMS = ["nf4", "fp4", "int8", *(["torchao-int4", "nvfp4", "mxfp4"] if "ao-int8" in OTHERS else [])]
FORMS += ["fp8"] if "fp8" in OTHERS else []


@pytest.mark.parametrize("form", FORMS)
def test_a_form_passes(form: str) -> None:
    report = verify.run(backends=["eager"], dtypes=["bf16"], device="cpu", weights=[form])
    assert report.passed, report.failures
    assert {row.weights for row in report.rows} == {form}
    assert verify.Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("of", ["forward", "backward"])
def test_a_wrong_value_fails(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = branches_autograd.values_of, []

    def wrong(*given: Any) -> Any:
        calls.append(None)
        values = right(*given)
        values[0, 0] += 0.5 * (len(calls) % 2 == (of == "forward"))
        return values

    monkeypatch.setattr(branches_autograd, "values_of", wrong)
    report = verify.run(backends=["eager"], dtypes=["fp32"], device="cpu", weights=["nf4"])
    assert not report.passed
    assert all(", over nf4" in failure.case for failure in report.failures)


def test_a_form_that_is_not_known_is_told() -> None:
    with pytest.raises(InvalidArgumentError, match="must be one of nf4, "):
        verify.run(weights=["int3"])


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-kernels\[quant\]'"):
        verify.run(weights=["nf4"])


def test_bench_names_what_to_install_for_its_quantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = PRESETS["qlora"].workloads[0]
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs bitsandbytes.*pip install 'lora-kernels\[quant\]'"):
        make_setups(cell, "cpu")


def test_tritons_interpreter_is_left_out_and_told() -> None:
    with pytest.raises(BackendUnavailableError, match="verify without weights runs it"):
        verify.run(backends=["triton"], device="cpu", weights=["nf4"])


def test_the_command_takes_forms(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "--backend", "eager", "--dtype", "fp32", "--weights", "nf4,int8", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["weights"] for row in rows} == {"nf4", "int8"}
