"""An ordinary PEFT training script, run as it is and with one line added: ``fuse_peft(model)``.

Needs no download and takes seconds on a CPU; random weights, fixed seeds.

    python examples/peft_one_line.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lora_kernels import fuse_peft
from lora_kernels.peft import calls

VOCABULARY = 64


def batches(steps: int) -> torch.Tensor:
    """Token ids, (steps, 8, 32): each row counts upwards from a random token."""
    start = torch.randint(VOCABULARY, (steps, 8, 1), generator=torch.Generator().manual_seed(1))
    return (start + torch.arange(32)) % VOCABULARY


def train(steps: int, fuse: bool) -> list[float]:
    """Trains adapters on a small random Llama, and returns the losses."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    if fuse:
        fuse_peft(model)  # the one line
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for tokens in batches(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if fuse:
        counted = calls(model)
        print(counted)
        assert counted.share == 1.0, "some calls went by PEFT's own forward"
    return losses


def main() -> None:
    """Train twice from the same seed, and compare the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    steps = parser.parse_args().steps
    stock, fused = train(steps, fuse=False), train(steps, fuse=True)
    for step in sorted({0, steps // 2, steps - 1}):
        print(f"step {step:3d}  loss {stock[step]:.6f} by PEFT  {fused[step]:.6f} fused")
    apart = max(abs(a - b) / a for a, b in zip(stock, fused, strict=True))
    print(f"losses differ by at most {apart:.1e} of the loss")
    assert fused[-1] < fused[0], "nothing was learnt"
    assert apart < 1e-4, "more than the rounding of fp32 products in another order, carried through the training"


if __name__ == "__main__":
    main()
