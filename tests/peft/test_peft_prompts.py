"""PEFT's prompt tuning, p-tuning and prefix tuning over replaced layers and over fused ones, beside stock PEFT."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from architectures import made
from lora_kernels import LoRAConfig, adapters_disabled, fuse_peft, load_adapter, replace_linear, save_adapter
from lora_kernels.errors import LoRAKernelsWarning, LoRAStateError
from lora_kernels.models.model import lora_layers
from lora_kernels.peft import calls
from made_models import Snapshot
from numerics import check_all, same_bits
from peft_models import acting, peft

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]
TOKENS = torch.arange(10).reshape(2, 5)
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
OPTIONS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(**OPTIONS),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **OPTIONS),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**OPTIONS),
    "projected prefix": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **OPTIONS),
}
prompts = pytest.mark.parametrize("prompt", PROMPTS)
ways = pytest.mark.parametrize("way", ["replaced", "fused"])


def stock(prompt: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """PEFT's LoRA on a small Llama, and a prompt around the same base; both act, and all of them trains."""
    torch.manual_seed(0)
    lora = peft.get_peft_model(
        made("llama", dtype), peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    model = peft.get_peft_model(acting(lora).get_base_model(), PROMPTS[prompt]())
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return lora, train(model).eval()


def train(model: Any) -> Any:
    """The adapters train beside the prompt, which PEFT freezes them for."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "prompt_encoder" in name)
    return model


def ours(way: str, prompt: str, lora: Any, theirs: Any) -> Any:
    """The same by fused or replaced layers."""
    if way == "fused":
        model = copy.deepcopy(theirs)
        fuse_peft(model)
        return model
    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(folder)
        base = made("llama", next(theirs.base_model.parameters()).dtype)
        load_adapter(base, folder)
    model = peft.get_peft_model(base, PROMPTS[prompt]())
    model.prompt_encoder.load_state_dict(theirs.prompt_encoder.state_dict())
    return train(model).eval()


def results(model: Any, dtype: torch.dtype | None = None, **inputs: Any) -> dict[str, Tensor]:
    """The logits, and the gradients of the prompt and of each adapter, by names that both ways have."""
    model.zero_grad()
    found = model(**(inputs or {"input_ids": TOKENS, "attention_mask": MASK})).logits
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.dtype))
    gradients = {n.replace(".default.weight", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.detach().flatten(0, -2), **gradients}


@ways
@prompts
def test_values_and_gradients_are_pefts(prompt: str, way: str) -> None:
    lora, theirs = stock(prompt)
    model = ours(way, prompt, lora, theirs)
    actual, exact = results(model.double()), results(theirs.double())
    assert actual.keys() == exact.keys()
    assert sum("lora_" in name for name in actual) == 2 * 2 * len(TARGETS)
    assert any("prompt_encoder" in name for name in actual)
    check_all(actual, exact, exact, torch.float64)
    assert way == "replaced" or calls(model).share == 1.0


def t5() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    torch.manual_seed(3)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=24, decoder_start_token_id=0, **sizes)
    ).eval()


TASKS: dict[str, tuple[str, Callable[[], Any], list[str], Tensor]] = {
    "encoder and decoder": ("SEQ_2_SEQ_LM", t5, ["q", "v", "wo"], TOKENS),
    "classifier": ("SEQ_CLS", lambda: made("bert"), ["query", "value"], torch.tensor([0, 1])),
    "Conv1D": ("CAUSAL_LM", lambda: made("gpt2"), ["c_attn", "c_fc"], TOKENS),
}


@pytest.mark.parametrize("task", TASKS)
@prompts
def test_other_architectures_and_tasks(prompt: str, task: str, tmp_path: Path) -> None:
    kind, make, targets, labels = TASKS[task]
    torch.manual_seed(0)
    lora = acting(peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=targets)))
    lora.save_pretrained(tmp_path)
    base = make()
    load_adapter(base, tmp_path)
    configs = [PROMPTS[prompt]() for _ in range(2)]
    for config in configs:
        config.task_type = kind
    theirs, model = (peft.get_peft_model(m, c) for m, c in zip((lora.get_base_model(), base), configs, strict=True))
    model.load_state_dict({n: v for n, v in theirs.state_dict().items() if "lora_" not in n}, strict=False)
    assert same_bits(*(next(iter(each.prompt_encoder.parameters())) for each in (model, theirs)))
    inputs = {"input_ids": TOKENS, "labels": labels}
    actual, exact = (results(each.eval().double(), **inputs) for each in (model, theirs))
    assert actual.keys() == exact.keys()
    assert any("prompt_encoder" in name for name in actual)
    check_all(actual, exact, exact, torch.float64)


@ways
@prompts
def test_over_a_16_bit_base_the_prompt_and_the_adapters_have_fp32_gradients(prompt: str, way: str) -> None:
    lora, theirs = stock(prompt, torch.bfloat16)
    model = ours(way, prompt, lora, theirs)
    actual = results(model)
    assert actual.keys() == results(theirs).keys()
    assert actual["logits"].dtype == torch.bfloat16
    dtypes = {name.replace(".default.weight", ""): parameter.dtype for name, parameter in theirs.named_parameters()}
    assert all(gradient.dtype == dtypes[name] == torch.float32 for name, gradient in actual.items() if name != "logits")


@ways
@prompts
def test_generated_tokens_are_pefts(prompt: str, way: str) -> None:
    lora, theirs = stock(prompt)
    model = ours(way, prompt, lora, theirs)
    assert generated(model) == generated(theirs)
    assert generated(model) != generated(made("llama"))


def generated(model: Any) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found: list[list[int]] = model.generate(input_ids=TOKENS, attention_mask=MASK, **options).tolist()
    return found


@ways
@prompts
def test_each_adapter_can_be_switched_off_for_one_base(prompt: str, way: str) -> None:
    lora, theirs = stock(prompt)
    model, inputs = ours(way, prompt, lora, theirs), {"input_ids": TOKENS, "attention_mask": MASK}
    both, trains = model(**inputs).logits, [p.requires_grad for p in model.parameters()]
    alone = peft.get_peft_model(made("llama"), PROMPTS[prompt]()).eval()
    alone.prompt_encoder.load_state_dict(theirs.prompt_encoder.state_dict())
    plain = made("llama")
    with adapters_disabled(model):
        assert same_bits(model(**inputs).logits, plain(**inputs).logits)
        assert generated(model) == generated(plain)
    with adapters_disabled(model.base_model):
        assert same_bits(model(**inputs).logits, alone(**inputs).logits)
        assert generated(model) == generated(alone)
    with model.disable_adapter():
        assert same_bits(model(**inputs).logits, model.base_model(**inputs).logits)
    assert not same_bits(model.base_model(**inputs).logits, plain(**inputs).logits)
    assert same_bits(model(**inputs).logits, both)
    assert [p.requires_grad for p in model.parameters()] == trains


@pytest.mark.parametrize("reentrant", [False, True])
@ways
@pytest.mark.parametrize("prompt", ["prompt tuning", "p-tuning"])
def test_checkpointing_changes_no_bit(prompt: str, way: str, reentrant: bool) -> None:
    lora, theirs = stock(prompt)
    model = ours(way, prompt, lora, theirs).train()
    expected = results(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    actual = results(model)
    assert actual.keys() == expected.keys()
    assert all(same_bits(actual[name], value) for name, value in expected.items())


@ways
def test_checkpointing_and_prefixes_exclude_each_other_as_in_peft(way: str) -> None:
    lora, theirs = stock("prefix tuning")
    base = ours(way, "prefix tuning", lora, theirs).base_model
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft.get_peft_model(base, PROMPTS["prefix tuning"]())


@prompts
def test_prompt_and_adapter_go_to_files_of_their_own_and_back(prompt: str, tmp_path: Path) -> None:
    lora, theirs = stock(prompt)
    model, inputs = ours("replaced", prompt, lora, theirs), {"input_ids": TOKENS, "attention_mask": MASK}
    with pytest.warns(LoRAKernelsWarning, match="no LoRA layer that replace_linear made"):
        model.save_pretrained(tmp_path / "prompt")
    with pytest.warns(UserWarning, match="leaves out the prompt of PEFT's"):
        save_adapter(model, tmp_path / "lora")
    again = made("llama")
    load_adapter(again, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "prompt").eval()
    by_peft = peft.PeftModel.from_pretrained(
        made("llama"), tmp_path / "lora"
    ).get_base_model()  # a file that PEFT reads
    by_peft = peft.PeftModel.from_pretrained(by_peft, tmp_path / "prompt").eval()
    later = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "prompt").eval()
    load_adapter(later, tmp_path / "lora")  # onto the model with the prompt
    assert same_bits(loaded(**inputs).logits, later(**inputs).logits)
    exact = {"logits": by_peft.double()(**inputs).logits}
    for each in (loaded, later):
        check_all({"logits": each.double()(**inputs).logits}, exact, exact, torch.float64)
    if prompt in ("prompt tuning", "prefix tuning"):  # else PEFT writes what a network gives, in its dtype
        check_all({"logits": theirs.double()(**inputs).logits}, exact, exact, torch.float64)


def test_a_prompt_is_not_overwritten(tmp_path: Path) -> None:
    model = ours("replaced", "prompt tuning", *stock("prompt tuning"))
    with pytest.warns(LoRAKernelsWarning):
        model.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LoRAStateError, match=r"type PROMPT_TUNING.*folder of its own"):
        save_adapter(model.base_model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


RULES: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": r"model\.layers\.0\..*q_proj"},
    {"target_modules": ["model.layers.1.mlp.up_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("prompt", ["p-tuning", "projected prefix"])
def test_a_rule_means_the_base_below_a_prompt(prompt: str, rule: dict[str, Any]) -> None:
    plain, model = made("llama"), peft.get_peft_model(made("llama"), PROMPTS[prompt]())
    before = Snapshot(model.prompt_encoder)
    expected, report = (replace_linear(each, LoRAConfig(r=2, **rule)) for each in (plain, model))
    before.assert_unchanged(model.prompt_encoder)  # its linear layers too
    assert [layer.name for layer in report] == [layer.name for layer in expected]
    assert all("makes a prompt of PEFT's" in skipped.reason for skipped in report.skipped)
    assert bool(report.skipped) == (rule["target_modules"] == "all-linear")
    assert [name for name, _ in lora_layers(model)] == [name for name, _ in lora_layers(plain)]


@prompts
def test_merging_and_restoring_leave_the_prompt(prompt: str) -> None:
    lora, theirs = stock(prompt)
    model, inputs = ours("replaced", prompt, lora, theirs), {"input_ids": TOKENS, "attention_mask": MASK}
    encoder = Snapshot(model.double().prompt_encoder)
    exact = {"logits": theirs.double()(**inputs).logits}
    lora_kernels.merge_lora(model)
    merged = model(**inputs).logits
    check_all({"logits": merged}, exact, exact, torch.float64)
    lora_kernels.restore_linear(model)
    assert same_bits(model(**inputs).logits, merged)
    assert not any(isinstance(module, lora_kernels.FusedLoRALinear) for module in model.modules())
    encoder.assert_unchanged(model.prompt_encoder)


def test_the_state_dict_of_the_adapters_leaves_the_prompt_out_with_a_word() -> None:
    model = ours("replaced", "prompt tuning", *stock("prompt tuning"))
    with pytest.warns(UserWarning, match="lora_state_dict leaves out the prompt of PEFT's"):
        assert all("lora_" in name for name in lora_kernels.lora_state_dict(model))


def test_only_lora_trains_when_told_so() -> None:
    model = peft.get_peft_model(made("llama"), PROMPTS["p-tuning"]())
    replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    lora_kernels.mark_only_lora_as_trainable(model)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains
    assert all("lora_" in name for name in trains)
