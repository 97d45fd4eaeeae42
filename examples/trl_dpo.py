"""TRL's ``DPOTrainer`` three times: as it is, with fused layers, and with replaced layers and no PEFT; losses agree.

The reference is the model without its adapters. In a PEFT model TRL switches them off itself. For replaced layers a
second module with the same Parameters runs within ``lora_kernels.adapters_disabled``, so there is no second copy.

Needs TRL (``pip install trl``) and no download: a small Llama with random weights, a tokenizer of eight words.

    python examples/trl_dpo.py --steps 10
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

import lora_kernels

WORDS = ["the", "adapter", "is", "small", "and", "weight", "large", "<eos>"]
PAIRS = {
    "prompt": ["the adapter is", "the weight is", "the adapter and the weight is"] * 16,
    "chosen": [" small", " large", " large and small"] * 16,
    "rejected": [" large", " small", " the the"] * 16,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<eos>")


def small_llama() -> LlamaForCausalLM:
    """Two layers; random weights, the same at each call."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.08, **sizes))


def make_trainer(folder: Path, steps: int, model: Any, **others: Any) -> DPOTrainer:
    """A trainer that logs each step's loss and writes nothing."""
    quiet = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = DPOConfig(str(folder), max_steps=steps, learning_rate=1e-2, bf16=False, seed=0, **quiet)
    dataset = Dataset.from_dict(PAIRS)
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer(), **others)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: DPOTrainer) -> list[float]:
    """Train; the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_peft(folder: Path, steps: int, fuse: bool) -> list[float]:
    """The adapter is PEFT's; ``fuse`` is the one line. The adapter is saved as it starts."""
    trainer = make_trainer(folder, steps, small_llama(), peft_config=LoraConfig(r=8, target_modules="all-linear"))
    trainer.model.save_pretrained(folder / "start")
    if fuse:
        lora_kernels.fuse_peft(trainer.model)
    found = losses(trainer)
    if fuse:
        print(lora_kernels.peft.calls(trainer.model))
    return found


def with_replaced_layers(folder: Path, steps: int) -> list[float]:
    """No PEFT in training: the layers are replaced, and start as PEFT's did."""
    model = small_llama()
    print(lora_kernels.load_adapter(model, folder / "start"))
    lora_kernels.mark_only_lora_as_trainable(model)
    trainer = make_trainer(folder, steps, model, ref_model=copy.copy(model))  # the same Parameters
    reference = trainer.ref_model
    forward = reference.forward

    def without_adapters(*arguments: Any, **keywords: Any) -> Any:
        with lora_kernels.adapters_disabled(model):
            return forward(*arguments, **keywords)

    reference.forward = without_adapters
    return losses(trainer)


def main() -> None:
    """Train in three ways, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "by PEFT": with_peft(folder, steps, False),
            "fused": with_peft(folder, steps, True),
            "replaced": with_replaced_layers(folder, steps),
        }
    for way, values in found.items():
        print(f"{way:8}", " ".join(f"{loss:.4f}" for loss in values))
    for way in ("fused", "replaced"):
        largest = max(abs(a - b) / b for a, b in zip(found[way], found["by PEFT"], strict=True))
        print(f"{way}: largest relative difference {largest:.1e}")


if __name__ == "__main__":
    main()
