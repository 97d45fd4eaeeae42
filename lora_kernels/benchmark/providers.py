"""Who is measured: the floor, the rivals and this package's backends, as layers around one frozen ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..nn import FusedLoRALinear
from . import rebuilt
from .model_providers import MODEL_PROVIDERS, why_not_peft
from .models import ModelSetup
from .nf4_providers import NF4_PROVIDERS
from .setups import FLOOR, Layer, Provider, Setup, make_setups
from .workloads import Workload

__all__ = ["FLOOR", "PROVIDERS", "Layer", "Provider", "Setup", "make_setups"]


def _build_linear(setup: Setup) -> Layer:
    if isinstance(setup, ModelSetup):
        return Layer(partial(setup.run, setup.base), module=setup.base)
    return Layer(setup.linear, module=setup.linear)


def _build_ours(backend: str | None) -> Callable[[Setup], Layer]:
    def build(setup: Setup) -> Layer:
        w = setup.workload
        module = FusedLoRALinear.from_linear(
            setup.linear,
            r=w.r,
            lora_alpha=setup.scaling * w.r,
            lora_dropout=w.p,
            adapter_dtype=setup.adapter_dtype,
        )
        _load(module.lora_A, module.lora_B, setup)
        trainable = (module.lora_A, module.lora_B, *_trainable_bias(setup))
        return Layer(module, trainable, module.train(), lambda: dispatch.use_backend(backend))

    return build


def _why_not_ours(backend: str) -> Callable[[Setup], str | None]:
    def why_not(setup: Setup) -> str | None:
        problem = dispatch.Problem(setup.device.type, setup.dtype)
        reasons = dispatch.backend(backend).why_not(problem)
        if backend == "triton" and setup.device.type != "cuda":
            return "Triton's interpreter is for tests and is never timed." if not reasons else reasons[0]
        return " ".join(reasons) or None

    return why_not


def _why_not_peft16(setup: Setup) -> str | None:
    if setup.dtype.itemsize > 2:
        return "PEFT's adapters have the base's dtype already."
    return why_not_peft(setup)


def _build_peft(same_dtype: bool) -> Callable[[Setup], Layer]:
    def build(setup: Setup) -> Layer:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        w = setup.workload
        config = LoraConfig(r=w.r, lora_alpha=int(setup.scaling * w.r), lora_dropout=w.p)
        with setup.device:  # or the adapters are drawn on the CPU, which takes longer than everything else
            module = Linear(setup.linear, "default", config, r=w.r, lora_alpha=int(setup.scaling * w.r))
        adapters = module.lora_A["default"], module.lora_B["default"]
        for adapter in adapters:
            adapter.to(setup.dtype if same_dtype else setup.adapter_dtype)
        _load(adapters[0].weight, adapters[1].weight, setup)
        trainable = (adapters[0].weight, adapters[1].weight, *_trainable_bias(setup))
        return Layer(module, trainable, module.train())

    return build


_compiled: dict[str, Workload | None] = {"layer": None}


def _build_compiled(setup: Setup) -> Layer:
    """PEFT's layer under torch.compile, compiled once for all M (and once for M = 1); the first call pays for it.

    All input sets and all cells of one layer share what was compiled; another layer begins anew, or PyTorch's limit on
    recompilations would soon be met, and the rest would run eagerly without a word. Here it is an error.
    """
    import torch._functorch.config as functorch_config
    from torch._dynamo import config as dynamo_config

    family = replace(setup.workload, tokens=0)
    if _compiled["layer"] != family:
        torch._dynamo.reset()
        _compiled["layer"] = family
    layer = _build_peft(same_dtype=False)(setup)
    compiled: Callable[[Tensor], Tensor] = torch.compile(layer.call)

    def call(x: Tensor) -> Tensor:
        if not hasattr(x, "_dynamo_weak_dynamic_indices"):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(x)

    @contextmanager
    def context() -> Iterator[None]:
        # Donated buffers would forbid the repeated backward through one graph that "backward" times.
        with functorch_config.patch(donated_buffer=False), dynamo_config.patch(fail_on_recompile_limit_hit=True):
            yield

    return Layer(call, layer.trainable, layer.module, context)


def _build_composition(lora_first: bool) -> Callable[[Setup], Layer]:
    def build(setup: Setup) -> Layer:
        lora_a, lora_b = (t.to(setup.adapter_dtype, copy=True).requires_grad_() for t in (setup.lora_a, setup.lora_b))
        apply: Callable[..., Tensor] = Composition.apply
        weight, bias, p = setup.linear.weight, setup.linear.bias, setup.workload.p
        module = nn.Module().train()  # only holds the mode: dropout acts while it trains

        def call(x: Tensor) -> Tensor:
            dropout = p if module.training else 0.0
            y: Tensor = apply(x, weight, bias, lora_a, lora_b, dropout, setup.scaling, lora_first)
            return y

        return Layer(call, (lora_a, lora_b, *_trainable_bias(setup)), module)

    return build


class Composition(torch.autograd.Function):
    """The plain rival, written as trainers write it: the library's product, and the low-rank term by ``addmm_``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        p: float,
        scaling: float,
        lora_first: bool,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        h = dropped @ a.t()
        ctx.save_for_backward(dropped, weight, lora_a, lora_b, mask, h)
        ctx.scaling, ctx.lora_first, ctx.p = scaling, lora_first, p
        if lora_first:
            low_rank = (h @ b.t()).mul_(scaling) if bias is None else torch.addmm(bias, h, b.t(), alpha=scaling)
            return low_rank.addmm_(x, weight.t())
        return _add_product(nn.functional.linear(x, weight, bias), h, b, scaling)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        dropped, weight, lora_a, lora_b, mask, h = ctx.saved_tensors
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        dh = (dy @ b).mul_(ctx.scaling)
        need_x, need_bias, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 2, 3, 4))
        dx = None
        if need_x and mask is not None:
            low_rank = torch.ops.aten.native_dropout_backward(dh @ a, mask, 1.0 / (1.0 - ctx.p))
            dx = low_rank.addmm_(dy, weight)
        elif need_x:
            dx = (dh @ a).addmm_(dy, weight) if ctx.lora_first else _add_product(dy @ weight, dh, a.t(), 1.0)
        da = (dh.t() @ dropped).to(lora_a.dtype) if need_a else None
        db = (h.t() @ dy).mul_(ctx.scaling).t().to(lora_b.dtype) if need_b else None
        return dx, None, dy.sum(0) if need_bias else None, da, db, None, None, None


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``out += scaling * left @ rightᵀ``; transposed on CPUs for many tokens, where it is mostly quicker."""
    if out.is_cuda or out.shape[0] < 64:
        return out.addmm_(left, right.t(), alpha=scaling)
    out.t().addmm_(right, left.t(), alpha=scaling)
    return out


def _trainable_bias(setup: Setup) -> tuple[Tensor, ...]:
    """The shared bias, set to train again after a layer that was built around it has frozen it; or nothing."""
    return (setup.linear.bias.requires_grad_(),) if setup.workload.train_bias else ()


@torch.no_grad()
def _load(lora_a: Tensor, lora_b: Tensor, setup: Setup) -> None:
    lora_a.copy_(setup.lora_a)
    lora_b.copy_(setup.lora_b)


PROVIDERS = {
    p.name: p
    for p in (
        Provider(FLOOR, "nn.Linear", _build_linear),
        Provider("peft", "PEFT", _build_peft(same_dtype=False), why_not_peft),
        Provider("peft16", "PEFT16", _build_peft(same_dtype=True), _why_not_peft16),
        Provider("compile", "PEFT compiled", _build_compiled, why_not_peft),
        Provider("addmm", "addmm_", _build_composition(lora_first=False)),
        Provider("lora_first", "LoRA first", _build_composition(lora_first=True)),
        Provider(rebuilt.NAME, "LoRAFusion", rebuilt.build, rebuilt.why_not),
        Provider("auto", "lora_kernels", _build_ours(None), ours=True),
        *(
            Provider(name, f"ours, {name}", _build_ours(name), _why_not_ours(name), True, name)
            for name in dispatch.ORDER
        ),
        *MODEL_PROVIDERS,
        *NF4_PROVIDERS,
    )
}
