"""An adapter on the output layer that a loss goes past: noticed in the first training step.

A loss in chunks (Liger's, TRL's) multiplies the body's output by ``lm_head.weight`` and never calls ``lm_head``. So the
adapter has no effect and no gradient. When the body's output gets its gradient, the head was called or it was not.

A compiled graph tells nothing of its calls. Where the body is in one, the end of the first backward judges: an adapter
of the body has its gradient, and the head's has it too, or the loss went past the head.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAKernelsWarning
from .names import plain_modules

__all__ = ["watch_heads"]


def watch_heads(model: nn.Module) -> None:
    """Has each model within that has an output layer with an adapter look once whether training calls that layer."""
    for _, owner in plain_modules(model, shared=False):
        head, body = _head_of(owner), getattr(owner, "base_model", None)
        if not _adapter(head) or not isinstance(body, nn.Module) or body is owner:
            continue
        if not any(isinstance(hook, _Watch) for hook in body._forward_hooks.values()):
            watch = _Watch(owner)
            body.register_forward_hook(watch)
            _watch_gradients(watch, body, head)


def _head_of(owner: nn.Module) -> Any:
    """The output layer, as transformers' models tell it."""
    ask = getattr(type(owner), "get_output_embeddings", None)
    if ask is None:
        return None
    try:
        return ask(owner)
    except (AttributeError, NotImplementedError):
        return None


def _adapter(head: Any) -> list[nn.Parameter]:
    """The adapter's Parameters, ours or PEFT's."""
    named = head.named_parameters() if isinstance(head, nn.Module) else ()
    return [parameter for name, parameter in named if "lora_" in name]


class _Calls:
    """A forward hook that counts."""

    count = 0

    def __call__(self, *unused: Any) -> None:
        self.count += 1


class _Watch:
    """A forward hook of a body. A copy or a pickle of it knows no model, and does nothing."""

    in_graph = False  # whether the body ran in a compiled graph, in training

    def __init__(self, owner: nn.Module | None = None) -> None:
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, ()

    def __call__(self, body: nn.Module, args: Any, output: Any) -> None:
        if not body.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.in_graph = True  # as a compiled body's calls do too
            return
        first = output if isinstance(output, Tensor) else output[0]
        if torch._C._current_graph_task_id() != -1 or not isinstance(first, Tensor) or not first.requires_grad:
            return  # a checkpoint runs it again, or nothing in it trains
        for key in [key for key, hook in body._forward_hooks.items() if hook is self]:
            del body._forward_hooks[key]
        head, name = self.trained_head()
        if head is None:
            return
        calls = _Calls()
        handle = head.register_forward_hook(calls)

        def judge(gradient: Tensor) -> None:
            handle.remove()
            if not calls.count:
                _tell(name)

        first.register_hook(judge)

    def trained_head(self) -> tuple[Any, str]:
        """The output layer and its name; None where its adapter does not train, or the model is gone."""
        owner = self.owner()
        head: Any = None if owner is None else _head_of(owner)
        if owner is None or not any(parameter.requires_grad for parameter in _adapter(head)):
            return None, ""
        return head, next(name for name, module in owner.named_modules() if module is head)


def _watch_gradients(watch: _Watch, body: nn.Module, head: nn.Module) -> None:
    """Has the first backward that reaches the body's adapters look at the head's, for bodies that are compiled."""
    of_body = next((parameter for parameter in _adapter(body) if parameter.requires_grad), None)
    of_head = [parameter for parameter in _adapter(head) if parameter.requires_grad]
    if of_body is None or not of_head:
        return
    found = _Calls()
    handles = [parameter.register_post_accumulate_grad_hook(found) for parameter in of_head]

    def judge() -> None:
        for handle in handles:
            handle.remove()
        trained, name = watch.trained_head()
        if watch.in_graph and trained is not None and not found.count:
            _tell(name)

    def begin(unused: Tensor) -> None:
        if not torch.compiler.is_compiling():
            first.remove()
            torch.autograd.Variable._execution_engine.queue_callback(judge)

    first = of_body.register_post_accumulate_grad_hook(begin)


def _tell(name: str) -> None:
    warnings.warn(
        f"{name} has an adapter that trains, and this step never called {name}: the loss reads {name}.weight, as those "
        "in chunks do. The adapter has no effect and no gradient. Take the loss from the logits (Liger: "
        f"fused_linear_cross_entropy=False; TRL: another loss_type), or leave {name} out of the adapter.",
        LoRAKernelsWarning,
        stacklevel=1,
    )
