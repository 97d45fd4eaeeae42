"""``SaveAdapterCallback`` with transformers' real ``Trainer``: what a checkpoint holds, and resuming from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels import LoRAConfig, load_adapter, replace_linear
from lora_kernels.errors import LoRAKernelsWarning
from lora_kernels.models.model import lora_layers
from numerics import same_bits

transformers = pytest.importorskip("transformers", reason="the callback is for transformers' Trainer")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
safetensors = pytest.importorskip("safetensors.torch")

from architectures import made  # noqa: E402
from lora_kernels.trainer import SaveAdapterCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:save_pretrained writes the base weights"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DATA = [{"input_ids": (row := (torch.arange(8) + start) % 16), "labels": row} for start in range(32)]
WHOLE = {"model.safetensors", "config.json", "generation_config.json"}


def model_of(**options: Any) -> Any:
    torch.manual_seed(0)
    model = made("llama")
    config = {"r": 2, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], **options}
    replace_linear(model, LoRAConfig(**config))
    lora_kernels.mark_only_lora_as_trainable(model)
    return model


def trainer_of(model: Any, folder: Path, callback: bool = True, **options: Any) -> Any:
    given = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **options}
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, seed=0, **given, **quiet)
    callbacks = [SaveAdapterCallback()] if callback else []
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=callbacks
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa_niter_2"}])
def test_a_run_is_resumed_from_a_checkpoint_without_the_base(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**options)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trainer_of(model, tmp_path).train()
    expected = trained(model)
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert not {"config.json", "generation_config.json"} & {path.name for path in folder.iterdir()}
        held = set(safetensors.load_file(folder / "model.safetensors"))
        residual = {f"{n}.weight" for n, layer in lora_layers(model) if "pissa" in str(layer.init_lora_weights)}
        assert held & frozen == residual
        assert held >= {name for name in expected if name not in frozen}
        fields = json.loads((folder / "adapter_config.json").read_text())
        assert fields["r"] == (4 if residual else 2)
    other = model_of(**options)
    trainer_of(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(same_bits(value, expected[name]) for name, value in trained(other).items())


def test_the_adapter_of_a_checkpoint_loads_onto_the_plain_model(tmp_path: Path) -> None:
    model = model_of()
    trainer_of(model, tmp_path).train()
    plain = made("llama")
    load_adapter(plain, tmp_path / "checkpoint-4")
    values = trained(plain)
    adapters = {name: value for name, value in trained(model).items() if "lora_" in name or "lm_head" in name}
    assert adapters
    assert all(same_bits(values[name], value) for name, value in adapters.items())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = model_of()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 10.0}
    trainer = trainer_of(model, tmp_path, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    held = safetensors.load_file(best / "model.safetensors")
    values = dict(model.named_parameters())
    assert all(same_bits(values[name].detach(), held[name]) for name in held if "lora_" in name)


def test_what_it_cannot_help_with_stays_and_is_told(tmp_path: Path) -> None:
    model = made("llama")
    with pytest.warns(LoRAKernelsWarning, match="holds no FusedLoRALinear"):
        trainer_of(model, tmp_path, max_steps=1, save_steps=1).train()
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} >= WHOLE


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_under_zero_3_it_gathers_what_the_adapter_needs(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero3 = pytest.importorskip("zero3")  # a stand-in for DeepSpeed
    zero = SimpleNamespace(GatheredParameters=zero3.GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    plain, model = model_of(**kind), zero3.partition(model_of(**kind))
    lora_kernels.save_adapter(plain, tmp_path / "plain")
    arguments = SimpleNamespace(output_dir=str(tmp_path), should_save=True, fsdp=None, deepspeed="config.json")
    SaveAdapterCallback().on_save(arguments, SimpleNamespace(global_step=1), None, model=model)
    found = [
        safetensors.load_file(tmp_path / place / "adapter_model.safetensors") for place in ("plain", "checkpoint-1")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(same_bits(value, found[1][name]) for name, value in found[0].items())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    SaveAdapterCallback().on_save(arguments, SimpleNamespace(global_step=2), None, model=model)
    assert not (tmp_path / "checkpoint-2").exists()


def test_the_checkpoint_of_a_peft_model_stays(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    model = peft.get_peft_model(model_of(modules_to_save=None), peft.PromptTuningConfig(**options))
    with pytest.warns(LoRAKernelsWarning, match="PeftModelForCausalLM to files of the same names"):
        trainer_of(model, tmp_path, max_steps=1, save_steps=1).train()
    fields = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "PROMPT_TUNING"
