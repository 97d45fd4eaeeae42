"""TRL's ``SFTTrainer`` as it is and with one line added: ``fuse_peft(trainer.model)``; the losses agree.

Needs TRL (``pip install trl``) and no download: a small Llama with random weights, a tokenizer of eight words.

    python examples/trl_sft.py --steps 10
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

import lora_kernels

WORDS = ["the", "adapter", "is", "small", "and", "weight", "large", "<eos>"]
SENTENCES = ["the adapter is small and the weight is large", "the weight is large and the adapter is small"] * 32


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


def train(steps: int, fuse: bool) -> list[float]:
    """The losses of a run; ``fuse`` is the one line."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=small_llama(),
            args=SFTConfig(
                folder,
                max_steps=steps,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                seed=0,
            ),
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
        )
        if fuse:
            print(lora_kernels.fuse_peft(trainer.model))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if fuse:
            print(lora_kernels.peft.calls(trainer.model))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train both ways, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    steps = parser.parse_args().steps
    theirs, ours = train(steps, False), train(steps, True)
    print("by PEFT  ", " ".join(f"{loss:.4f}" for loss in theirs))
    print("fused    ", " ".join(f"{loss:.4f}" for loss in ours))
    largest = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative difference: {largest:.1e}")


if __name__ == "__main__":
    main()
