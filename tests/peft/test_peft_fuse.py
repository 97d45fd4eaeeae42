"""``fuse_peft`` on live models: everything of PEFT's goes on working, and unfusing leaves nothing behind."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import lora_kernels
from lora_kernels import fuse_peft, unfuse_peft
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from made_models import Snapshot, refused, replacing
from numerics import check, same_bits

peft = pytest.importorskip("peft")
from lora_kernels.peft import FusedLoraLinear, calls, with_fused_layers  # noqa: E402
from peft_models import TWO, Small, fused, lora_layers, make  # noqa: E402

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    check("y", ours, exact, theirs, torch.float32)


def same_outputs(ours: Any, theirs: Any, **arguments: Any) -> None:
    """The outputs agree by the policy, PEFT's being the yardstick."""
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(X.double(), **arguments)
        same(ours(X, **arguments), theirs(X, **arguments), exact)


# What stays as it is


def test_only_the_class_changes() -> None:
    model = make(*TWO)
    layers = lora_layers(model)
    hook = layers[0].register_forward_hook(lambda module, args, y: y + 1.0)
    before, keys, names = Snapshot(model), list(model.state_dict()), [set(vars(layer)) for layer in layers]
    with torch.no_grad():
        y = model(X)
    fuse_peft(model)
    before.assert_unchanged(model)
    assert list(model.state_dict()) == keys
    assert all(type(layer) is FusedLoraLinear and isinstance(layer, peft.tuners.lora.Linear) for layer in layers)
    with torch.no_grad():
        same(model(X), y, copy.deepcopy(model).double()(X.double()))
    hook.remove()
    unfuse_peft(model)
    before.assert_unchanged(model)
    assert all(type(layer) is peft.tuners.lora.Linear for layer in layers)
    assert [set(vars(layer)) for layer in layers] == names
    assert "_create_new_module" not in vars(model.base_model)


def test_unfused_it_gives_the_bits_of_before() -> None:
    stock = make(*TWO, dtype=torch.bfloat16)
    model = fused(stock)
    model(X.bfloat16()).sum().backward()
    unfuse_peft(model)
    assert same_bits(model(X.bfloat16()).detach(), stock(X.bfloat16()).detach())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_and_apart(copied: Callable[[Any], Any]) -> None:
    model = fused(make())
    other = copied(model)
    assert [type(layer) for layer in lora_layers(other)] == [FusedLoraLinear] * 2
    assert same_bits(other(X).detach(), model(X).detach())
    unfuse_peft(other)
    assert calls(model).fused == 2


def test_saving_writes_pefts_files_and_loading_reads_them(tmp_path: Path) -> None:
    stock = make()
    model = fused(stock)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "fused")
    tensors = (tmp_path / kind / "a0" / "adapter_model.safetensors" for kind in ("fused", "stock"))
    assert len({path.read_bytes() for path in tensors}) == 1
    configs = [json.loads((tmp_path / kind / "a0" / "adapter_config.json").read_text()) for kind in ("fused", "stock")]
    for config in configs:
        config["target_modules"].sort()  # PEFT writes a set, whose copy may have another order
    assert configs[0] == configs[1]
    model.load_adapter(tmp_path / "fused" / "a0", "again")
    model.set_adapter("again")
    same_outputs(model, stock)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fused(model).load_state_dict(torch.load(buffer))


# What PEFT does with a live model


def test_adapters_come_and_go() -> None:
    stock = make()
    model = fused(stock)
    for m in (model, stock):
        torch.manual_seed(5)
        m.add_adapter("late", peft.LoraConfig(r=3, target_modules=["lin0"], init_lora_weights=False))
        m.set_adapter("late")
    same_outputs(model, stock)
    for m in (model, stock):
        m.delete_adapter("late")
        m.set_adapter("a0")
    same_outputs(model, stock)
    with model.disable_adapter(), stock.disable_adapter():
        assert same_bits(model(X).detach(), stock(X).detach())
    assert calls(model).base == 3
    assert not calls(model).own


def test_layers_that_a_later_adapter_brings_are_fused() -> None:
    model = make({"target_modules": ["lin0"]})
    assert len(fuse_peft(model)) == 1
    model.add_adapter("late", peft.LoraConfig(r=3, target_modules=["lin1"]))
    assert [type(layer) for layer in lora_layers(model)] == [FusedLoraLinear] * 2
    unfuse_peft(model)
    model.add_adapter("later", peft.LoraConfig(r=3, target_modules="all-linear"))
    assert [type(layer) for layer in lora_layers(model)] == [peft.tuners.lora.Linear] * 2


def test_all_linear_finds_fused_layers() -> None:
    model = fused(make())
    model.add_adapter("all", peft.LoraConfig(r=2, target_modules="all-linear"))
    assert all(set(layer.lora_A) == {"a0", "all"} for layer in lora_layers(model))


@pytest.mark.parametrize("active", [["a0"], ["a0", "a1"]], ids=str)
def test_merging_gives_pefts_bits(active: list[str]) -> None:
    stock = make(*TWO)
    stock.base_model.set_adapter(active)
    model = fused(stock)
    for m in (model, stock):
        m.merge_adapter()
    assert same_bits(model(X).detach(), stock(X).detach())
    for m in (model, stock):
        m.unmerge_adapter()
    same_outputs(model, stock)
    plain, theirs = model.merge_and_unload(), stock.merge_and_unload()
    assert type(plain.lin0) is nn.Linear
    assert same_bits(plain(X).detach(), theirs(X).detach())


def test_hot_swapping_reaches_the_fused_product(tmp_path: Path) -> None:
    make({"r": 3, "lora_alpha": 1}).save_pretrained(tmp_path)
    stock = make({"r": 5})
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(stock, target_rank=8)
    model = fused(stock)
    for m in (model, stock):
        peft.utils.hotswap.hotswap_adapter(m, tmp_path / "a0", adapter_name="a0")
    same_outputs(model, stock)
    assert calls(model).fused == 2


def test_what_peft_refuses_it_still_refuses() -> None:
    layer = lora_layers(fused(make(*TWO)))[0]
    with pytest.raises(ValueError, match="adapter_names"):
        layer(X, adapter_names=["a0"])
    with pytest.raises(RuntimeError, match="dtype"):
        layer(X.bfloat16())
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer(X, adapter_names=["a0"] * 5)


def test_an_overflow_in_one_rows_adapter_stays_out_of_the_other_rows() -> None:
    model = fused(make({"r": 1, "target_modules": ["lin0"]}, {"r": 1, "target_modules": ["lin0"]}))
    layer = lora_layers(model)[0]
    layer.lora_A["a1"].weight.data.fill_(float("inf"))
    y = layer(X, adapter_names=["a0", "a1", "__base__", "a1", "a0"])
    assert y.isfinite().all(1).tolist() == [True, False, True, False, True]


def test_layers_that_peft_builds_fused() -> None:
    config = with_fused_layers(peft.LoraConfig(r=2, target_modules=["lin0", "emb"]))
    base = Small()
    base.emb = nn.Embedding(3, 4)
    model = peft.get_peft_model(base, config)
    kinds = {name: type(module).__name__ for name, module in base.named_children()}
    assert kinds == {"lin0": "FusedLoraLinear", "lin1": "Linear", "emb": "Embedding"}
    assert "_custom_modules" not in config.to_dict()
    of_a_parameter = peft.LoraConfig(r=2, target_parameters=["lin1.weight"], target_modules=[])
    model.add_adapter("parameter", with_fused_layers(of_a_parameter))
    assert type(base.lin1).__name__ == "ParamWrapper"
    unfuse_peft(model)
    assert config._custom_modules is None


def test_injection_without_a_peft_model_builds_fused_layers() -> None:
    model = peft.inject_adapter_in_model(with_fused_layers(peft.LoraConfig(r=2, target_modules=["lin0"])), Small())
    assert type(model.lin0) is FusedLoraLinear
    assert len(fuse_peft(model).already) == 1


# Compiling


@pytest.mark.parametrize("two", [False, True])
def test_it_compiles_whole_and_counting_does_not_break_it(two: bool) -> None:
    stock = make(*TWO)
    stock.base_model.set_adapter(["a0", "a1"] if two else "a0")
    model = fused(stock)
    by_eager = model(X).detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(X)
    y.sum().backward()
    assert same_bits(y.detach(), by_eager)
    assert calls(model).fused == 2
    for m in (model, stock):
        for layer in lora_layers(m):
            layer.set_scale("a0", 0.3)
    same_outputs(compiled, stock)


def test_a_hot_swappable_scaling_needs_no_second_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    stock = make()
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(stock, target_rank=8)
    model = fused(stock)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for scaling in (0.5, 2.0, 3.0):
        for m in (model, stock):
            for layer in lora_layers(m):
                layer.scaling["a0"].fill_(scaling)
        same_outputs(compiled, stock)
    assert counter.frame_count == 1


# The report and refusals


def test_the_report_tells_what_was_done_and_how_calls_go() -> None:
    base = Small()
    base.emb = nn.Embedding(3, 4)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lin0", "lin1", "emb"]))
    alora = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    model.add_adapter("alora", peft.LoraConfig(r=2, target_modules=["lin1"], **alora))
    report = fuse_peft(model)
    assert [layer.adapters for layer in report] == [{"default": 2}, {"default": 2, "alora": 2}]
    assert [(layer.name, "layer.Embedding" in layer.reason) for layer in report.skipped] == [
        ("base_model.model.emb", True)
    ]
    assert "adapter 'alora'" in report.notes[0]
    model(X)
    model.set_adapter("alora")
    model(X)
    assert (report.calls.fused, report.calls.base, report.calls.share) == (2, 1, 2 / 3)
    assert list(report.calls.own) == ["ALoraLinearVariant is a variant of LoRA"]
    assert "calls so far: 2 fused, 1 by PEFT's own forward, 1 base alone" in str(report)
    assert report.calls == calls(model) == unfuse_peft(model).calls


def test_fusing_twice_is_no_error_and_says_so() -> None:
    model = make()
    first, second = fuse_peft(model), fuse_peft(model)
    assert (len(first), len(second)) == (2, 0)
    assert second.already == tuple(layer.name for layer in first)
    assert "fused before" in str(second)


class _Quantized(Tensor):
    """Stands for a weight of another storage."""


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class _OwnLora(peft.tuners.lora.Linear):
    pass


def _quantize(model: Any) -> None:
    base = model.base_model.model.lin0.base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(_Quantized), requires_grad=False)


def _scale(model: Any) -> None:
    model.base_model.model.lin0.base_layer.__class__ = _Scaled


def _derive(model: Any) -> None:
    model.base_model.model.lin0.__class__ = _OwnLora


def _offload(model: Any) -> None:
    layer = model.base_model.model.lin0
    layer.forward = lambda x: type(layer).forward(layer, x)


def _pack(model: Any) -> None:
    model.base_model.model.lin0.base_layer.weight.data = torch.zeros(40, 24, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "word"),
    [(_quantize, "_Quantized"), (_scale, "_Scaled"), (_derive, "_OwnLora"), (_offload, "accelerate"), (_pack, "int8")],
)
def test_a_layer_that_cannot_be_fused_stays_pefts_and_the_report_says_why(change: Any, word: str) -> None:
    model = make()
    change(model)
    kind = type(model.base_model.model.lin0)
    report = fuse_peft(model)
    assert [layer.name for layer in report] == ["base_model.model.lin1"]
    assert word in report.skipped[0].reason
    assert type(model.base_model.model.lin0) is kind


def test_a_model_without_anything_to_fuse_is_warned_of() -> None:
    base = nn.Sequential(nn.Embedding(3, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="no layer to fuse"):
        assert not len(fuse_peft(model))


def test_merged_adapters_are_refused() -> None:
    model = make()
    model.merge_adapter()
    refused(model, fuse_peft, LoRAStateError, "'a0'", "base_model.model.lin0", "unmerge_adapter")
    assert type(model.base_model.model.lin0) is peft.tuners.lora.Linear


def _ia3() -> Any:
    return peft.get_peft_model(Small(), peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]))


@pytest.mark.parametrize(
    ("model", "function", "error", "words"),
    [
        (lambda: "model", fuse_peft, InvalidTypeError, ["str"]),
        (Small, fuse_peft, InvalidArgumentError, ["get_peft_model", "replace_linear"]),
        (_ia3, fuse_peft, InvalidArgumentError, ["IA3"]),
        (make, replacing(target_modules=["lin0"]), InvalidTypeError, ["PEFT's", "fuse_peft"]),
        (make, replacing(target_modules="all-linear"), InvalidTypeError, ["a part of", "fuse_peft"]),
        (make, unfuse_peft, LoRAStateError, ["nothing"]),
        (make, calls, LoRAStateError, ["fuse_peft(model)"]),
        (lambda: 3, calls, InvalidTypeError, ["int"]),
        (lambda: peft.IA3Config(), with_fused_layers, InvalidTypeError, ["IA3Config", "LoraConfig"]),
    ],
)
def test_refusals(model: Any, function: Any, error: type[Exception], words: list[str]) -> None:
    refused(model(), function, error, *words)


def test_without_peft_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners.lora.layer", None)
    with pytest.raises(ImportError, match="pip install") as caught:
        fuse_peft(Small())
    assert isinstance(caught.value, lora_kernels.LoRAKernelsError)


def test_an_old_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("peft.tuners.lora.layer.LoraVariant")
    with pytest.raises(lora_kernels.LoRAKernelsError, match=r"peft 0\.16 or later"):
        fuse_peft(Small())
