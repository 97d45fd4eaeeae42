"""The rival that is rebuilt in ``bench/lorafusion``: its function and gradients, and what is said where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.lorafusion import layer as lorafusion
from lora_kernels import accuracy
from lora_kernels.benchmark import rebuilt, runner
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.providers import PROVIDERS, make_setups
from lora_kernels.benchmark.workloads import Workload
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.reference import forward
from numerics import check


@pytest.mark.parametrize(("tokens", "r"), [(1, 16), (70, 32)])
def test_the_rebuilt_rival_computes_the_same_function(tokens: int, r: int) -> None:
    work = Workload("forward", tokens, 96, 72, r, "float16")
    (setup,) = make_setups(work, "cpu")
    y = lorafusion.build(setup).call(setup.x)
    tensors = (t.double() for t in (setup.x, setup.linear.weight, setup.lora_a, setup.lora_b))
    exact, _ = forward(*tensors, None, setup.scaling)
    assert accuracy.judge("y", y, exact, exact.half(), torch.float16).error <= accuracy.CEILINGS[torch.float16]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_rebuilt_rival_s_gradients(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask that it drew and kept."""
    (setup,) = make_setups(Workload("step", 70, 96, 72, 16, "float16", p=p), "cpu")
    masks: list[torch.Tensor] = []
    drop = lorafusion._drop
    monkeypatch.setattr(lorafusion, "_drop", lambda x, p: (masks.append(drop(x, p)[1]), drop(x, p))[1])
    layer = lorafusion.build(setup)
    y = layer.call(setup.x)
    found = dict(zip(("dx", "da", "db"), torch.autograd.grad(y, (setup.x, *layer.trainable), setup.dy), strict=True))
    given = (setup.x, setup.linear.weight, setup.lora_a, setup.lora_b, None, setup.dy, setup.scaling)
    exact = accuracy.run_reference(torch.float64, *given, masks[0].bool() if p else None, p)
    for name, value in found.items():
        error = accuracy.judge(name, value, exact[name], exact[name].half(), torch.float16).error
        assert error <= accuracy.CEILINGS[torch.float16], name


def test_the_rebuilt_rival_drops_and_scales() -> None:
    x = torch.rand(64, 129) + 1.0
    dropped, mask = lorafusion._drop(x, 0.25)
    kept = dropped != 0
    assert torch.equal(mask.bool(), kept)
    left = x[kept].reshape(1, -1)
    check("y", dropped[kept].reshape(1, -1), left.double() / 0.75, left / 0.75, torch.float32)
    assert 0.7 < kept.float().mean() < 0.8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 8}, "from 16 on"),
        ({"r": 48}, "powers of 2"),
        ({"direction": "step", "bias": True}, "without a bias"),
        ({"dtype": "float32"}, "16-bit"),
    ],
)
def test_the_rebuilt_rival_refuses_what_the_original_does(change: dict[str, Any], reason: str) -> None:
    work = replace(Workload("forward", 4, 64, 64, 16, "float16"), **change)
    setup = SimpleNamespace(workload=work, device=torch.device("cuda"), dtype=getattr(torch, work.dtype))
    assert reason in (lorafusion.why_not(setup) or "")  # type: ignore[arg-type]


# Where the checkout is, and where it is not


def test_the_benchmark_finds_it_beside_the_package() -> None:
    """And loads it, with its device code, under a name that no other folder bench/ can take."""
    (setup,) = make_setups(Workload("forward", 5, 64, 64, 16, "float16"), "cpu")
    provider = PROVIDERS["lorafusion"]
    assert provider in runner.providers_of(preset("gpu-goals"), None)
    assert provider.why_not(setup) == lorafusion.why_not(setup) == "LoRAFusion's kernels are for CUDA devices."
    assert torch.equal(provider.build(setup).call(setup.x), lorafusion.build(setup).call(setup.x))


@pytest.fixture
def no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(rebuilt, "FOLDER", tmp_path / "bench" / "lorafusion")
    sentence = rebuilt.why_absent()
    assert sentence is not None
    return sentence


def test_without_it_its_name_is_refused_by_a_sentence(no_checkout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "smoke", "--peers", "peft", "lorafusion"]) == 2
    assert no_checkout in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InvalidArgumentError) as raised:
        runner.expand_peers(["no such peer"])
    assert "lorafusion" not in str(raised.value)


def test_without_it_a_preset_goes_on_and_its_result_says_so(no_checkout: str) -> None:
    chosen = replace(preset("smoke").only({"direction": ("forward",), "tokens": ("3",)}), peers=("lorafusion", "addmm"))
    result = runner.run_preset(chosen, "2026-01-01", "cpu", budget=0.0)
    assert list(result.titles) == ["linear", "addmm"]
    assert result.environment["left_out"] == {"lorafusion": no_checkout}
    named = runner.run_preset(chosen, "2026-01-01", "cpu", ["addmm"], budget=0.0)
    assert "left_out" not in named.environment


@pytest.mark.parametrize("peers", [[], ["--peers", "addmm", "auto"]])
def test_the_report_begins_with_what_is_not_here(
    no_checkout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], peers: list[str]
) -> None:
    """A prediction too; and the file, where it is shown again."""
    file = str(tmp_path / "predicted.json")
    assert main(["bench", "--preset", "gpu-goals", "--predict", "h100", "--json", file, *peers]) == 0
    assert main(["bench", "--show", file]) == 0
    shown = capsys.readouterr().out
    assert shown.count(no_checkout) == (0 if peers else 2)
    assert shown.startswith(no_checkout) == (not peers)


def test_help_names_it_where_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    for _ in range(2):
        assert main(["bench", "--help"]) == 0
        named.append("lorafusion" in capsys.readouterr().out)
        monkeypatch.setattr(rebuilt, "FOLDER", Path("nowhere"))
    assert named == [True, False]
