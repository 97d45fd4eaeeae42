"""Who is measured on ``models``: PEFT, PEFT after ``fuse_peft``, ``replace_linear``, and a group of layers of one x.

Each with LoRA and, where there is one adapter, with DoRA, in the same cell: what DoRA costs is their quotient.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..branches import Branch
from ..config import LoRAConfig
from ..gate import run_branches
from ..models.model import replace_linear
from .models import ModelSetup, shared
from .setups import Layer, Provider

__all__ = ["MODEL_PROVIDERS", "why_not_peft"]


def why_not_peft(setup: Any) -> str | None:
    """Why PEFT cannot run here."""
    if importlib.util.find_spec("peft") is None:
        return "PEFT is not installed: pip install 'lora-kernels[bench]'."
    return None


def _one_adapter(setup: ModelSetup) -> bool:
    return all(len(site.adapters) == 1 for site in setup.sites.values())


def _why_not_peft(dora: bool) -> Callable[[Any], str | None]:
    def why_not(setup: ModelSetup) -> str | None:
        if dora and not _one_adapter(setup):
            return "DoRA is measured with one adapter alone."
        return why_not_peft(setup)

    return why_not


def _build_peft(dora: bool, fused: bool) -> Callable[[Any], Layer]:
    def build(setup: ModelSetup) -> Layer:
        import peft

        module, w = shared(setup.base), setup.workload
        count = len(next(iter(setup.sites.values())).adapters)
        adapters = [f"a{i}" for i in range(count)]
        for adapter in adapters:
            config = peft.LoraConfig(
                r=w.r,
                lora_alpha=int(setup.scaling * w.r),
                lora_dropout=w.p,
                use_dora=dora,
                target_modules=[*setup.sites],
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the first adapter
                peft.inject_adapter_in_model(config, module, adapter_name=adapter)
        trainable: list[Tensor] = []
        for name, site in setup.sites.items():
            layer: Any = module.get_submodule(name)
            layer.set_adapter(adapters)
            for adapter, values in zip(adapters, site.adapters, strict=True):
                parts = [layer.lora_A[adapter], layer.lora_B[adapter]]
                parts += [layer.lora_magnitude_vector[adapter]] if dora else []
                for part, value in zip(parts, (*values, site.magnitude), strict=False):
                    trainable.append(_load(part.to(setup.adapter_dtype).weight, value))
        if fused:
            from ..peft import fuse_peft

            fuse_peft(module)
        return Layer(_call(setup, module), tuple(trainable), module.train(), dora=dora)

    return build


def _call(setup: ModelSetup, module: nn.Module) -> Callable[[Tensor], Any]:
    if setup.rows is None:
        return lambda x: setup.run(module, x)
    layer, rows = module.get_submodule(next(iter(setup.sites))), list(setup.rows)
    return lambda x: layer(x, adapter_names=rows)


def _why_not_replace(setup: ModelSetup) -> str | None:
    return (
        None if _one_adapter(setup) else "A layer of ours holds one adapter: several are PEFT's, which fuse_peft runs."
    )


def _build_replace(dora: bool) -> Callable[[Any], Layer]:
    def build(setup: ModelSetup) -> Layer:
        module, trainable = _replaced(setup, dora)
        return Layer(lambda x: setup.run(module, x), trainable, module, dora=dora)

    return build


def _replaced(setup: ModelSetup, dora: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module, w = shared(setup.base), setup.workload
    config = LoRAConfig(
        r=w.r,
        lora_alpha=setup.scaling * w.r,
        lora_dropout=w.p,
        use_dora=dora,
        target_modules=[*setup.sites],
        adapter_dtype=setup.adapter_dtype,
    )
    replace_linear(module, config)
    trainable: list[Tensor] = []
    for name, site in setup.sites.items():
        own = module.get_submodule(name).adapter.values()  # type: ignore[union-attr, operator]
        trainable += [_load(part, value) for part, value in zip(own, (*site.adapters[0], site.magnitude), strict=False)]
    return module.train(), tuple(trainable)


def _why_not_group(setup: ModelSetup) -> str | None:
    return None if setup.workload.subject == "three-layers" else "It is a group of layers that read one x."


def _build_group(setup: ModelSetup) -> Layer:
    module, trainable = _replaced(setup, dora=False)
    layers = [module.get_submodule(name) for name in setup.sites]
    return Layer(_group(layers), trainable, module)


def _group(layers: list[Any]) -> Callable[[Tensor], Any]:
    """The three LoRA layers as one call. This is where a public class for groups is plugged in."""

    def call(x: Tensor) -> tuple[Tensor, ...]:
        p = layers[0].lora_dropout if layers[0].training else 0.0
        branches = [Branch(one.weight, one.lora_A, one.lora_B, one.bias, one.scaling) for one in layers]
        return tuple(run_branches(x, branches, p))

    return call


@torch.no_grad()
def _load(parameter: Tensor, value: Tensor) -> Tensor:
    return parameter.copy_(value)


def _pair(name: str, title: str, build: Any, why_not: Any, ours: bool) -> list[Provider]:
    """A provider with LoRA and the same with DoRA."""
    return [
        Provider(f"{name}-{kind.lower()}", f"{title} {kind}", build(dora), why_not(dora), ours, of_models=True)
        for kind, dora in (("LoRA", False), ("DoRA", True))
    ]


MODEL_PROVIDERS = (
    *_pair("peft", "PEFT", lambda dora: _build_peft(dora, fused=False), _why_not_peft, ours=False),
    *_pair("fused", "fuse_peft", lambda dora: _build_peft(dora, fused=True), _why_not_peft, ours=True),
    *_pair("ours", "replace_linear", _build_replace, lambda dora: _why_not_replace, ours=True),
    Provider("group", "group LoRA", _build_group, _why_not_group, ours=True, of_models=True),
)
