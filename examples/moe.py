"""Fine-tunes the experts of a small random Qwen3-MoE with transformers' Trainer, by PEFT and by ``replace_linear``.

Needs no download and takes seconds on a CPU; random weights, fixed seeds.

    python examples/moe.py --steps 20
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

from lora_kernels import LoRAConfig, load_adapter, mark_only_lora_as_trainable, replace_linear, save_adapter

VOCABULARY = 64
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # Parameters, (experts, rows, columns) each


def model_of_experts() -> Any:
    """Two blocks of eight experts, two of them for each token."""
    set_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=48, head_dim=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
        )
    )  # fmt: skip


def samples(steps: int) -> list[dict[str, torch.Tensor]]:
    """Eight samples for each step: each counts upwards from a random token."""
    start = torch.randint(VOCABULARY, (steps * 8, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in (start + torch.arange(32)) % VOCABULARY]


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """The losses of each step."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=samples(steps))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def start_alike(ours: torch.nn.Module, theirs: Any) -> None:
    """Has ``ours`` begin with PEFT's random A, by PEFT's own files."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        load_adapter(ours, folder)


def main() -> None:
    """Train twice from the same start, compare the losses, and load the adapter onto the plain model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", module="peft")
    stock = get_peft_model(
        model_of_experts(), LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=EXPERTS)
    )
    model: Any = model_of_experts()
    print(replace_linear(model, LoRAConfig(r=8, lora_alpha=16, target_parameters=EXPERTS)))
    mark_only_lora_as_trainable(model)
    start_alike(model, stock)
    theirs, ours = train(stock, steps), train(model, steps)
    print("by PEFT", *(f"{loss:.4f}" for loss in theirs))
    print("by ours", *(f"{loss:.4f}" for loss in ours))
    apart = max(abs(a - b) / a for a, b in zip(theirs, ours, strict=True))
    print(f"losses differ by at most {apart:.1e} of the loss")
    assert ours[-1] < ours[0], "nothing was learnt"
    assert apart < 1e-4, "more than the rounding of fp32 products in another order, carried through the training"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_adapter(model, folder)
        again = model_of_experts()
        load_adapter(again, folder)
        tokens = samples(1)[0]["input_ids"].unsqueeze(0)
        assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
    print("saved, and loaded onto the plain model: the same logits")


if __name__ == "__main__":
    main()
