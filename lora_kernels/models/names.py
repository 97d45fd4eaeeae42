"""The names of a model's modules, as a configuration, a report and an adapter's file call them.

``torch.compile``, ``checkpoint_wrapper``, DDP and their kind put a part of their own into every name below them. A rule
says what the model's author called a module, and a file must fit the model without them. So every place where a name
meets a rule or a file asks here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = [
    "adds_prompt",
    "compiled_alone",
    "joined",
    "parameter_name",
    "plain_modules",
    "plain_name",
    "plain_names",
    "prompt_parts",
    "unwrapped",
]

_INNER = {  # by the class of a wrapper: what it calls the module that it runs
    "OptimizedModule": "_orig_mod",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",  # with a prompt, which it adds itself; around a tuner the names are PEFT's own
}
_WRITERS = ("torch", "deepspeed", "peft")  # the packages of these classes
_PARTS = {name for name in _INNER.values() if name.startswith("_")}  # that no author would call a module


def joined(prefix: str, name: str) -> str:
    """The dotted name of ``name`` under ``prefix``, which may be the root's empty one."""
    return f"{prefix}.{name}" if prefix else name


def plain_name(name: str) -> str:
    """A dotted name without the parts of wrappers that are told by themselves, where there is no model to ask.

    Example:
        >>> plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def plain_names(model: nn.Module) -> dict[str, str]:
    """By each name of ``named_modules(remove_duplicate=False)``, that name without the parts of wrappers.

    A wrapper and what it runs have one plain name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: dict[str, str] = {}
    for name in modules:  # parents come before their children
        parent, _, own = name.rpartition(".")
        if not name:
            plain[name] = ""
        elif parent not in plain:
            plain[name] = plain_name(name)  # a model's own named_modules() that leaves parents out
        else:
            plain[name] = plain[parent] if _inner(modules[parent]) == own else joined(plain[parent], own)
    return plain


def plain_modules(model: nn.Module, shared: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``(plain name, module)`` of each module of ``model``, in its order; of a wrapper, only of what it runs.

    Args:
        shared: whether a module that stands at several places comes with each of its names, or once with the first.
    """
    names = plain_names(model)
    seen: set[tuple[str, nn.Module]] | set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        key = (names[name], module) if shared else module
        if _inner(module) is None and key not in seen:
            seen.add(key)  # type: ignore[arg-type]
            yield names[name], module


def parameter_name(names: dict[str, str], name: str) -> str:
    """The plain name of a Parameter or buffer called ``name``; ``names`` are its model's :func:`plain_names`."""
    path, _, own = name.rpartition(".")
    return joined(names.get(path, plain_name(path)), own)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, FSDP1 and their kind."""
    while (own := _inner(model)) is not None:
        inner = model._modules[own]
        assert inner is not None
        model = inner
    return model


def compiled_alone(model: nn.Module) -> set[nn.Module]:
    """The modules that ``torch.compile`` was called on by themselves: the compiled function goes on calling them.

    So nothing can take their place. What is within them can be replaced.
    """
    outer = (module for module in model.modules() if _inner(module) == _INNER["OptimizedModule"])
    return {module._modules[_INNER["OptimizedModule"]] for module in outer}  # type: ignore[misc]


def _inner(module: nn.Module) -> str | None:
    """What ``module`` calls the module that it runs, if it is a wrapper."""
    for kind in type(module).__mro__:
        own = _INNER.get(kind.__name__)
        if own is not None and kind.__module__.partition(".")[0] in _WRITERS:
            runs = own in module._modules and (kind.__name__ != "PeftModel" or adds_prompt(module))
            return own if runs and module._modules[own] is not None else None
    return None


def adds_prompt(module: nn.Module) -> bool:
    """Whether ``module`` is a ``PeftModel`` for prompts: prompt tuning, prefix tuning and their kind."""
    return vars(module).get("_is_prompt_learning") is True


def prompt_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that make the prompts of ``model``, where PEFT's models within it have some."""
    encoders = (module._modules.get("prompt_encoder") for module in model.modules() if adds_prompt(module))
    return {part for encoder in encoders if encoder is not None for part in encoder.modules()}
