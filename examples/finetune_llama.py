"""Fine-tunes a small transformers Llama by LoRA with the real ``Trainer``: no download, under a minute on a CPU.

The model has random weights and learns characters of a text that ships with Python (its licence); swap in a model and a
dataset of your own and the lines with ``lora_kernels`` stay the same.

    python examples/finetune_llama.py --steps 100 --out finetuned
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import lora_kernels
from lora_kernels import LoRAConfig

BLOCK = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FALLBACK = "The adapter is small, the weight is large; the weight is frozen, the adapter learns.\n" * 200


def training_text() -> str:
    """The licence that ships with Python, or a sentence repeated where it does not."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else FALLBACK


class Characters(Dataset[dict[str, Tensor]]):
    """Blocks of ``BLOCK`` characters as token ids; the labels are the same ids (the model shifts them)."""

    def __init__(self, text: str, vocabulary: dict[str, int]) -> None:
        ids = torch.tensor([vocabulary[character] for character in text])
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def small_llama(vocabulary_size: int) -> LlamaForCausalLM:
    """Two layers with grouped-query attention, as the large ones have; random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BLOCK,
        initializer_range=0.08,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train, measure, merge, save, load onto a plain copy of the base, and check that it computes the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument(
        "--out", type=Path, help="folder for the adapter (default: a new temporary folder, which is printed)"
    )
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="lora_kernels-finetuned-"))

    set_seed(0)
    text = training_text()
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    split = int(0.9 * len(text))
    model = small_llama(len(vocabulary))
    plain = copy.deepcopy(model)  # the base as it would be downloaded again, to load the adapter onto

    report = lora_kernels.replace_linear(model, LoRAConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    lora_kernels.mark_only_lora_as_trainable(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{report}\nafter mark_only_lora_as_trainable: {trainable:,} trainable parameters")
    print(lora_kernels.explain(model.model.layers[0].self_attn.q_proj))

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=5e-3,
            logging_steps=max(1, args.steps // 5),
            eval_on_start=True,  # within train(): under FSDP2 nothing can be evaluated before it
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Characters(text[:split], vocabulary),
            eval_dataset=Characters(text[split:], vocabulary),
        )
        trainer.train()
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        after = trainer.evaluate()["eval_loss"]
        lora_kernels.merge_lora(model)  # plain products from here on
        merged = trainer.evaluate()["eval_loss"]
    print(f"evaluation loss: {before:.4f} before, {after:.4f} after, {merged:.4f} merged for inference")

    assert after < before, "the adapter has learnt nothing"
    lora_kernels.unmerge_lora(model)  # the exact weights again

    lora_kernels.save_adapter(model, out)  # PEFT's two files: PeftModel.from_pretrained reads them too
    loaded = lora_kernels.load_adapter(plain, out)  # replaces the layers that the files name
    tokens = Characters(text[split:], vocabulary)[0]["input_ids"].unsqueeze(0).to(model.device)
    with torch.no_grad():
        same = torch.equal(plain.to(model.device).eval()(tokens).logits, model.eval()(tokens).logits)
    assert same, "the loaded adapter computes something else"
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"saved {out} ({size:,} bytes), loaded {len(loaded)} layers onto the plain model: the same logits")


if __name__ == "__main__":
    main()
