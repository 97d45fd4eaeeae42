"""QLoRA: a small Llama in bitsandbytes' NF4, fine-tuned by transformers' ``Trainer``, by PEFT's layers and fused.

No download, about a minute on a CPU. It prints the losses of both ways and the most memory that a step of each takes.
The model has random weights and learns characters of a text that ships with Python (its licence).

    python examples/qlora_llama.py --steps 30

``--json FILE`` writes what it found, all losses too.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import lora_kernels
from lora_kernels.benchmark.memory import peak_of, storages_kept
from lora_kernels.benchmark.results import environment

BLOCK = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FALLBACK = "The adapter is small, the weight is large; the weight is frozen, the adapter learns.\n" * 200


def training_text() -> str:
    """The licence that ships with Python, or a sentence repeated where it does not."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else FALLBACK


class Characters(Dataset[dict[str, Tensor]]):
    """Blocks of ``BLOCK`` characters as token ids; the labels are the same ids (the model shifts them)."""

    def __init__(self, text: str) -> None:
        vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
        ids = torch.tensor([vocabulary[character] for character in text])
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def save_base(folder: str, vocabulary_size: int) -> None:
    """A Llama of two layers with random weights, as a model on the hub would lie in the cache."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BLOCK,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def quantised_model(folder: str) -> Any:
    """The base in NF4 with nested statistics, and PEFT's adapters on its projections."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # bf16 where the machine multiplies it fast
    )
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    set_seed(1)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))


def train(model: Any, data: Characters, steps: int, scratch: str) -> list[float]:
    """The loss of each step."""
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tensors_of(model: Any) -> Iterator[Tensor]:
    """The Parameters, and the statistics of those in NF4."""
    for parameter in model.parameters():
        yield parameter
        if (state := getattr(parameter, "quant_state", None)) is not None:
            yield from (state.absmax, state.offset, state.state2.absmax, state.state2.code)


def memory_of_step(model: Any, data: Characters) -> tuple[float, float]:
    """MiB beyond the model: what forward keeps for backward, and the most that the step holds."""
    batch = torch.stack([data[i]["input_ids"] for i in range(16)])

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()

    step()  # the gradients are there from here on
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(model)}
    kept = storages_kept(lambda: model(input_ids=batch, labels=batch))
    more = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in held)
    return more / 2**20, peak_of(step, "cpu") / 2**20


def main() -> None:
    """Train both ways from the same adapters on the same batches, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    parser.add_argument("--json", type=Path, help="where to write losses and memory")
    args = parser.parse_args()
    text = training_text()
    data = Characters(text)
    losses: dict[str, list[float]] = {}
    memory: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(0)
        save_base(scratch, len(set(text)))
        for way in ("PEFT", "fused"):
            model = quantised_model(scratch)
            if way == "fused":
                print(lora_kernels.fuse_peft(model))
            losses[way] = train(model, data, args.steps, scratch)
            kept, peak = memory_of_step(model, data)
            memory[way] = {"kept": kept, "peak": peak}
            print(f"{way}: {kept:.1f} MiB kept for backward, a step holds at most {peak:.1f} MiB beyond the model")
            if way == "fused":
                print(f"calls: {lora_kernels.peft.calls(model)}")
    for step in sorted({0, args.steps // 2, args.steps - 1}):
        print(f"step {step + 1}: loss {losses['PEFT'][step]:.4f} by PEFT's layers, {losses['fused'][step]:.4f} fused")
    apart = max(abs(one - other) for one, other in zip(losses["PEFT"], losses["fused"], strict=True))
    print(f"the losses differ by at most {apart:.1e}")
    if args.json is not None:
        args.json.write_text(json.dumps({"losses": losses, "memory": memory, "environment": environment("cpu")}))
    assert losses["fused"][-1] < losses["fused"][0], "the adapters have learnt nothing"


if __name__ == "__main__":
    main()
