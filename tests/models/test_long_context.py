"""Long context: selective checkpoints, activations kept on the host, and several sequences packed into one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from bench import long_context
from lora_kernels import LoRAConfig, mark_only_lora_as_trainable, replace_linear, use_backend
from lora_kernels.benchmark.memory import storages_kept
from numerics import check_all, same_bits

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]
IDS = torch.arange(64).reshape(2, 32) % 32
POLICIES: dict[str, Any] = {"kept": long_context.keep_products, "recomputed": long_context.keep_attention}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, initializer_range=0.2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config).train()


def replaced(p: float = 0.0) -> Any:
    model = llama()
    replace_linear(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=p))
    mark_only_lora_as_trainable(model)
    return model


def by_peft(p: float = 0.0) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": p}
    return peft.get_peft_model(llama(), peft.LoraConfig(**settings)).train()


def fused(p: float = 0.0) -> Any:
    model = by_peft(p)
    lora_kernels.fuse_peft(model)
    return model


MODELS: dict[str, Callable[[float], Any]] = {"replaced": replaced, "fused": fused}
every_model = pytest.mark.parametrize("kind", MODELS)
every_dropout = pytest.mark.parametrize("p", [0.0, 0.3])
every_backend = pytest.mark.parametrize("backend", ["eager", "native"])


def gradients(model: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> dict[str, Tensor]:
    torch.manual_seed(1)
    with around():
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach().reshape(1)} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


class Ran(TorchDispatchMode):
    """Counts the operators of ours that really run: what a checkpoint kept does not come here a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "lora_kernels":
            self.counts[op.__name__] += 1
        return op(*args, **(kwargs or {}))


# Selective checkpoints


@every_backend
@every_model
@every_dropout
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_no_bit(policy: str, p: float, kind: str, backend: str) -> None:
    with use_backend(backend):
        plain = gradients(MODELS[kind](p))
        found = gradients(long_context.selective(MODELS[kind](p), POLICIES[policy]))
    assert found.keys() == plain.keys()
    assert all(same_bits(found[name], value) for name, value in plain.items())


@every_model
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_keeps_runs_once(policy: str, kind: str) -> None:
    models = {"plain": MODELS[kind](0.0), policy: long_context.selective(MODELS[kind](0.0), POLICIES[policy])}
    counted = {}
    for name, model in models.items():
        with use_backend("native"), Ran() as ran:
            gradients(model)
        counted[name] = ran.counts
    again = counted[policy] - counted["plain"]
    del again["native_input_grad.default"]  # a checkpoint has the first block's dx due
    assert again.keys() == ({"native_gated.default"} if policy == "kept" else FORWARD)


FORWARD = {f"native_{name}.default" for name in ("shrink", "product", "forward", "gated")}


def test_a_policy_holds_more_than_a_whole_checkpoint_and_less_than_none() -> None:
    policies = {"whole": None, **POLICIES}
    models = {name: long_context.selective(replaced(), policy) for name, policy in policies.items()}
    models["none"] = replaced()
    held = {name: long_context.held(partial(loss_of, model)) for name, model in models.items()}
    assert held["whole"] < held["recomputed"] < held["kept"] < held["none"]


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


# On the host


@every_backend
@every_model
@every_dropout
def test_activations_that_are_kept_on_the_host_give_the_same_bits(p: float, kind: str, backend: str) -> None:
    with use_backend(backend):
        plain = gradients(MODELS[kind](p))
        found = gradients(MODELS[kind](p), save_on_cpu)
    assert all(same_bits(found[name], value) for name, value in plain.items())


@every_model
@every_dropout
def test_nothing_is_kept_that_does_not_pass_the_hooks(kind: str, p: float) -> None:
    """What does not, no one can offload. The hooks drop all they are given; what is left is less than one tensor."""
    model = MODELS[kind](p)

    def forward() -> Any:
        with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            return model(input_ids=IDS, labels=IDS).loss

    passed = storages_kept(lambda: model(input_ids=IDS, labels=IDS).loss)
    smallest = IDS.numel() * 32 * 4  # one hidden state
    assert sum(t.untyped_storage().nbytes() for t in passed.values()) > 20 * smallest
    assert long_context.held(forward) < smallest


# Packed


def packed(lengths: tuple[int, ...] = (5, 11, 16)) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One row of several sequences, their positions, and the sequences."""
    rows = [torch.arange(length)[None] * 3 % 32 for length in lengths]
    return torch.cat(rows, 1), torch.cat([torch.arange(length) for length in lengths])[None], rows


@every_model
def test_a_packed_row_is_its_sequences_one_by_one(kind: str) -> None:
    """In float64: the logits, and the gradients of a sum over all tokens."""
    ids, positions, rows = packed()
    weights = torch.randn(ids.shape[1], 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def results(model: Any, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        logits = [model(input_ids=x, position_ids=at).logits[0] for x, at in parts]
        whole = torch.cat(logits)
        (whole * weights).sum().backward()
        return {"logits": whole.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    apart = results(MODELS[kind](0.0).double(), [(row, torch.arange(row.shape[1])[None]) for row in rows])
    together = results(MODELS[kind](0.0).double(), [(ids, positions)])
    check_all(together, apart, apart, torch.float64)


def test_a_packed_row_of_pefts_own_layers_gives_the_same() -> None:
    ids, positions, _ = packed()
    found = []
    for make in (by_peft, fused):
        model = make().double()
        loss = model(input_ids=ids, position_ids=positions, labels=ids).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().reshape(1)} | grads)
    check_all(found[1], found[0], found[0], torch.float64)
