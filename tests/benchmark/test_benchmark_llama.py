"""The whole model's benchmark, tiny, on the CPU: what is run, compared, kept and said."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from liger_on_cpu import stand_in
from lora_kernels.benchmark import llama, llama_models, llama_report, steps
from lora_kernels.benchmark.report import markdown
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError

SMALL = llama_models.SIZES["llama-small"]
LIGER = {"fused-liger", "peft-liger"}
PLACES = [(name, SMALL.batches[size]) for name, size in llama._WORK]


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")


@pytest.fixture(scope="module")
def patch() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every cell by the command, the compiled ones without Inductor, and without Liger."""
    patch.setattr(llama_models, "COMPILER", "eager")
    absent = "liger-kernel is not installed."
    patch.setattr(llama, "needs_liger", lambda name, device: absent if name in LIGER else None)
    path = tmp_path_factory.mktemp("llama") / "llama.json"
    call = ["bench", "--preset", "llama-small", "--device", "cpu", "--budget", "1000", "--json", str(path)]
    assert main(call) == 0
    return json.loads(path.read_text())


def run(*names: str, budget: float = 1000.0, **changes: Any) -> dict[str, Any]:
    """Of some of the providers alone, at both batches; each model that is let go takes a collection of garbage."""
    work = [(name, size) for name, size in llama._WORK if name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "_WORK", work)
        return llama.run_llama("llama-small", "cpu", "2026-01-01", budget, **changes)


def by_place(document: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(cell["provider"], cell["batch"]): cell for cell in reversed(document["cells"])}


# What is run


def test_cells_go_by_importance_and_each_is_timed(document: dict[str, Any]) -> None:
    cells = document["cells"]
    assert [(cell["provider"], cell["batch"]) for cell in cells] == PLACES
    assert PLACES[:6] == [("frozen", 1), ("fused", 1), ("peft", 1), ("fused", 2), ("peft", 2), ("compiled", 1)]
    assert {cell["status"] for cell in cells if cell["provider"] not in LIGER} == {"timed"}
    assert [cell["provider"] for cell in cells if cell["again"]] == ["frozen"]
    for cell in cells[:10]:
        numbers = cell["numbers"]
        assert len(numbers["all_ms"]) == steps._STEPS
        assert numbers["tokens_per_second"] * numbers["step_ms"] == pytest.approx(1e3 * cell["batch"] * SMALL.tokens)
        assert numbers["tflops"] == pytest.approx(4e-12 * document["parameters"] * numbers["tokens_per_second"])


def test_ours_is_fused_whole(document: dict[str, Any]) -> None:
    notes = {cell["note"] for cell in document["cells"] if cell["provider"] in ("fused", "compiled")}
    assert notes == {f"{7 * SMALL.layers} layers, {2 * SMALL.layers} groups and {SMALL.layers} gated MLPs are fused"}


def test_calls_that_pefts_own_forward_ran_are_told() -> None:
    entry = llama_models.built("fused", llama_models.base_model(SMALL, "cpu", torch.float32), 0)
    assert entry.note_of_calls() == entry.note
    inner = entry.llama.model.layers[0].self_attn.q_proj.lora_A["default"]
    inner.register_forward_hook(lambda module, args, y: None)
    entry.step(torch.zeros(1, 8, dtype=torch.long))
    assert "PEFT's own forward ran 1 calls" in entry.note_of_calls()


def test_each_is_compared_with_peft_under_the_dropout_that_is_timed(document: dict[str, Any]) -> None:
    assert document["compared"] == "with PEFT"
    found = by_place(document)
    for name in ("fused", "peft", "compiled", "peft32"):
        assert set(found[name, 1]["distances"]) == {"hidden states", "gradients of lora_A", "gradients of lora_B"}
    assert set(found["fused", 2]["distances"]) == {"hidden states"}
    assert found["frozen", 1]["distances"] == {}


def test_adapters_start_alike_and_no_b_is_zero() -> None:
    base = llama_models.base_model(SMALL, "cpu", torch.bfloat16)
    values = {}
    for name in ("peft", "fused", "peft32"):
        parameters = llama_models.built(name, base, 0).model.named_parameters()
        values[name] = {key: p for key, p in parameters if p.requires_grad}
        assert len(values[name]) == 14 * SMALL.layers
        assert {p.dtype for p in values[name].values()} == {torch.float32 if name == "peft32" else torch.bfloat16}
    for key, value in values["peft"].items():
        assert value.count_nonzero() > 0
        assert torch.equal(value, values["fused"][key])
        assert torch.equal(value.float(), values["peft32"][key])


def test_the_base_is_made_in_its_dtype_and_shared() -> None:
    base = llama_models.base_model(SMALL, "cpu", torch.bfloat16)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert base.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert all(p.count_nonzero() > 0.9 * p.numel() for p in base.parameters())
    assert base.config._attn_implementation == "sdpa"
    before = [p.clone() for p in base.parameters()]
    entry = llama_models.built("fused", base, 0)
    assert entry.llama.lm_head.weight is base.lm_head.weight
    tokens = torch.zeros(1, 8, dtype=torch.long)
    trained = [p for p in entry.model.parameters() if p.requires_grad]
    adapters = [p.detach().clone() for p in trained]
    entry.step(tokens)
    assert all(torch.equal(p, old) for p, old in zip(base.parameters(), before, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(trained, adapters, strict=True))
    assert all(p.grad is None for p in trained)


def test_the_frozen_model_goes_back_to_the_first_block() -> None:
    entry = llama_models.built("frozen", llama_models.base_model(SMALL, "cpu", torch.float32), 0)
    arrived = []
    entry.llama.model.layers[0].register_full_backward_hook(lambda module, dx, dy: arrived.append(dx))
    entry.step(torch.zeros(1, 8, dtype=torch.long))
    assert entry.optimizer is None
    assert len(arrived) == 1


# What goes wrong


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_another_function_fails_and_is_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def wrong(model: Any) -> tuple[Any, str]:
        adapted, note = llama_models._fused(model)
        for module in adapted.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= factor
        return adapted, note

    monkeypatch.setitem(llama.PROVIDERS, "fused", replace(llama.PROVIDERS["fused"], adapt=wrong))
    document = run("fused")
    cell = by_place(document)["fused", 1]
    assert cell["status"] == "failed"
    assert "numbers" not in cell
    assert "computes something else than PEFT" in cell["reason"]
    assert "common" not in document["reached"]


def test_a_loss_that_is_no_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> tuple[Any, str]:
        model.lm_head = nn.Linear(SMALL.hidden, SMALL.vocabulary, bias=False).requires_grad_(False)
        nn.init.constant_(model.lm_head.weight, float("nan"))
        return llama_models._frozen(model)

    monkeypatch.setitem(llama.PROVIDERS, "frozen", replace(llama.PROVIDERS["frozen"], adapt=wrong))
    assert by_place(run("frozen"))["frozen", 1]["reason"] == "The loss is nan."


def test_out_of_memory_is_a_row_and_the_ratios_are_of_the_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    step = llama_models.Built.loss

    def no_room(entry: Any, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 2 and entry.optimizer is not None and not entry.note:  # PEFT's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB.\nGPU 0 has ...")
        return step(entry, tokens)

    monkeypatch.setattr(llama_models.Built, "loss", no_room)
    document = run("frozen", "fused", "peft")
    cell = by_place(document)["peft", 2]
    assert (cell["status"], cell["reason"]) == (
        "out of memory",
        "CUDA out of memory. Tried to allocate 224.00 MiB.",
    )
    assert document["reached"]["common"]["batch"] == 1
    assert document["reached"]["headline"]["batch"] == 2
    assert by_place(document)["frozen", 2]["status"] == "timed"
    assert any("out of memory" in line for line in llama_report.told(document))
    assert "| PEFT, 16-bit adapters | 2 x 96 | out of memory |" in markdown(llama_report.table(document))


def test_one_that_raises_costs_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> tuple[Any, str]:
        raise KeyError("a rival's own")

    monkeypatch.setitem(llama.PROVIDERS, "fused", replace(llama.PROVIDERS["fused"], adapt=broken))
    found = by_place(run("frozen", "fused"))
    assert (found["fused", 1]["status"], found["frozen", 2]["status"]) == ("failed", "timed")
    assert found["fused", 1]["reason"].startswith("KeyError")


def test_a_lost_device_ends_the_run_and_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(device: str, where: str, error: Exception) -> None:
        raise llama.DeviceLostError("the GPU's context is broken")

    def broken(model: Any) -> tuple[Any, str]:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(llama, "must_live", lose)
    monkeypatch.setitem(llama.PROVIDERS, "fused", replace(llama.PROVIDERS["fused"], adapt=broken))
    cells = run("frozen", "fused", "peft")["cells"]
    assert [cell["status"] for cell in cells[:3]] == ["timed", "failed", "left out"]
    assert {cell["reason"] for cell in cells[2:]} == {"the GPU's context is broken"}


def test_without_pefts_step_nothing_is_compared_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(run: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(llama, "_pefts", no_room)
    document = run("fused")
    assert "not at all: PEFT's own step failed" in document["compared"]
    assert by_place(document)["fused", 1]["distances"] == {}


def test_a_base_without_room_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(llama, "base_model", no_room)
    assert "has no room" in llama_report.told(run())[0]


def test_what_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_models.importlib.util, "find_spec", lambda name: None)
    assert "transformers and peft cannot be imported" in llama_report.told(run())[0]
    assert "is not installed" in (llama_models.needs_liger("peft-liger", "cuda") or "")
    assert llama_models.needs_liger("peft", "cuda") is None


def test_with_liger_both_are_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this one is for a CPU; on a GPU, bench runs Liger's own kernels")
    stand_in(monkeypatch)
    monkeypatch.setattr(llama, "needs_liger", llama_models.needs_liger)
    monkeypatch.setitem(llama_models.SIZES, "llama-small", llama_models.LlamaSizes(32, 48, 4, 2, 2, 32, 8, (1, 1)))
    monkeypatch.setattr(llama, "measured_steps", once)
    found = by_place(run(*LIGER, "fused"))
    assert {name for name, _ in found} == {*LIGER, "fused"}
    for cell in found.values():
        assert (cell["status"], cell["reason"]) == ("timed", None)
        assert len(cell["distances"]) == 3
    assert "2 gated MLPs are fused" in found["fused-liger", 1]["note"]


def once(step: Any, tokens: int, device: str) -> dict[str, Any]:
    """For the clock: Liger's kernels are interpreted here."""
    step()
    numbers = {"tokens_per_second": 1.0, "step_ms": 1e3 * tokens, "all_ms": [1e3 * tokens], "peak_bytes": None}
    return {**numbers, "launches": None, "busy": None, "not_profiled": "interpreted"}


def test_on_a_cpu_ligers_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_models.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert llama_models.needs_liger("fused-liger", "cpu") == "Liger's kernels do not run on a CPU."
    assert llama_models.needs_liger("fused-liger", "cuda") is None


def test_the_large_model_is_refused_on_a_cpu() -> None:
    with pytest.raises(InvalidArgumentError, match="llama-small"):
        llama.run_llama("gpu-llama", "cpu", "2026-01-01")


def test_a_qwen_is_trained_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its q, k and v have biases; its published row is another."""
    sizes = llama_models.LlamaSizes(32, 48, 4, 2, 2, 32, 8, (1, 1), "Qwen2")
    monkeypatch.setitem(llama_models.MODELS["Qwen2.5-7B"].sizes, "llama-small", sizes)
    monkeypatch.setattr(llama, "measured_steps", once)
    document = run("frozen", "peft", "fused", model="Qwen2.5-7B")
    assert {cell["status"] for cell in document["cells"]} == {"timed"}
    found = by_place(document)["fused", 1]
    assert found["note"] == "14 layers, 4 groups and 2 gated MLPs are fused"
    assert len(found["distances"]) == 3
    base = llama_models.base_model(sizes, "cpu", torch.float32)
    assert base.model.layers[0].self_attn.q_proj.bias is not None
    assert document["published"]["tokens_per_second"] == 14110
    assert "of a Qwen2 of" in markdown(llama_report.table(document))
    large = llama_models.MODELS["Qwen2.5-7B"].sizes["gpu-llama"]
    assert (large.hidden, large.inner, large.layers, large.vocabulary) == (3584, 18944, 28, 152064)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"one of Llama-3-8B, Qwen2\.5-7B"):
        run(model="Llama-4")


# The budget


def test_what_there_is_no_time_for_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each cell takes 10 seconds of, however busy this machine is."""
    seconds, cell = [0.0], llama._cell

    def taking_ten(*arguments: Any) -> Any:
        found = cell(*arguments)
        seconds[0] += 10.0
        return found

    monkeypatch.setattr(llama, "_cell", taking_ten)
    monkeypatch.setattr(llama, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    cells = run("frozen", "fused", "compiled", budget=15.0)["cells"]
    left_out = {cell["provider"] for cell in cells if cell["status"] == "left out"}
    assert left_out >= {"fused", "compiled"}
    assert cells[0]["status"] == "timed"
    assert "5 s of the budget of 15 s were left" in cells[1]["reason"]


def test_without_time_nothing_is_begun_but_all_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "llama.json"
    assert main(["bench", "--preset", "llama-small", "--device", "cpu", "--budget", "0", "--json", str(path)]) == 0
    cells = json.loads(path.read_text())["cells"]
    assert {cell["status"] for cell in cells} == {"left out"}
    assert capsys.readouterr().out.count("left out") == len(cells)


def test_each_cell_is_on_disk_before_the_next_begins() -> None:
    counts: list[int] = []
    run("frozen", keep=lambda document: counts.append(len(json.loads(json.dumps(document))["cells"])))
    assert counts == [1, 2, 3]


# What is said


def test_it_is_told_line_by_line(document: dict[str, Any]) -> None:
    lines = llama_report.told(document)
    assert sum("tokens/s," in line for line in lines) == 10
    assert sum("liger-kernel is not installed" in line for line in lines) == 4
    assert any(line.startswith("common: batch 2, over frozen") for line in lines)
    assert any("second turn" in line for line in lines)
    assert not any("Published" in line for line in lines)  # of another model


def made(**speeds: float) -> dict[str, Any]:
    """A document of the large model with these tokens a second at 2 x 4096."""
    cells = []
    for name, speed in speeds.items():
        numbers = {"tokens_per_second": speed, "step_ms": 8192e3 / speed, "peak_bytes": 60 * 2**30, "tflops": 1.0}
        numbers |= {"launches": 9000, "busy": 0.97, "not_profiled": None}
        place = {"provider": name.replace("_", "-"), "batch": 2, "tokens": 4096, "again": False}
        told = {"status": "timed", "reason": None, "loss": 12.5, "first_step_s": 1.0, "note": ""}
        cells.append({**place, **told, "numbers": numbers})
    document = {"preset": "gpu-llama", "date": "2026-01-01", "alpha": 32, "dropout": 0.1, "left_out": None}
    document |= {"published": llama_report.published("Llama-3-8B"), "compared": "with PEFT", "parameters": 8030261248}
    document |= {"sizes": {"hidden": 4096, "layers": 32, "batches": [1, 2]}, "cells": cells}
    document["environment"] = {"device": "NVIDIA H100", "versions": {"torch": "2.11.0"}}
    return {**document, "reached": llama_report.reached(document)}


def test_aims_are_judged_and_the_published_row_is_marked() -> None:
    document = made(frozen=13000.0, fused=12600.0, peft=10000.0, fused_liger=13000.0, peft_liger=10000.0)
    assert document["reached"]["common"]["over peft"] == 1.26
    lines = llama_report.told(document)
    assert "tokens/s over the published: ok   1.042 (>= 1)" in lines
    assert "tokens/s over PEFT's: MISS 1.260 (>= 1.35)" in lines
    assert "tokens/s over PEFT's with Liger: ok   1.300 (>= 1.2)" in lines
    assert lines[-1].startswith("Published, not measured here: NeMo Automodel: 12473 tokens/s, 402 TFLOP/s")
    text = markdown(llama_report.table(document))
    assert "| lora_kernels | 2 x 4096 | 12600 | 1 | 1.032 | 60.0 GiB | 9000 | 97% |" in text
    assert "| NeMo Automodel, published | 2 x 4096 | 12473 | 402 |" in text


def test_what_was_not_timed_has_no_ratio() -> None:
    document = made(fused=12600.0)
    assert set(document["reached"]) == {"headline"}
    assert "tokens/s over PEFT's: not measured (>= 1.35)" in llama_report.told(document)


# The clock and the profile


class Mark:
    """A CUDA event whose time is the number of steps that were begun before it."""

    steps = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Mark.steps

    def elapsed_time(self, other: Mark) -> float:
        return 7.0 * (other.at - self.at)


def test_steps_on_a_gpu_are_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(steps.torch.cuda, "Event", Mark)
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 42)):
        monkeypatch.setattr(steps.torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(steps, "launched", lambda step, device, seconds: {"launches": 5})

    def step() -> None:
        Mark.steps += 1
        calls.append("step")

    found = steps.measured_steps(step, 70, "cuda")
    assert found["tokens_per_second"] == pytest.approx(10000.0)
    assert found["all_ms"] == pytest.approx([7.0] * steps._STEPS)
    assert (found["peak_bytes"], found["launches"]) == (42, 5)
    before = ["step"] * steps._WARM_UP + ["synchronize", "reset_peak_memory_stats"]
    assert calls == [*before, *["step"] * steps._STEPS, "synchronize", "max_memory_allocated"]


def test_what_liger_patches_is_put_back() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = (modeling.apply_rotary_pos_emb, modeling.LlamaRMSNorm, modeling.LlamaMLP)
    with llama_models.unpatched():
        modeling.apply_rotary_pos_emb = modeling.LlamaRMSNorm = modeling.LlamaMLP = None
    assert (modeling.apply_rotary_pos_emb, modeling.LlamaRMSNorm, modeling.LlamaMLP) == before


@dataclass
class Event:
    """One of the profiler's."""

    its_name: str
    begin: int
    length: int
    on_device: bool = True
    annotation: bool = False

    def name(self) -> str:
        return self.its_name

    def start_ns(self) -> int:
        return self.begin

    def duration_ns(self) -> int:
        return self.length

    def is_user_annotation(self) -> bool:
        return self.annotation

    def device_type(self) -> Any:
        device: Any = torch._C._autograd.DeviceType
        return device.CUDA if self.on_device else device.CPU


def test_kernels_are_counted_and_time_in_which_two_run_counts_once() -> None:
    events = [
        Event("gemm", 1000, 500),
        Event("beside it", 1200, 100),
        Event("over its end", 1400, 300),
        Event("Memcpy DtoD", 3000, 50),
        Event("cudaLaunchKernel", 0, 9000, on_device=False),
        Event("Optimizer.step#AdamW.step", 0, 9000),
        Event("mine", 0, 9000, annotation=True),
    ]
    count, busy = steps.kernels(events)
    assert count == 3
    assert busy == pytest.approx(750e-9)


def test_the_profilers_own_events_have_what_is_read_of_them() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    events = profile.profiler.kineto_results.events()
    assert len(events) > 0
    assert steps.kernels(events) == (0, 0.0)
    for event in events:
        assert event.start_ns() >= 0
        assert isinstance(event.is_user_annotation(), bool)


def test_a_profiler_that_fails_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**arguments: Any) -> Any:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(steps.torch.profiler, "profile", broken)
    monkeypatch.setattr(steps.torch.cuda, "synchronize", lambda: None)
    found = steps.launched(lambda: None, "cuda", 1.0)
    assert (found["launches"], found["not_profiled"]) == (None, "The profiler failed: CUPTI is in use.")
