"""``FusedLoRAMLP``: a gated MLP whose three layers, with their adapters, are one pass; and how models' are found.

What the pass computes and keeps is in ``mlp_autograd.py``.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..activations import check_gate, gate_of
from ..branches import Branch, PackedBranch
from ..dispatch import Problem
from ..errors import InvalidArgumentError, InvalidTypeError
from ..gate import device_type_of, is_autocast_enabled
from ..gated_mlp import run_mlp
from ..shared_input import why_called
from ..tensors import is_plain
from .mlp_forms import roles_of
from .names import plain_modules
from .report import SkippedLayer

__all__ = ["FusedLoRAMLP", "fuse_mlps", "mlps_of", "unfuse_mlps"]

_OWN_ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn"}
# Children by which a gated MLP is told whose forward is not known.
_LOOK_LIKE_ONE = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"gate_up_proj", "down_proj"})
_kinds: dict[type, type[FusedLoRAMLP]] = {}


class _Pass(NamedTuple):
    """What one pass takes, as :func:`~lora_kernels.gated_mlp.run_mlp` does."""

    heads: list[Branch]
    down: Branch
    p: float
    down_p: float
    activation: str


class FusedLoRAMLP(nn.Module):
    r"""A gated MLP with adapters on its three layers, in training as one pass.

    .. math:: y = \mathrm{down}(\sigma(\mathrm{gate}(x)) \odot \mathrm{up}(x))

    Each layer is a LoRA layer: x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ. x is read once for gate's and up's h. The product is made
    by one kernel, and so are the gradients of both its factors. For backward x, gate's and up's outputs and each h are
    kept; the product is made again. Three layers also keep σ(gate) and the product, which PEFT's do in more copies.

    ``replace_linear``, ``load_adapter`` and ``fuse_peft`` find the MLPs of a transformers model: Llama's, Qwen's,
    Mistral's, Gemma's and Phi-3's kinds. Each then has a class that derives from this one and from its own. Names,
    Parameters and hooks stay. :func:`~lora_kernels.unshare_inputs` and ``restore_linear`` give the class back.

    It runs as its layers do, one by one, in evaluation and wherever one pass would leave something out. That is: hooks
    on a layer within; a layer without an adapter, or whose adapter is off or merged; a base weight that trains; DoRA
    with dropout; another dropout at gate than at up; layers on several devices, or of several dtypes outside of
    autocast; a forward that was replaced. ``why_plain`` says which.

    Args:
        gate, up: linear layers (K → F), ``FusedLoRALinear`` or to be replaced by them.
        down: a linear layer (F → N).
        activation: σ: ``"silu"`` (SwiGLU), ``"gelu"`` (GeGLU, with the error function) or ``"gelu_tanh"``.
        recompute: keep x and each h only; gate's and up's outputs are computed again in backward.

    Raises:
        InvalidArgumentError: an unknown activation, or sizes that do not fit.
        InvalidTypeError: a layer is no linear layer.

    Example:
        >>> import torch
        >>> from lora_kernels import FusedLoRALinear, FusedLoRAMLP
        >>> mlp = FusedLoRAMLP(*[FusedLoRALinear(*size, r=4) for size in ((16, 24), (16, 24), (24, 16))])
        >>> mlp(torch.ones(2, 5, 16)).shape
        torch.Size([2, 5, 16])
        >>> mlp.why_plain() is None
        True
    """

    recompute: bool = False
    _plain_class: ClassVar[Any] = None  # of a model's own MLP
    _known_forward: ClassVar[Any] = None
    _roles: ClassVar[dict[str, str]] = _OWN_ROLES
    _apart: bool = False  # whether its layers are to run one by one

    def __init__(
        self, gate: nn.Module, up: nn.Module, down: nn.Module, activation: str = "silu", recompute: bool = False
    ) -> None:
        super().__init__()
        check_gate(activation)
        for name, layer in {"gate": gate, "up": up, "down": down}.items():
            if not isinstance(layer, nn.Module) or not hasattr(layer, "in_features"):
                raise InvalidTypeError(
                    f"{name} of a FusedLoRAMLP is a {type(layer).__name__}: it must be a linear layer, such as a "
                    "FusedLoRALinear."
                )
        self.gate_proj, self.up_proj, self.down_proj, self.recompute = gate, up, down, recompute
        self.act_fn = nn.SiLU() if activation == "silu" else nn.GELU("none" if activation == "gelu" else "tanh")
        if reason := _why_sizes(self):
            raise InvalidArgumentError(f"layers that do not fit were given to FusedLoRAMLP: {reason}.")

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) for x (..., K)."""
        found = _pass_of(self, x) if self.training else ""
        if isinstance(found, str):
            return self._one_by_one(x)
        for layer in _layers(self):
            layer.note_pass()
        return run_mlp(x, *found, recompute=self.recompute)

    def _one_by_one(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y

    def why_plain(self, x: Tensor | None = None) -> str | None:
        """Why its layers run one by one now, in a sentence; None: they run in one pass.

        Args:
            x: what it would be called with; without it, what depends on x is left out.
        """
        found = _pass_of(self, x) if self.training else "it is in evaluation, where nothing is kept for backward"
        return f"The layers run one by one: {found}." if isinstance(found, str) else None

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about: the first layer's, and how they run together."""
        first: Any = next((layer for layer in _layers(self) if hasattr(layer, "problem")), None)
        if first is None:
            raise InvalidTypeError("explain was given a FusedLoRAMLP none of whose layers has an adapter. Add some.")
        problem: Problem = first.problem
        together = "It is the first layer of a gated MLP, whose three layers run in one pass in training."
        return replace(problem, aside=self.why_plain() or together)


def _layers(mlp: Any) -> list[Any]:
    """gate and up, or both in one, and down."""
    return [getattr(mlp, name) for role, name in mlp._roles.items() if role in ("gate", "up", "gate_up")] + [
        getattr(mlp, mlp._roles["down"])
    ]


def _pass_of(mlp: Any, x: Tensor | None) -> _Pass | str:
    """What one pass takes, or why there can be none, in a clause."""
    compiling = torch.compiler.is_compiling()
    if mlp._apart:
        return "unshare_inputs was called"
    if mlp._plain_class is not None and mlp._plain_class.forward is not mlp._known_forward:
        return f"{mlp._plain_class.__name__}.forward was replaced"
    if "forward" in mlp.__dict__:
        return f"its forward was replaced{_by_whom(mlp.forward)}"
    if torch._C._are_functorch_transforms_active():  # a compiler answers it too, with a constant
        return "torch.func or vmap is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are active"
    if torch_module._has_any_global_hook():
        return "hooks on all modules are registered"
    if not compiling and (reason := _why_here(x)):
        return reason
    activation = _activation_of(mlp)
    if activation is None:
        return "its activation is none of SiLU and GELU, or has hooks"
    parts: list[tuple[Branch, float]] = []
    for role in ("gate", "up", "gate_up", "down"):
        if role not in mlp._roles:
            continue
        name = mlp._roles[role]
        layer = getattr(mlp, name)
        reason = why_called(layer) if hasattr(layer, "shared_branch") else "it has no adapter"
        part = None if reason is not None else layer.shared_branch(x)
        if part is None:
            return f"{name}: {reason or layer.why_alone(x)}"
        parts.append(part)
    branches = [branch for branch, _ in parts]
    if any(type(branch) is PackedBranch for branch in branches):
        return "a base weight is quantised"
    if any(p != parts[0][1] for _, p in parts[:-1]):
        return "gate and up have different dropout probabilities"
    if any(branch.weight.requires_grad for branch in branches):
        return "a base weight trains"
    return _why_mixed(x, branches) or _Pass(branches[:-1], branches[-1], parts[0][1], parts[-1][1], activation)


def _why_here(x: Tensor | None) -> str | None:
    """Why this call's input or surroundings allow no pass of several layers."""
    if x is not None and not is_plain(x):
        return "the input is no plain tensor"
    return "torch.jit.trace is recording" if torch._C._get_tracing_state() is not None else None


def _why_mixed(x: Tensor | None, branches: list[Branch]) -> str | None:
    """Why these weights, and x, are not multiplied in one pass."""
    first = branches[0].weight
    if any(branch.weight.device != first.device for branch in branches):
        return "its layers are on several devices"
    if x is not None and x.device != first.device:
        return "the input is on another device"
    if x is not None and is_autocast_enabled(device_type_of(x)):
        return None
    if any(branch.weight.dtype is not first.dtype for branch in branches):
        return "its layers are of several dtypes"
    return "the input has another dtype than its layers" if x is not None and x.dtype is not first.dtype else None


def _activation_of(mlp: Any) -> str | None:
    """Which of ``activations.GATES`` its activation is; None: another."""
    if "act" not in mlp._roles:
        return "silu"
    act = getattr(mlp, mlp._roles["act"])
    return gate_of(act)


def _why_sizes(mlp: Any) -> str | None:
    *heads, down = _layers(mlp)
    width = sum(layer.out_features for layer in heads)
    if len({layer.in_features for layer in heads}) > 1 or len({layer.out_features for layer in heads}) > 1:
        return "gate and up have different sizes"
    if width != 2 * down.in_features:
        return f"gate and up give {width} features together, and down reads {down.in_features}, which is not the half"
    return None


def fuse_mlps(model: nn.Module) -> tuple[list[str], list[SkippedLayer]]:
    """Lets gated MLPs with adapters run in one pass; their names, and those that look like one and cannot, with why."""
    fused, left = [], []
    for name, module in plain_modules(model, shared=False):
        if isinstance(module, FusedLoRAMLP):
            module._apart = False
            continue
        roles = roles_of(type(module).forward)
        if roles is None or not ({"gate", "up"} <= roles.keys() or "gate_up" in roles):
            if _looks_like_one(module):
                why = "Liger's" if _by_whom(type(module)) else "not one that is known"
                left.append(SkippedLayer(name, f"its forward is {why}: its layers run one by one."))
            continue
        if reason := _why_not(module, roles):
            if any(hasattr(getattr(module, n, None), "shared_branch") for n in roles.values()):
                left.append(SkippedLayer(name, f"{reason}: its layers run one by one."))
            continue
        module.__class__ = _fused_kind(type(module))
        fused.append(name)
    return fused, left


def _looks_like_one(module: nn.Module) -> bool:
    children = module._modules
    if not any(names <= children.keys() for names in _LOOK_LIKE_ONE):
        return False
    return any(hasattr(child, "shared_branch") for child in children.values())


def _why_not(module: Any, roles: dict[str, str]) -> str | None:
    """Why a module with a forward that is known cannot become a ``FusedLoRAMLP``, in a clause."""
    if "forward" in vars(module):
        return f"it has a forward of its own on the instance{_by_whom(module.forward)}"
    names = [name for role, name in roles.items() if role != "act"]
    if bare := [name for name in names if not hasattr(getattr(module, name, None), "shared_branch")]:
        return f"{bare[0]} has no adapter"
    kind = types.SimpleNamespace(_roles=roles, **{name: getattr(module, name, None) for name in roles.values()})
    if _activation_of(kind) is None:
        return "its activation is none of SiLU and GELU"
    return _why_sizes(kind)


def _by_whom(defined: Any) -> str:
    """Whose a function or class is, where that is known."""
    return ", Liger's" if str(getattr(defined, "__module__", "")).startswith("liger_kernel") else ""


def unfuse_mlps(model: nn.Module) -> int:
    """Gives the MLPs of ``model`` their own classes back; how many there were.

    One that is a ``FusedLoRAMLP`` by itself, or whose class something else has changed since, runs its layers one by
    one from now on.
    """
    found = [module for module in model.modules() if isinstance(module, FusedLoRAMLP)]
    for module in found:
        plain = type(module)._plain_class
        if plain is not None and type(module) is _kinds.get(plain):
            module.__class__ = plain
            for name in ("_apart", "recompute"):
                vars(module).pop(name, None)
        else:
            module._apart = True
    return len(found)


def mlps_of(model: nn.Module) -> Iterator[FusedLoRAMLP]:
    """The gated MLPs of ``model`` that may run in one pass."""
    return (module for module in model.modules() if isinstance(module, FusedLoRAMLP))


def _fused_kind(plain: type[nn.Module]) -> type[FusedLoRAMLP]:
    """The class of a ``plain`` MLP that runs in one pass: it derives from it, so ``isinstance`` holds."""
    if plain in _kinds:
        return _kinds[plain]
    known: Any = plain.forward
    argument = known.__code__.co_varnames[1]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) + len(kwargs) != 1 or (kwargs and argument not in kwargs):
            y: Tensor = self._plain_class.forward(self, *args, **kwargs)
            return y
        return FusedLoRAMLP.forward(self, *args, *kwargs.values())

    def one_by_one(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self._plain_class.forward(self, x)
        return y

    def rebuilt(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _blank, (plain,), self.__getstate__()  # a pickle finds no class that was made here by its name

    forward.__wrapped__ = known  # type: ignore[attr-defined]  # whose signature it has
    body = {
        "forward": forward,
        "_one_by_one": one_by_one,
        "_plain_class": plain,
        "_known_forward": staticmethod(known),
        "_roles": roles_of(known),
        "__module__": plain.__module__,
        "__reduce_ex__": rebuilt,
    }
    made = types.new_class(f"FusedLoRA{plain.__name__}", (FusedLoRAMLP, plain), {}, lambda names: names.update(body))
    return _kinds.setdefault(plain, made)


def _blank(plain: type[nn.Module]) -> nn.Module:
    module = nn.Module.__new__(_fused_kind(plain))
    nn.Module.__init__(module)
    return module
