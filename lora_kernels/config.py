"""``LoRAConfig``: PEFT's names and meanings, validated when it is made; and the checks that the layer shares."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, TypeVar

import torch

from . import peft_fields
from .activations import check_activation
from .errors import InvalidArgumentError, InvalidTypeError
from .initialisation import check_initialisation, kind_of

__all__ = [
    "AdapterOptions",
    "LoRAConfig",
    "as_tuple",
    "check_modules_to_save",
    "layer_expression",
    "pattern_expression",
    "pattern_value",
    "plain_number",
    "scaling_of",
    "whole_expression",
]

Config = TypeVar("Config")

BIAS_CHOICES = ("none", "all", "lora_only")
HIGHEST_RANK = 2**31 - 1  # kernels and BLAS count in 32 bits
ADAPTER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterOptions:
    """What one layer's adapter is made with; the fields have the meanings of ``LoRAConfig``'s."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    adapter_dtype: torch.dtype | None = None
    lora_bias: bool = False
    activation: str = "identity"

    def __post_init__(self) -> None:
        _make_plain(self)

    def check(self) -> None:
        """Raises one sentence for the first value that a LoRA layer cannot have."""
        self.check_numbers()
        self.check_kinds()

    def check_numbers(self) -> None:
        """Raises for a rank, alpha, dropout, initialisation or dtype that cannot be."""
        r, lora_alpha, lora_dropout, adapter_dtype = self.r, self.lora_alpha, self.lora_dropout, self.adapter_dtype
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= HIGHEST_RANK:
            raise InvalidArgumentError(
                f"r={_shown(r)} was given: the rank must be an integer of at least 1 and below 2^31, such as 8 or 16."
            )
        if not _is_number(lora_alpha) or not 0 <= lora_alpha <= sys.float_info.max:
            raise InvalidArgumentError(
                f"lora_alpha={_shown(lora_alpha)} was given: it must be a finite number that is not negative, often "
                "r or 2 r."
            )
        if not _is_number(lora_dropout) or not 0 <= lora_dropout < 1:
            raise InvalidArgumentError(
                f"lora_dropout={_shown(lora_dropout)} was given: it must lie in [0, 1). Use 0.0 to switch dropout off."
            )
        check_initialisation(self.init_lora_weights, r, lora_alpha)
        if adapter_dtype is not None and adapter_dtype not in ADAPTER_DTYPES:
            raise InvalidTypeError(
                f"adapter_dtype={adapter_dtype!r} was given: it must be torch.float16, torch.bfloat16, torch.float32, "
                "torch.float64, or None for fp32 over a 16-bit base and the base's dtype otherwise."
            )

    def check_kinds(self) -> None:
        """Raises for options that do not go together: those that PEFT does not have together either, and activations
        beside what reads the product B A."""
        init = self.init_lora_weights
        for name in ("use_rslora", "use_dora", "lora_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidArgumentError(f"{name}={value!r} was given: it must be True or False.")
        if self.lora_bias and self.use_dora:
            raise InvalidArgumentError("lora_bias=True was given with use_dora=True, which has no such bias. Give one.")
        if self.lora_bias and not isinstance(init, bool):
            raise InvalidArgumentError(
                f"lora_bias=True was given with init_lora_weights={init!r}: it goes with True or False only."
            )
        check_activation(self.activation)
        if self.activation == "identity":
            return
        if self.use_dora:
            raise InvalidArgumentError(
                f"activation={self.activation!r} was given with use_dora=True, which scales the rows of W + s B A: "
                "with an activation between A and B there is no such sum. Give one of the two."
            )
        if kind_of(init) not in (True, False, "zero", "gaussian"):
            raise InvalidArgumentError(
                f"activation={self.activation!r} was given with init_lora_weights={init!r}, which chooses A and B "
                "by their product B A: with an activation between them it says nothing. Give True, False, 'zero' or "
                "'gaussian'."
            )


def _named_in_sentences(kind: type[Config]) -> type[Config]:
    """Has ``kind`` answer an argument that it lacks with a sentence, in the place of Python's bare TypeError."""
    made: Any = kind.__init__
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]

    @wraps(made)
    def init(self: Config, *arguments: Any, **named: Any) -> None:
        unknown = next((name for name in named if name not in known), None)
        if unknown is not None:
            raise InvalidTypeError(peft_fields.sentence_of_unknown(unknown, known))
        made(self, *arguments, **named)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


@_named_in_sentences
@dataclass(frozen=True)
class LoRAConfig:
    """What to replace and how; the names and meanings are those of ``peft.LoraConfig``.

    :meth:`from_peft` makes one of a ``peft.LoraConfig``. Numbers may be NumPy's; they become Python's.

    Args:
        r: rank R, at least 1.
        lora_alpha: numerator of the scaling, not negative. **The default is 16, and PEFT's is 8**: with r = 8 that is
            s = 2, twice PEFT's default. It stays for those who trained with it. Give the number where you compare.
        lora_dropout: dropout probability of the adapter's input, in [0, 1).
        target_modules: a list of module names or their dotted suffixes; or one string. The string is a regular
            expression that matches the whole name, or ``"all-linear"``: every ``nn.Linear`` except the output head.
        exclude_modules: the same; modules that it matches are left alone.
        rank_pattern: ``{regular expression over the end of the name: r}``. The first match replaces ``r``.
        alpha_pattern: the same for ``lora_alpha``.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``lora_alpha / r``.
        use_dora: weight-decomposed adapters (Liu et al., "DoRA", 2024).
        bias: which biases train: ``"none"``, ``"all"`` of the model, or ``"lora_only"``, those of the replaced layers.
        init_lora_weights: how the adapters start. These leave the output as it was, because ``B A = 0``:

            - True or ``"zero"``: A Kaiming-uniform, B zero. A is not zero, because then nothing would ever train.
            - ``"gaussian"``: A normal with deviation 1/r, B zero.
            - ``"orthogonal"``: neither is zero, but their product is; r must be even.

            These start with a part of the weight, and the layer keeps the rest in its own Parameter. The output stays,
            up to rounding in the weight's dtype. :func:`save_adapter` writes a plain adapter of rank 2 r for the
            untouched model. They compute in fp32 (fp64 for fp64), need r <= min(K, N), and keep the initial values in
            two more tensors of the adapters' size:

            - ``"pissa"``: the r largest singular values of the weight.
            - ``"pissa_niter_N"``: the same, estimated in N steps, which is much faster.
            - ``"olora"``: by QR.

            False makes both random, so the adapter acts at once; it is for tests.
        adapter_dtype: dtype of the adapters; None is fp32 over a 16-bit base and the base's dtype otherwise.
        lora_bias: whether the adapter has its own trainable bias b_B, which adds ``scaling * b_B`` to the output. Not
            with DoRA, and only where ``init_lora_weights`` is True or False.
        modules_to_save: modules that train whole and are saved with the adapters, such as a classifier's new head. They
            are named by the end of their dotted names. No layer within them is replaced.
        layers_to_transform: only the blocks of these numbers: ``model.layers.3.…`` is number 3. It narrows a
            ``target_modules`` list, except for entries that are a module's whole name.
        layers_pattern: the name of the list of blocks (``"layers"``, ``"h"``); None takes a name's first number.
        activation: σ between A and B: ``"identity"`` (LoRA), ``"relu"``, ``"gelu"`` (exact) or ``"silu"``. With σ it is
            the parallel adapter ``s B σ(A x)`` of He et al. (2022). PEFT does not have it and no weight can hold it, so
            it cannot be merged or saved in PEFT's files. Not with DoRA; and only with ``init_lora_weights`` True,
            False, ``"zero"`` or ``"gaussian"``.
        target_parameters: Parameters that hold a mixture's experts stacked, as transformers 5 has them; a list of their
            dotted names or suffixes, such as ``"mlp.experts.gate_up_proj"``. Each expert has its own A and B of rank
            ``r``. ``rank_pattern`` and ``alpha_pattern`` are asked about the Parameter's name. Without
            ``target_modules`` no linear layer is replaced. Not with DoRA, ``lora_bias``, PiSSA, OLoRA or an activation.

    Raises:
        InvalidArgumentError: a value is not allowed by the above.
        InvalidTypeError: ``adapter_dtype`` is not a floating ``torch.dtype``, names are not strings, patterns are no
            dictionaries, or numbers of layers are not integers; or an argument has another name than these.

    Example:
        >>> from lora_kernels import LoRAConfig
        >>> LoRAConfig(r=16, target_modules=["q_proj", "v_proj"]).r
        16
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    adapter_dtype: torch.dtype | None = None
    lora_bias: bool = False
    modules_to_save: list[str] | tuple[str, ...] | set[str] | None = None
    layers_to_transform: int | list[int] | tuple[int, ...] | set[int] | None = None
    layers_pattern: str | list[str] | tuple[str, ...] | set[str] | None = None
    activation: str = "identity"
    target_parameters: list[str] | tuple[str, ...] | set[str] | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        options = self.options_of("")
        options.check_numbers()
        for name in ("rank_pattern", "alpha_pattern"):
            _check_pattern(name, getattr(self, name))
        for rank in self.rank_pattern.values():
            replace(options, r=rank).check_numbers()
        for alpha in self.alpha_pattern.values():
            replace(options, lora_alpha=alpha).check_numbers()
        if self.bias not in BIAS_CHOICES:
            raise InvalidArgumentError(f"bias={self.bias!r} was given: it must be one of {BIAS_CHOICES}.")
        options.check_kinds()
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_names(name, getattr(self, name))
        check_modules_to_save(self.modules_to_save)
        if isinstance(self.target_parameters, str):
            raise InvalidTypeError(
                f"target_parameters={self.target_parameters!r} was given: it must be a list of names of Parameters, "
                'such as ["mlp.experts.gate_up_proj"]; an expression is not taken.'
            )
        _check_names("target_parameters", self.target_parameters)
        self._check_layers()
        _check_expressions(s for s in (self.target_modules, self.exclude_modules) if isinstance(s, str))
        _check_expressions([*self.rank_pattern, *self.alpha_pattern], pattern_expression)
        _check_expressions(as_tuple(self.layers_pattern), layer_expression)

    @classmethod
    def from_peft(cls, config: Any, adapter_dtype: torch.dtype | None = None) -> LoRAConfig:
        """The same as ``config``, a ``peft.LoraConfig``; PEFT's own defaults included, such as ``lora_alpha=8``.

        Fields that say nothing of what a new adapter computes are left out, such as ``task_type``, ``inference_mode``
        and ``fan_in_fan_out``. A warning names fields that this version does not know.

        Args:
            config: a ``peft.LoraConfig``, or the dictionary that its ``to_dict`` gives.
            adapter_dtype: as for the class; PEFT has no such field.

        Raises:
            InvalidArgumentError: it is of another method than LoRA, of a kind of LoRA that is not computed here, or
                has a value that is not allowed.
            InvalidTypeError: ``config`` is neither of the two.

        Example:
            >>> LoRAConfig.from_peft({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}).lora_alpha
            8
        """
        values = config if isinstance(config, Mapping) else _fields_of(config)
        where = "the dictionary given to from_peft" if values is config else f"the {type(config).__name__} given"
        peft_fields.check_method(values, where, "Make the model with peft.get_peft_model, which computes it.")
        given = peft_fields.held(values, where, "They are left out.", stacklevel=2)
        initial = values.get("init_lora_weights", True)
        return cls(**given, init_lora_weights=initial, adapter_dtype=adapter_dtype)

    def options_of(self, name: str) -> AdapterOptions:
        """What the layer of this dotted name is made with."""
        return AdapterOptions(
            r=pattern_value(self.rank_pattern, name, self.r) if name else self.r,
            lora_alpha=pattern_value(self.alpha_pattern, name, self.lora_alpha) if name else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
            adapter_dtype=self.adapter_dtype,
            lora_bias=self.lora_bias,
            activation=self.activation,
        )

    def _check_layers(self) -> None:
        if not all(type(index) is int and index >= 0 for index in as_tuple(self.layers_to_transform)):
            raise InvalidTypeError(
                f"layers_to_transform={self.layers_to_transform!r} was given: it must be a number of a layer, such as "
                "0, or a list of such numbers."
            )
        used = self.layers_to_transform is not None or self.layers_pattern
        if used and isinstance(self.target_modules, str):
            raise InvalidArgumentError(
                f"layers_to_transform and layers_pattern were given with target_modules={self.target_modules!r}: they "
                "narrow a list of names only. Write the layers' numbers into the expression, or give a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InvalidArgumentError(
                f"layers_pattern={self.layers_pattern!r} was given without layers_to_transform, which says what "
                "numbers to take of it. Give both, or leave it out."
            )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """``value`` if it is a collection, a tuple with it if it is one thing, and an empty one for None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def plain_number(value: Any) -> Any:
    """``value``, but a scalar of NumPy's as the Python number or bool that it holds."""
    scalar = getattr(sys.modules.get("numpy"), "generic", None)
    return value.item() if scalar is not None and isinstance(value, scalar) else value


def _make_plain(config: Any) -> None:
    """Puts Python's numbers in the place of NumPy's, in the fields of a frozen dataclass."""
    for each in fields(config):
        given = getattr(config, each.name)
        inside = tuple(given.values() if isinstance(given, dict) else as_tuple(given))
        plain = tuple(map(plain_number, inside))
        if all(one is other for one, other in zip(inside, plain, strict=True)):
            continue
        several = isinstance(given, (dict, list, tuple, set, frozenset))
        values = dict(zip(given, plain, strict=True)) if isinstance(given, dict) else plain
        object.__setattr__(config, each.name, type(given)(values) if several else plain[0])


def _fields_of(config: Any) -> Mapping[str, Any]:
    """Those of a configuration of PEFT's."""
    values = config.to_dict() if hasattr(config, "peft_type") and hasattr(config, "to_dict") else None
    if not isinstance(values, Mapping):
        raise InvalidTypeError(
            f"from_peft was given an object of type {type(config).__name__}: it must be a peft.LoraConfig, or "
            "the dictionary that its to_dict() gives."
        )
    return values


def _check_names(argument: str, names: Any) -> None:
    """Raises unless ``names`` is None, a string, or a list, tuple or set of strings."""
    if names is None or isinstance(names, str):
        return
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(
            f"{argument}={names!r} was given: it must be a list of names of modules, or one regular expression."
        )


def check_modules_to_save(names: Any) -> None:
    """Raises unless ``names`` is None, or a list, tuple or set of expressions over the ends of modules' names."""
    if isinstance(names, str):
        raise InvalidTypeError(f"modules_to_save={names!r} was given: it must be a list of names of modules.")
    _check_names("modules_to_save", names)
    _check_expressions(names or (), whole_expression)


def _check_expressions(expressions: Iterable[str], within: Callable[[str], str] = str) -> None:
    """Raises unless each is a regular expression, also ``within`` the longer one that it becomes a part of."""
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidArgumentError(
                f"{expression!r} is not a regular expression ({error}); mend it, or give a list of module names."
            ) from error
        try:
            re.compile(within(expression))
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidArgumentError(
                f"{expression!r} is a regular expression that cannot be a part of a longer one ({error}): "
                "it is put behind one for the start of the name. Write flags as in (?i:name)."
            ) from error


def _check_pattern(argument: str, pattern: Any) -> None:
    """Raises unless ``pattern`` is a dictionary whose keys are strings."""
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise InvalidTypeError(
            f"{argument}={pattern!r} was given: it must be a dictionary from regular expressions over the ends of "
            f'names to numbers, such as {{"q_proj": 4}}, or {{}}.'
        )


def _shown(number: Any) -> str:
    """``number`` as it was given; Python writes out no integer of thousands of digits."""
    too_long = isinstance(number, int) and number.bit_length() > 256
    return f"an integer of {number.bit_length()} bits" if too_long else repr(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank-stabilised LoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of the dotted ``name`` as an expression, else ``default``."""
    return next((value for key, value in pattern.items() if re.match(pattern_expression(key), name)), default)


def pattern_expression(key: str) -> str:
    """What a key of ``rank_pattern`` or ``alpha_pattern`` means of a whole name, as in PEFT."""
    return rf"(.*\.)?({key})$"


def whole_expression(entry: str) -> str:
    """What an entry of ``modules_to_save`` means of a whole name: it ends so, or is within what does."""
    return rf"(^|.*\.){entry}($|\..*)"


def layer_expression(pattern: str) -> str:
    """What an entry of ``layers_pattern`` means of a whole name; ``index`` is the layer's number."""
    return rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."
