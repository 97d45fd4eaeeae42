"""The worked example's data, model, LoRA phase and training loop.

The published text leaves open what is decided here: a label is the sign of the mean of the coordinates, for both kinds
of data; each phase draws 2000 training samples once; accuracies are those on 10000 fresh samples.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..config import LoRAConfig
from ..models.model import mark_only_lora_as_trainable, replace_linear
from ..nn import FusedLoRALinear

__all__ = [
    "LORA",
    "LORA_LR",
    "PRETRAIN_LR",
    "ReferenceLoRALinear",
    "accuracy",
    "gaussian",
    "model",
    "sphere",
    "train",
    "with_lora",
    "with_reference_lora",
]

DIMENSION, HIDDEN = 16, 32
TRAIN_SAMPLES, TEST_SAMPLES, BATCH = 2000, 10000, 256
PRETRAIN_LR, LORA_LR = 1e-4, 1e-3
LORA = LoRAConfig(r=2, lora_alpha=1, target_modules=["hidden_2"], bias="lora_only")


def sphere(count: int, generator: torch.Generator) -> Tensor:
    """(count, 16) points, uniform on the sphere of radius √16."""
    drawn = torch.randn(count, DIMENSION, generator=generator)
    norms: Tensor = torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    return drawn / norms * math.sqrt(DIMENSION)


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    """(count, 16) points, each coordinate normal with mean 0 and standard deviation 1/16."""
    return torch.randn(count, DIMENSION, generator=generator) / DIMENSION


def labels(x: Tensor) -> Tensor:
    """(count,): 1 where the mean of a point's coordinates is positive, else 0."""
    return (x.mean(1) > 0).to(x.dtype)


def model() -> nn.Sequential:
    """The 16 → 32 → 32 → 1 ReLU network, on the CPU, from torch's random state."""
    return nn.Sequential(
        OrderedDict(
            hidden_1=nn.Linear(DIMENSION, HIDDEN),
            relu_1=nn.ReLU(),
            hidden_2=nn.Linear(HIDDEN, HIDDEN),
            relu_2=nn.ReLU(),
            out=nn.Linear(HIDDEN, 1),
        )
    )


def with_lora(pretrained: nn.Module, activation: str = "identity") -> nn.Module:
    """A copy whose second layer is a ``FusedLoRALinear`` of rank 2; its adapter and bias alone train."""
    adapted = copy.deepcopy(pretrained)
    replace_linear(adapted, replace(LORA, activation=activation))
    mark_only_lora_as_trainable(adapted, bias="lora_only")
    return adapted


class ReferenceLoRALinear(nn.Module):
    """The same layer in plain PyTorch: ``lora_kernels.reference.forward`` under ordinary autograd."""

    def __init__(self, layer: FusedLoRALinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        """y (M, N) for x (M, K)."""
        return reference.forward(x, self.weight, self.lora_A, self.lora_B, self.bias, self.scaling)[0]


def with_reference_lora(adapted: nn.Module) -> nn.Module:
    """A copy of ``with_lora``'s model, in the same state, its second layer a ``ReferenceLoRALinear``."""
    plain = copy.deepcopy(adapted)
    layer = plain.get_submodule("hidden_2")
    assert isinstance(layer, FusedLoRALinear)
    plain.set_submodule("hidden_2", ReferenceLoRALinear(layer))
    return plain


def train(network: nn.Module, x: Tensor, lr: float, epochs: int, seed: int) -> Tensor:
    """Adam on the logistic loss, what requires a gradient in ``network`` alone; (epochs,) mean losses, float64.

    Batches of 256 in a new order each epoch, drawn from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    target = labels(x)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr, fused=True)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        batches = zip(torch.split(x[order], BATCH), torch.split(target[order], BATCH), strict=True)
        losses += [step(network, optimizer, batch_x, batch_target) for batch_x, batch_target in batches]
    return torch.stack(losses).double().cpu().reshape(epochs, -1).mean(1)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    """One training step; the loss before it, as a tensor, so that nothing waits for the device."""
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(network(x).squeeze(1), target)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor) -> float:
    """The share of x that ``network`` labels rightly, in percent."""
    predicted = (network(x).squeeze(1) > 0).to(x.dtype)
    return float((predicted == labels(x)).double().mean()) * 100.0
