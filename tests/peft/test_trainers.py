"""Trainers of other packages with one line or entry more: their losses are those of PEFT's own layers.

TRL's run as they are. Axolotl's own function loads the plug-in where Axolotl is installed, else a stand-in does.
LLaMA-Factory and ms-swift are stand-ins with what the files on docs/trainers.md import of them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kernels
from documents import ROOT, bodies
from lora_kernels.errors import InvalidArgumentError

transformers = pytest.importorskip("transformers", reason="trainers of transformers are tested")
peft = pytest.importorskip("peft", reason="trainers make PEFT models")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from lora_kernels.trainer import FusePeftCallback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]

WORDS = ["the", "adapter", "is", "small", "and", "weight", "large", "<eos>"]
STEPS = 3


def llama() -> Any:
    """In float64: three steps of a whole model make anything of two roundings in fp32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes)
    return transformers.LlamaForCausalLM(config).double()


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the")
    tokens = tokenizers.Tokenizer(model)
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<eos>")


def quiet(folder: Path, **others: Any) -> dict[str, Any]:
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4}
    silent = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0}
    return {"output_dir": str(folder), **settings, **silent, **others}


def by_trainer(folder: Path, callbacks: list[Any]) -> Any:
    """transformers' own, as LLaMA-Factory and ms-swift derive theirs from it."""
    rows = [{"input_ids": (row := (torch.arange(6) + start) % 8), "labels": row} for start in range(32)]
    arguments = transformers.TrainingArguments(**quiet(folder))
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), lora())
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


def of_trl(name: str) -> Any:
    pytest.importorskip("datasets", reason="TRL needs datasets")
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    return getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")


def common(callbacks: list[Any], columns: dict[str, list[str]]) -> dict[str, Any]:
    torch.manual_seed(1)
    data = importlib.import_module("datasets").Dataset.from_dict(columns)
    given = {"model": llama(), "train_dataset": data, "processing_class": tokenizer(), "callbacks": callbacks}
    return {**given, "peft_config": lora()}


def by_sft(folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    config, trainer = of_trl("SFT")
    text = {"text": ["the adapter is small and the weight is large", "the weight is large"] * 16}
    return trainer(args=config(**quiet(folder, bf16=False, **settings)), **common(callbacks, text))


def by_dpo(folder: Path, callbacks: list[Any]) -> Any:
    config, trainer = of_trl("DPO")
    pairs = {"prompt": ["the adapter is", "the weight is"] * 16}
    pairs |= {"chosen": [" small", " large"] * 16, "rejected": [" large", " small and large"] * 16}
    return trainer(args=config(**quiet(folder, bf16=False)), **common(callbacks, pairs))


def reward(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def by_grpo(folder: Path, callbacks: list[Any]) -> Any:
    config, trainer = of_trl("GRPO")
    prompts = {"prompt": ["the adapter is", "the weight is"] * 16}
    settings = {"num_generations": 4, "max_completion_length": 6, "beta": 0.04, "bf16": False}
    return trainer(reward_funcs=reward, args=config(**quiet(folder, **settings)), **common(callbacks, prompts))


TRAINERS = {"Trainer": by_trainer, "SFT": by_sft, "DPO": by_dpo, "GRPO": by_grpo}


def logged(trainer: Any) -> list[dict[str, float]]:
    """What each step logs, without the clock."""
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in step.items() if "time" not in key} for step in steps]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_losses_are_those_of_pefts_own_layers(name: str, tmp_path: Path) -> None:
    callback = FusePeftCallback()
    stock, fused = TRAINERS[name](tmp_path, []), TRAINERS[name](tmp_path, [callback])
    theirs, ours = logged(stock), logged(fused)
    assert len(ours) == STEPS
    assert [step["loss"] for step in ours] == [step["loss"] for step in theirs]  # logged as fp32 numbers
    assert len({step["loss"] for step in ours}) == STEPS
    assert callback.report is not None
    counted = lora_kernels.peft.calls(fused.model)
    assert counted.share == 1.0
    assert counted.fused >= 14 * STEPS
    assert (counted.base > 0) == (name in ("DPO", "GRPO"))  # the reference pass is the base alone


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each tensor that TRL's own hooks move, with the CPU in the place of the accelerator."""
    trl_sft = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed")
    of_trl, moved = trl_sft.get_act_offloading_ctx_manager, []

    def made(**given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda *arguments, **named: torch.device("cpu"))
            context = of_trl(use_pin_memory=False, use_streams=False, **given)
        context.device_module = types.SimpleNamespace(**vars(torch.cpu), empty_cache=lambda: None)
        pack = context.pack_hook

        def noted(tensor: torch.Tensor) -> Any:
            number = pack(tensor)
            if context.tracker[number][1]:
                moved.append(tensor.nbytes)
            return number

        context.pack_hook = noted
        return context

    monkeypatch.setattr(trl_sft, "get_act_offloading_ctx_manager", made)
    return moved


def test_trl_offloads_what_fused_layers_keep(offloaded: list[int], tmp_path: Path) -> None:
    """SFTConfig(activation_offloading=True): the losses of PEFT's own layers, and less to move."""
    stock = logged(by_sft(tmp_path, [], activation_offloading=True, gradient_checkpointing=False))
    theirs = sum(offloaded)
    offloaded.clear()
    fused = by_sft(tmp_path, [FusePeftCallback()], activation_offloading=True, gradient_checkpointing=False)
    ours = logged(fused)
    assert lora_kernels.peft.calls(fused.model).share == 1.0
    assert [step["loss"] for step in ours] == [step["loss"] for step in stock]
    assert 0 < sum(offloaded) < theirs


def test_a_callback_that_is_added_later_fuses_when_training_begins(tmp_path: Path) -> None:
    trainer = by_trainer(tmp_path, [])
    trainer.add_callback(FusePeftCallback)
    logged(trainer)
    assert lora_kernels.peft.calls(trainer.model).fused == 14 * STEPS


def test_without_an_adapter_it_says_so(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(**quiet(tmp_path))
    with pytest.raises(InvalidArgumentError, match="holds no LoRA layer"):
        transformers.Trainer(llama(), arguments, callbacks=[FusePeftCallback()])


# LLaMA-Factory and ms-swift: the files that the page has a reader write, with stand-ins of what they import


def files() -> list[str]:
    return bodies((ROOT / "docs" / "trainers.md").read_text(encoding="utf-8"), "python file")


def stand_in(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of that name, and the packages that it is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(contents)


def test_llama_factorys_function_takes_the_callback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        made.append(by_trainer(tmp_path, callbacks or []))

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    exec(files()[0], {})
    logged(made[0])
    assert lora_kernels.peft.calls(made[0].model).fused == 14 * STEPS


def test_ms_swifts_table_takes_the_callback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table: dict[str, Any] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=table)
    exec(files()[1], {})
    trainer = by_trainer(tmp_path, [])
    trainer.add_callback(table["lora_kernels"](trainer.args, trainer))  # as swift.trainers.mixin makes it
    logged(trainer)
    assert lora_kernels.peft.calls(trainer.model).fused == 14 * STEPS


# Axolotl


class Base:
    """The methods of Axolotl's ``BasePlugin`` that come before and after ours."""

    def register(self, cfg: Any) -> None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...

    def get_input_args(self) -> None: ...


def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in as Axolotl's own function loads it, or as a stand-in of it does."""
    monkeypatch.delitem(sys.modules, "lora_kernels.axolotl", raising=False)
    if importlib.util.find_spec("axolotl") is not None:
        return importlib.import_module("axolotl.integrations.base").load_plugin("lora_kernels.axolotl.FusePlugin")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=Base)
    return importlib.import_module("lora_kernels.axolotl").FusePlugin()


def test_axolotls_plugin_fuses_and_keeps_axolotls_own_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin(monkeypatch)
    assert made.get_input_args() is None  # of the base
    cfg: dict[str, Any] = {"adapter": "lora", "lora_mlp_kernel": None}
    made.register(cfg)
    kernels = ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"]
    assert [cfg[name] for name in kernels] == [False] * 4
    model = peft.get_peft_model(llama(), lora())
    made.post_model_load(cfg, model)
    model(input_ids=torch.arange(8)[None])
    assert lora_kernels.peft.calls(model).fused == 14
    made.post_model_load({"adapter": None}, llama())  # a run without LoRA


def test_axolotls_own_kernels_beside_ours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="lora_qkv_kernel: true beside"):
        plugin(monkeypatch).register({"lora_qkv_kernel": True})
