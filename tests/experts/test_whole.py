"""What else is done to models with adapted experts: merging, switching off, optimizers, checkpoints, counting."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mixtures
import zero3
from lora_kernels import (
    FusedLoRAExperts,
    LoRAConfig,
    adapters_disabled,
    lora_plus_groups,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    replace_linear,
    restore_linear,
    unmerge_lora,
)
from lora_kernels.accuracy import judge
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsWarning, LoRAStateError
from mixtures import TARGETS, TOKENS, logits
from numerics import same_bits

pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def adapted(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = mixtures.made(name, dtype)
    replace_linear(model, LoRAConfig(**{"r": 3, "lora_alpha": 6, "target_parameters": TARGETS, **options}))
    mark_only_lora_as_trainable(model)
    mixtures.move(p for p in model.parameters() if p.requires_grad)
    return model


def layers_of(model: nn.Module) -> list[FusedLoRAExperts]:
    return [module for module in model.modules() if isinstance(module, FusedLoRAExperts)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", mixtures.MODELS)
def test_merged_is_each_experts_sum_rounded_once(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype)
    plain = {n: p.clone() for n, p in model.named_parameters()}
    merge_lora(model)
    for layer in layers_of(model):
        assert layer.merged
        for own in layer.options:
            base = layer._parameters[own]
            base = base.transpose(1, 2) if layer.is_transposed else base
            wide = torch.promote_types(dtype, torch.float32)
            for e in range(layer.num_experts):
                update = layer.lora_B[own][e].to(wide) @ layer.lora_A[own][e].to(wide)
                expected = torch.add(base[e].to(wide), update, alpha=layer.scaling(own)).to(dtype)
                assert torch.equal(layer.stacked(own)[e], expected)
    assert all(same_bits(p, plain[n]) for n, p in model.named_parameters())  # the base stands where it stood
    unmerge_lora(model)
    assert not any(layer.merged or list(layer.buffers()) for layer in layers_of(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merged_gives_the_same_by_any_implementation_and_unmerging_is_exact(name: str, implementation: str) -> None:
    model, wide = adapted(name), adapted(name, torch.float64)
    with torch.no_grad():
        before, exact = logits(model), logits(wide)
        plain = mixtures.made(name)
        plain.set_experts_implementation(implementation)
        model.set_experts_implementation(implementation)
        merge_lora(model)
        merged = logits(model)
        for module, own in ((m, o) for m in layers_of(model) for o in m.options):
            path = next(n for n, each in model.named_modules() if each is module)
            plain.get_submodule(path).get_parameter(own).copy_(getattr(module, own))
        assert same_bits(merged, logits(plain))  # the module's own forward with the merged weights
        assert judge("logits", merged, exact, before, torch.float32, depth=8).passed
        unmerge_lora(model)
        assert same_bits(logits(model), before)


def test_merged_and_off_it_is_the_base() -> None:
    model, plain, wide = adapted(), mixtures.made("qwen3_moe"), mixtures.made("qwen3_moe", torch.float64)
    merge_lora(model)
    wide.set_experts_implementation("eager")
    with torch.no_grad(), adapters_disabled(model):
        off = logits(model)
    assert judge("logits", off, logits(wide), logits(plain), torch.float32, depth=8).passed
    assert not torch.allclose(off, logits(model))


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float(), lambda m: m.to("cpu")],
    ids=["deepcopy", "pickle", "dtypes", "to"],
)
def test_merged_copies_stay_merged(way: Any) -> None:
    model = adapted()
    merge_lora(model)
    before = logits(model)
    other = way(model)
    assert same_bits(logits(other), before)
    unmerge_lora(other)
    fresh = adapted()
    assert same_bits(logits(other), logits(fresh))


def test_states_of_a_merged_model() -> None:
    model = adapted()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in state.items()}
    assert all(same_bits(value, state[name]) for name, value in model.state_dict().items())
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(LoRAStateError, match="experts there are merged"):
        model.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())  # of the whole model nothing was loaded
    layer = layers_of(model)[0]
    with pytest.raises(LoRAStateError, match="was assigned to on merged experts"):
        layer.down_proj = nn.Parameter(torch.zeros_like(layer.down_proj))
    with pytest.raises(LoRAStateError, match="merged already"):
        merge_lora(model)
    with pytest.raises(LoRAStateError, match="merged experts"):
        layer.reset_lora_parameters()
    unmerge_lora(model)
    with pytest.raises(LoRAStateError, match="is not merged"):
        unmerge_lora(model)
    with pytest.raises(LoRAStateError, match="not merged"):
        layer.unmerge()


def test_where_one_cannot_be_merged_none_is() -> None:
    model = adapted(target_modules=["q_proj"])
    layers_of(model)[-1].lora_B["down_proj"].data[2, 1] = float("inf")
    before = logits(model)
    with pytest.raises(LoRAStateError, match=r"layers\.1\.mlp\.experts.*none is.*down_proj of expert 2"):
        merge_lora(model)
    assert same_bits(logits(model), before)
    assert not any(layer.merged for layer in layers_of(model))


def test_a_merged_model_restores_to_the_merged_weights() -> None:
    model, plain = adapted(target_modules=["q_proj"]), mixtures.made("qwen3_moe")
    merge_lora(model)
    before = logits(model)
    report = restore_linear(model)
    assert all(row.merged for row in report)
    assert len(report) == 4
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same_bits(logits(model), before)
    assert not any("lora" in name or "merged" in name for m in model.modules() for name in vars(m))


def test_what_zero_3_has_partitioned_is_never_taken_for_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its placeholders are empty: nothing is computed of them, and within its context all is as before."""
    with pytest.raises(InvalidTypeError, match=r"DeepSpeed ZeRO-3 holds.*before deepspeed\.initialize"):
        replace_linear(zero3.partition(mixtures.made("qwen3_moe")), LoRAConfig(r=2, target_parameters=TARGETS))
    model = adapted()
    before = logits(model)
    zero3.partition(model)
    layer = layers_of(model)[0]
    index = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(LoRAStateError, match=r"gate_up_proj is \(0,\): DeepSpeed ZeRO-3.*not gathered"):
        layer(torch.ones(3, 16), index, torch.ones(3, 2))
    with pytest.raises(LoRAStateError, match="merge was called on a model where DeepSpeed ZeRO-3"):
        layer.merge()
    with pytest.raises(LoRAStateError, match="DeepSpeed ZeRO-3"):
        merge_lora(model)
    assert not any(each.merged for each in layers_of(model))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero3))
    with zero3.GatheredParameters(model.parameters()):
        assert same_bits(logits(model), before)


def test_training_while_merged_is_told() -> None:
    model = adapted().train()
    merge_lora(model)
    with pytest.warns(LoRAKernelsWarning, match="while its adapter is merged"):
        model(TOKENS)
    unmerge_lora(model)
    for layer in layers_of(model):
        layer.enable_lora(False)
    with pytest.warns(LoRAKernelsWarning, match="switched off by enable_lora"):
        model(TOKENS)
    for layer in layers_of(model):
        layer.enable_lora(True)
        with layer.enable_lora(False):
            assert not layer._lora_enabled
        assert layer._lora_enabled


def test_adapters_are_off_for_a_block_and_in_what_a_checkpoint_runs_again() -> None:
    model = adapted()
    base = logits(mixtures.made("qwen3_moe"))
    on = logits(model)
    with adapters_disabled(model):
        off = logits(model)
    assert same_bits(logits(model), on)
    assert same_bits(off, base)
    layer = layers_of(model)[0]
    x, index = torch.randn(5, 16, requires_grad=True), torch.arange(10).reshape(5, 2) % 8
    weights = torch.rand(5, 2)

    def gradient(checkpointed: bool) -> Tensor:
        with adapters_disabled(model):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(layer, x, index, weights, use_reentrant=False)
            else:
                y = layer(x, index, weights)
        return torch.autograd.grad(y.sum(), x)[0]  # after the block has ended

    assert same_bits(gradient(True), gradient(False))


def test_groups_of_lora_plus() -> None:
    model = adapted(target_modules=["q_proj"])
    slow, fast = lora_plus_groups(model, lr=1e-3, lr_ratio=4)
    names = {p: n for n, p in model.named_parameters()}
    assert {"lora_A" in names[p] for p in slow["params"]} == {True}
    assert {"lora_B" in names[p] for p in fast["params"]} == {True}
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    assert len(slow["params"]) == len(fast["params"]) == 6


def test_the_state_of_the_adapters_alone() -> None:
    model = adapted(target_modules=["q_proj"])
    state = lora_state_dict(model)
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    other = mixtures.made("qwen3_moe")
    replace_linear(other, LoRAConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=TARGETS))
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert same_bits(logits(other), logits(model))
    wrong = mixtures.made("qwen3_moe")
    replace_linear(wrong, LoRAConfig(r=4, target_parameters=TARGETS))
    kept = {n: p.clone() for n, p in wrong.named_parameters()}
    with pytest.raises(InvalidArgumentError, match=r"lora_A\.gate_up_proj is \(8, 3, 16\)"):
        wrong.load_state_dict(state, strict=False)
    assert all(same_bits(p, kept[n]) for n, p in wrong.named_parameters())


def test_nothing_of_a_weights_size_is_made_or_kept() -> None:
    """The largest tensor that autograd keeps, beside Parameters, has a row for each slot; none is a weight's."""
    layer = layers_of(adapted())[0].train()
    x, index = torch.randn(3, 16, requires_grad=True), torch.arange(6).reshape(3, 2)
    kept: list[Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, index, torch.rand(3, 2))
    assert max(tensor.numel() for tensor in kept) <= index.numel() * 16


def test_flops_are_those_of_the_formulas() -> None:
    layer = layers_of(adapted())[0].train()
    tokens, k, r = 10, 2, 3
    x, index = torch.randn(tokens, 16, requires_grad=True), torch.randint(8, (tokens, k))
    with FlopCounterMode(display=False) as counter:
        layer(x, index, torch.rand(tokens, k)).sum().backward()
    sizes = [layer.stacked(own).shape[1:] for own in layer.options]
    due = sum(2 * n * c + 2 * r * (n + c) + 2 * n * c + 4 * r * (n + c) for n, c in sizes)  # y; dx, dh, da, db
    assert counter.get_total_flops() == tokens * k * due


def test_checkpoints_of_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lora_kernels import load_adapter
    from lora_kernels.trainer import SaveAdapterCallback

    def trained(steps: int, folder: Path, resume: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = adapted()
        data = [{"input_ids": torch.arange(i, i + 6) % 24, "labels": torch.arange(i, i + 6) % 24} for i in range(8)]
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[SaveAdapterCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained(4, tmp_path / "a")
    trained(2, tmp_path / "b")
    resumed = trained(4, tmp_path / "b", str(tmp_path / "b" / "checkpoint-2"))
    assert same_bits(logits(resumed.eval()), logits(whole.eval()))
    folder = tmp_path / "a" / "checkpoint-4"
    loaded = mixtures.made("qwen3_moe")
    load_adapter(loaded, folder)
    assert same_bits(logits(loaded), logits(whole))
    from safetensors.torch import load_file

    held = load_file(folder / "model.safetensors")
    assert not any(name.endswith(("experts.gate_up_proj", "embed_tokens.weight")) for name in held)
    assert any("lora_A.gate_up_proj" in name for name in held)
