"""The choice of backend: argument > context > environment > automatic, reasons for the others, no silent fall-back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_kernels
from cases import BACKENDS
from lora_kernels import FusedLoRALinear, dispatch, explain, lora_linear, use_backend
from lora_kernels.dispatch import Problem
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError, InvalidTypeError
from made_models import acting
from numerics import same_bits

CPU = Problem("cpu", torch.float32, 8, 8, 2)
AUTOMATIC = "eager" if dispatch.backend("native").why_not(CPU) else "native"


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_environment", None)


def test_automatic_on_the_cpu_is_never_the_interpreter() -> None:
    assert dispatch.select("cpu", torch.float32) == AUTOMATIC
    assert explain(CPU).reasons["triton"]


@pytest.mark.parametrize(
    ("triton", "numpy", "fault"),
    [("3.6.0", "2.5.2", "Triton 3.6 fails with NumPy 2.5"), ("3.6.0+git1", "2.3.9", None), ("3.7.0", "2.5.2", None)],
)
def test_an_interpreter_that_fails_is_not_offered(
    triton: str, numpy: str, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (fault or "") in " ".join(dispatch.backend("triton").why_not(CPU))
    assert bool(dispatch.backend("triton").why_not(CPU)) == bool(fault)


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_environment", "no-such")
    with pytest.raises(InvalidArgumentError, match="no-such"):
        dispatch.select("cpu", torch.float32)
    with use_backend("eager"):
        assert dispatch.select("cpu", torch.float32) == "eager"
        with use_backend(None):
            assert dispatch.requested() == (None, "use_backend(None)")
        assert dispatch.requested("triton")[0] == "triton"
        assert dispatch.requested()[0] == "eager"
    assert dispatch.requested()[0] == "no-such"


def test_context_is_left_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="within"), use_backend("eager"):
        raise RuntimeError("within")
    assert dispatch.requested()[0] is None


def test_context_holds_for_its_own_thread() -> None:
    seen: list[str | None] = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()[0]))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_names_are_refused_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'cuda'.*'triton', 'native', 'eager'"), use_backend("cuda"):
        pass


def test_a_named_backend_never_falls_back() -> None:
    """float64 has no Triton kernels: naming Triton raises with every backend's reasons, and nothing runs instead."""
    i = [torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)]
    ab = [torch.ones(1, 3, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)]
    with pytest.raises(BackendUnavailableError, match=r"'triton', named by the argument.*float64.*'eager'"):
        lora_linear(*i, *ab, backend="triton")


def test_automatic_never_fails_on_a_valid_problem() -> None:
    for dtype in dispatch.COMPUTE_DTYPES:
        assert dispatch.select("cpu", dtype) in dispatch.ORDER
    with pytest.raises(InvalidTypeError, match=r"torch\.int32"):
        dispatch.select("cpu", torch.int32)


def test_explain_takes_layers_and_problems() -> None:
    by_layer = explain(FusedLoRALinear(8, 8, r=2))
    assert by_layer.backend == explain(CPU).backend == AUTOMATIC
    assert by_layer.source == "the automatic choice"
    assert "triton: " in str(by_layer)
    assert "\n" in str(by_layer)
    with use_backend("eager"):
        assert explain(CPU).source == "use_backend('eager')"


def test_without_tokens_nothing_is_added() -> None:
    """The text of before, line by line."""
    with use_backend("eager"):
        explanation = explain(CPU)
        first, *others = str(explanation).splitlines()
        backends = {name: dispatch.backend(name) for name in dispatch.ORDER}
    assert first == f"eager: runs, by use_backend('eager'). {backends['eager'].describe(CPU)}"
    assert len(others) == 2
    assert others[0] == f"triton: {' '.join(explanation.reasons['triton'])}"
    assert (explanation.tokens, explanation.plans) == (None, ())


@pytest.mark.parametrize("name", dispatch.ORDER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_backend_explains_both_passes(name: str, dtype: torch.dtype) -> None:
    problem = Problem("cpu", dtype, 128, 64, 4, 0.1)
    for tokens in (1, 16, 17, 5000):
        forward, backward = dispatch.backend(name).plan(problem, tokens)
        assert (forward.direction, backward.direction) == ("forward", "backward")
        for plan in (forward, backward):
            assert plan.basis in ("measured", "neighbour", "predicted", "fixed")
            assert plan.why.endswith(".")
            assert plan.launches or "not compiled" in plan.why


def test_with_tokens_the_text_begins_as_without() -> None:
    layer = FusedLoRALinear(64, 32, r=4)
    told, short = explain(layer, tokens=128), explain(layer)
    assert str(told).startswith(f"{short}\nM = 128, K = 64, N = 32, r = 4, float32, with dx, dA and dB due.\nforward: ")
    document = json.loads(json.dumps(told.to_json()))
    assert (document["backend"], document["tokens"], document["problem"]["dtype"]) == (short.backend, 128, "float32")
    assert [plan["direction"] for plan in document["plans"]] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("tokens", "words"), [(0, "above 0"), (-1, "above 0"), (1.5, "above 0"), (True, "above 0"), ("8", "above 0")]
)
def test_tokens_are_a_whole_number(tokens: object, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        explain(CPU, tokens=tokens)


@pytest.mark.parametrize("changes", [{"r": None}, {"in_features": 0}, {"out_features": -1}])
def test_a_plan_needs_sizes(changes: dict[str, int | None]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"tells no {next(iter(changes))}"):
        explain(replace(CPU, **changes), tokens=8)
    assert explain(replace(CPU, **changes)).backend == AUTOMATIC


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: layer.merge(), "adapter is merged"),
        (lambda layer: layer.enable_lora(False), "adapter is off"),
        (lambda layer: layer.eval(), "nothing is dropped"),
        (lambda layer: None, ""),
    ],
)
def test_a_layer_says_what_is_not_a_plain_pass(change: Any, words: str) -> None:
    layer = FusedLoRALinear(8, 8, r=2, lora_dropout=0.1)
    change(layer)
    assert words in explain(layer).problem.aside
    assert str(explain(layer, tokens=4)).count(explain(layer).problem.aside or "dropout 0.1") == 1


@pytest.mark.parametrize("more", [{"use_dora": True}, {"activation": "relu"}])
def test_a_layer_that_runs_in_parts_says_so(more: dict[str, Any]) -> None:
    assert "runs in parts" in str(explain(FusedLoRALinear(8, 8, r=2, **more), tokens=4))


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), torch.nn.Sequential(), None])
def test_explain_of_something_else_says_what_it_takes(other: object) -> None:
    with pytest.raises(InvalidTypeError, match=f"a {type(other).__name__}: .*FusedLoRALinear.*get_submodule"):
        explain(other)


def test_every_reason_names_a_remedy_or_a_fact() -> None:
    for name in dispatch.ORDER:
        for device, dtype in (
            ("cpu", torch.float32),
            ("cuda", torch.float32),
            ("cpu", torch.float64),
            ("mps", torch.half),
            ("meta", torch.half),
        ):
            problem = Problem(device, dtype)
            reasons = dispatch.backend(name).why_not(problem) + dispatch.backend(name).why_not_automatic(problem)
            assert all(reason.endswith(".") and len(reason.split()) > 4 for reason in reasons)
            assert len(dispatch.backend(name).describe(problem).split()) > 4


@pytest.mark.parametrize("name", ["eager", "native"])
def test_environment_in_a_fresh_process(name: str) -> None:
    code = "from lora_kernels import dispatch; print(dispatch.requested())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"LORA_KERNELS_BACKEND": name}, check=True,
        cwd=lora_kernels.__path__[0] + "/..",
    )  # fmt: skip
    assert done.stdout.startswith(f"('{name}', ")
    assert f"LORA_KERNELS_BACKEND={name}" in done.stdout


class Unregistrable:
    """A backend that finds out only when it is to run that it cannot; the second time it knows."""

    name = "native"

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.asked_for: list[str] = []

    def why_not(self, problem: Problem) -> list[str]:
        return self.reasons

    def why_not_automatic(self, problem: Problem) -> list[str]:
        return []

    def register(self, device_type: str) -> None:
        self.asked_for.append(device_type)
        self.reasons = ["The compiler is on strike."]
        raise BackendUnavailableError("the compiler is on strike.")


@pytest.fixture
def unregistrable(monkeypatch: pytest.MonkeyPatch) -> Unregistrable:
    found = Unregistrable()
    monkeypatch.setitem(dispatch._loaded, "native", found)
    return found


def test_an_automatic_choice_that_fails_goes_on_to_the_next_with_one_warning(unregistrable: Unregistrable) -> None:
    with pytest.warns(RuntimeWarning, match="'native' is passed over: the compiler is on strike"):
        assert dispatch.select("cpu", torch.float32) == "eager"
    assert dispatch.select("cpu", torch.float64) == "eager"
    assert unregistrable.asked_for == ["cpu"]
    assert explain(CPU).reasons["native"] == ["The compiler is on strike."]


def test_a_named_choice_that_fails_raises_and_does_not_warn(unregistrable: Unregistrable) -> None:
    words = r"'native', named by the argument.*strike.*'eager': available"
    with warnings.catch_warnings(record=True) as warned, pytest.raises(BackendUnavailableError, match=words):
        dispatch.select("cpu", torch.float32, "native")
    assert not warned


HERE = [None, *(name for name, device in BACKENDS if device == "cpu" and name != "triton")]  # that one takes seconds


# What a checkpoint runs again it runs as before, wherever backward is called


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of_backward", HERE)
@pytest.mark.parametrize("of_forward", HERE)
def test_a_checkpoint_runs_again_by_the_backend_of_its_forward(
    of_forward: str | None, of_backward: str | None, reentrant: bool
) -> None:
    """With dropout, for eager draws other masks than the others: gradients would belong to another y, in silence."""
    layer, x = acting(24, 16, lora_dropout=0.5), torch.randn(6, 24)
    found = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(0)
        with dispatch.use_backend(of_forward) if of_forward else nullcontext():
            y = call(leaf)
        with dispatch.use_backend(of_backward) if of_backward else nullcontext():
            y.square().sum().backward()
        found.append([y.detach(), leaf.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert all(same_bits(left, right) for left, right in zip(*found, strict=True))


def test_a_block_within_a_backward_holds_there() -> None:
    """As in a Function of the user's own."""
    asked = []

    def hook(gradient: Tensor) -> None:
        with dispatch.use_backend("eager"):
            asked.append(dispatch.requested()[0])

    x = torch.ones(2, requires_grad=True)
    with dispatch.use_backend("native"):
        y = 2 * x
    y.register_hook(hook)
    y.sum().backward()
    assert asked == ["eager"]
    assert dispatch.requested()[0] is None


def test_a_block_in_which_nothing_was_recorded_is_forgotten() -> None:
    before = list(dispatch._blocks)
    with dispatch.use_backend("eager"), torch.no_grad():
        acting()(torch.ones(2, 8))
    assert list(dispatch._blocks) == before
