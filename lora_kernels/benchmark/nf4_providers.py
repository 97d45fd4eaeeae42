"""Who is measured over a weight in NF4: bitsandbytes' frozen layer, PEFT around it, and this package's layer."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..nn import FusedLoRALinear
from ..weights import known, samples
from .model_providers import why_not_peft
from .setups import Layer, Provider, Setup
from .workloads import NF4

__all__ = ["NF4_PROVIDERS"]


def _why_not(setup: Any) -> str | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'lora-kernels[quant]'."
    return None


def _quantised(setup: Setup) -> Any:
    """The setup's layer in NF4: of the very same values, see ``setups.nf4_values``."""
    layer = samples.quantised(NF4, setup.linear.weight, setup.linear.bias)
    layer.compute_dtype = layer.weight.quant_state.dtype = setup.dtype
    return layer.train()


def _frozen(setup: Setup) -> Layer:
    module = _quantised(setup)
    return Layer(module, module=module, owned=_parts(module))


def _peft(setup: Setup) -> Layer:
    from peft import LoraConfig, get_peft_model

    w = setup.workload
    config = LoraConfig(r=w.r, lora_alpha=int(setup.scaling * w.r), lora_dropout=w.p, target_modules=["0"])
    model: Any = get_peft_model(torch.nn.Sequential(_quantised(setup)), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    a, b = (held["default"].to(setup.adapter_dtype).weight for held in (layer.lora_A, layer.lora_B))
    return _loaded(layer, a, b, setup)


def _ours(setup: Setup) -> Layer:
    w = setup.workload
    layer = FusedLoRALinear.from_linear(
        _quantised(setup), w.r, setup.scaling * w.r, w.p, adapter_dtype=setup.adapter_dtype
    )
    return _loaded(layer, layer.lora_A, layer.lora_B, setup)


@torch.no_grad()
def _loaded(layer: Any, lora_a: Any, lora_b: Any, setup: Setup) -> Layer:
    lora_a.copy_(setup.lora_a)
    lora_b.copy_(setup.lora_b)
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    return Layer(layer, (lora_a, lora_b), layer.train(), owned=_parts(base))


def _parts(module: Any) -> tuple[torch.Tensor, ...]:
    return known.read(module, module.weight).parts


NF4_PROVIDERS = (
    Provider("nf4", "NF4 frozen", _frozen, _why_not, of_nf4=True, frozen=True),
    Provider("peft-nf4", "PEFT, NF4", _peft, lambda setup: _why_not(setup) or why_not_peft(setup), of_nf4=True),
    Provider("ours-nf4", "lora_kernels, NF4", _ours, _why_not, ours=True, of_nf4=True),
)
