"""A LoRA layer in place of an ``nn.Linear``: train it, merge it, and see which backend ran."""

import torch

import lora_kernels
from lora_kernels import FusedLoRALinear

torch.manual_seed(0)
linear = torch.nn.Linear(256, 128)
layer = FusedLoRALinear.from_linear(linear, r=8, lora_alpha=16)  # keeps linear's weight, frozen
print(lora_kernels.explain(layer))

x, target = torch.randn(512, 256), torch.randn(512, 128)
optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
for step in range(101):
    loss = torch.nn.functional.mse_loss(layer(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")

y = layer(x)
layer.merge()  # one product from here on
print(f"merged: outputs differ by at most {(layer(x) - y).abs().max().item():.1e}")
