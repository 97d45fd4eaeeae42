"""A Llama, or a Qwen2, with random weights made on the device, and who trains its adapters: ``llama``'s providers.

All of them share the weights of one base. The adapters' values are drawn from one seed, so they are the same too, and
no B is zero.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .models import shared

__all__ = [
    "ALPHA",
    "DROPOUT",
    "MODELS",
    "PROVIDERS",
    "SIZES",
    "Built",
    "LlamaSizes",
    "Model",
    "Provider",
    "R",
    "base_model",
    "built",
    "free",
    "missing",
    "needs_liger",
    "unpatched",
]

R, ALPHA, DROPOUT = 16, 32, 0.1
COMPILER = "inductor"
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_STD = 0.02  # of the weights, and of B
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class LlamaSizes:
    """Llama-3-8B's by default; ``tokens`` of each sequence, ``batches``: the numbers of sequences of a step.

    ``kind``: transformers' name of the architecture, "Llama" or "Qwen2".
    """

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    layers: int = 32
    vocabulary: int = 128256
    tokens: int = 4096
    batches: tuple[int, int] = (1, 2)
    kind: str = "Llama"


@dataclass(frozen=True)
class Model:
    """One of the models: its sizes by preset, and the best that is published of its LoRA on one H100."""

    sizes: dict[str, LlamaSizes]
    tokens_per_second: int
    tflops: int


_SMALL = LlamaSizes(64, 96, 4, 2, 3, 256, 96)
SIZES = {"gpu-llama": LlamaSizes(), "llama-small": _SMALL}
_QWEN = {
    "gpu-llama": LlamaSizes(3584, 18944, 28, 4, 28, 152064, kind="Qwen2"),
    "llama-small": replace(_SMALL, kind="Qwen2"),
}
MODELS = {"Llama-3-8B": Model(SIZES, 12473, 402), "Qwen2.5-7B": Model(_QWEN, 14110, 423)}


@dataclass(frozen=True)
class Built:
    """A model to train, transformers' own within it, and its optimizer, where there is something to train."""

    model: Any
    llama: Any
    optimizer: torch.optim.Optimizer | None
    note: str

    def step(self, tokens: Tensor) -> Tensor:
        """Forward, loss, backward, optimizer."""
        loss = self.loss(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def note_of_calls(self) -> str:
        """Where ours was fused: which of its calls PEFT's own forward ran after all, which would be PEFT's speed."""
        if not self.note:
            return ""
        from ..peft import calls

        own = calls(self.model).own
        if not own:
            return self.note
        reason = max(own, key=own.__getitem__)
        return f"{self.note}; PEFT's own forward ran {sum(own.values())} calls, first for: {reason}"

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy as transformers computes it; the logits are let go before backward begins."""
        found: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found


@dataclass(frozen=True)
class Provider:
    """Who trains.

    Attributes:
        adapt: puts adapters into a model that shares the base's weights; the model to call, and a note.
        seconds: what a cell may need on a GPU: none is begun that would not fit.
    """

    title: str
    adapt: Callable[[Any], tuple[Any, str]]
    seconds: float = 12.0


def missing() -> str | None:
    """A sentence that says what is not installed, or None."""
    absent = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} cannot be imported: pip install 'lora-kernels[bench]' transformers."


def needs_liger(name: str, device: str) -> str | None:
    """Why the provider ``name`` cannot run for want of Liger, or None."""
    if not name.endswith("-liger"):
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel."
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger's kernels do not run on a CPU."
    return None


def base_model(sizes: LlamaSizes, device: str, dtype: torch.dtype) -> Any:
    """transformers' ``LlamaForCausalLM``, or Qwen2's, frozen, in training mode: made where it stays, in its dtype.

    transformers draws the weights (normal, 0.02); norms begin with ones, Qwen2's biases with zeros.
    """
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{sizes.kind}Config")(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        num_hidden_layers=sizes.layers,
        max_position_embeddings=2 * sizes.tokens,
        initializer_range=_STD,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{sizes.kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.train().requires_grad_(False)


def built(name: str, base: Any, seed: int) -> Built:
    """The provider's model, over ``base``'s own weights."""
    llama = shared(base)
    model, note = PROVIDERS[name].adapt(llama)
    model.train()
    trained = {key: p for key, p in sorted(model.named_parameters()) if p.requires_grad}
    _draw(trained, seed)
    optimizer = torch.optim.AdamW(trained.values(), lr=_LEARNING_RATE, fused=True) if trained else None
    return Built(model, llama, optimizer, note)


@torch.no_grad()
def _draw(trained: dict[str, nn.Parameter], seed: int) -> None:
    """The adapters' values, exact in 16 bits, whatever dtype the provider keeps them in."""
    for i, (name, parameter) in enumerate(trained.items()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * seed + i)
        std = _STD if "lora_B" in name else (3 * parameter.shape[1]) ** -0.5  # of A: as PEFT's own
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device) * std
        parameter.copy_(drawn.bfloat16())


def free(device: str, compiled: bool = False) -> None:
    """Gives back what a provider's model held, and what was compiled for it."""
    if compiled:
        torch.compiler.reset()
    if device == "cuda":
        gc.collect()  # of cycles, which modules and errors are in
        torch.cuda.empty_cache()


def _frozen(llama: Any) -> tuple[Any, str]:
    """Backward goes down to the first block's input, as it does where the first block has adapters."""
    llama.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
    return llama, ""


def _peft(llama: Any, fp32_adapters: bool = False) -> tuple[Any, str]:
    import peft

    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=_PROJECTIONS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(llama, config, autocast_adapter_dtype=fp32_adapters), ""


def _fused(llama: Any) -> tuple[Any, str]:
    from ..peft import fuse_peft

    model, _ = _peft(llama)
    report = fuse_peft(model)
    found = f"{len(report.layers)} layers, {len(report.groups)} groups and {len(report.mlps)} gated MLPs are fused"
    return model, found + (f", {len(report.skipped)} layers are not" if report.skipped else "")


def _compiled(llama: Any) -> tuple[Any, str]:
    """Block by block: the blocks share what is compiled."""
    model, note = _fused(llama)
    for block in llama.model.layers:
        block.compile(fullgraph=True, dynamic=False, backend=COMPILER)
    return model, note


def _with_liger(adapt: Callable[[Any], tuple[Any, str]], swiglu: bool) -> Callable[[Any], tuple[Any, str]]:
    """Liger's kernels around the adapters; its SwiGLU only where no MLP of ours stands in its place."""

    def adapted(llama: Any) -> tuple[Any, str]:
        liger = importlib.import_module("liger_kernel.transformers")
        model, note = adapt(llama)
        getattr(liger, f"apply_liger_kernel_to_{llama.config.model_type}")(model=llama, swiglu=swiglu)
        return model, note

    return adapted


@contextmanager
def unpatched() -> Iterator[None]:
    """Undoes at its end what Liger has changed in transformers beyond one model."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    before = []
    for kind, module in (("Llama", modeling_llama), ("Qwen2", modeling_qwen2)):
        names = ("apply_rotary_pos_emb", f"{kind}RMSNorm", f"{kind}MLP")
        before += [(module, name, getattr(module, name)) for name in names]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


PROVIDERS = {
    "frozen": Provider("frozen model", _frozen),
    "fused": Provider("lora_kernels", _fused, 20.0),
    "peft": Provider("PEFT, 16-bit adapters", _peft),
    "compiled": Provider("lora_kernels, blocks compiled", _compiled, 60.0),
    "peft32": Provider("PEFT", lambda llama: _peft(llama, fp32_adapters=True)),
    "fused-liger": Provider("lora_kernels with Liger", _with_liger(_fused, swiglu=False), 20.0),
    "peft-liger": Provider("PEFT with Liger, 16-bit adapters", _with_liger(_peft, swiglu=True)),
}
