"""``LoRAConfig``: what it accepts, and the one sentence for each value that it does not."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import LoRAConfig
from lora_kernels.config import pattern_value, scaling_of
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsError

REFUSED = {
    "r zero": ({"r": 0}, InvalidArgumentError, ["r=0", "at least 1"]),
    "r negative": ({"r": -3}, InvalidArgumentError, ["r=-3", "at least 1"]),
    "r float": ({"r": 4.0}, InvalidArgumentError, ["r=4.0", "integer"]),
    "r bool": ({"r": True}, InvalidArgumentError, ["r=True", "integer"]),
    "alpha negative": ({"lora_alpha": -1}, InvalidArgumentError, ["lora_alpha=-1", "not negative"]),
    "alpha nan": ({"lora_alpha": float("nan")}, InvalidArgumentError, ["lora_alpha=nan", "finite"]),
    "alpha inf": ({"lora_alpha": float("inf")}, InvalidArgumentError, ["lora_alpha=inf", "finite"]),
    "alpha string": ({"lora_alpha": "16"}, InvalidArgumentError, ["lora_alpha='16'", "number"]),
    "dropout one": ({"lora_dropout": 1.0}, InvalidArgumentError, ["lora_dropout=1.0", "[0, 1)"]),
    "dropout negative": ({"lora_dropout": -0.1}, InvalidArgumentError, ["lora_dropout=-0.1", "[0, 1)"]),
    "dropout nan": ({"lora_dropout": float("nan")}, InvalidArgumentError, ["lora_dropout=nan", "[0, 1)"]),
    "bias": ({"bias": "some"}, InvalidArgumentError, ["bias='some'", "lora_only"]),
    "init": ({"init_lora_weights": "kaiming"}, InvalidArgumentError, ["'kaiming'", "gaussian", "pissa_niter_N"]),
    "adapter dtype": ({"adapter_dtype": torch.int32}, InvalidTypeError, ["torch.int32", "float32"]),
    "adapter dtype name": ({"adapter_dtype": "float32"}, InvalidTypeError, ["'float32'", "torch.float32"]),
    "targets not a regex": (
        {"target_modules": "*.q_proj"},
        InvalidArgumentError,
        ["'*.q_proj'", "list of module names"],
    ),
    "excludes not a regex": ({"exclude_modules": "(a"}, InvalidArgumentError, ["'(a'", "regular expression"]),
    "rank pattern key": ({"rank_pattern": {"(": 4}}, InvalidArgumentError, ["'('", "regular expression"]),
    "rank pattern value": ({"rank_pattern": {"q": 0}}, InvalidArgumentError, ["r=0", "at least 1"]),
    "alpha pattern value": ({"alpha_pattern": {"q": -1.0}}, InvalidArgumentError, ["lora_alpha=-1.0"]),
    "rank pattern none": ({"rank_pattern": None}, InvalidTypeError, ["rank_pattern=None", "dictionary"]),
    "alpha pattern key": ({"alpha_pattern": {3: 4.0}}, InvalidTypeError, ["alpha_pattern={3: 4.0}", "expressions"]),
    "targets a number": ({"target_modules": 3}, InvalidTypeError, ["target_modules=3", "list of names"]),
    "targets of numbers": ({"target_modules": ["q", 3]}, InvalidTypeError, ["target_modules=['q', 3]", "names"]),
    "bias of B with DoRA": ({"lora_bias": True, "use_dora": True}, InvalidArgumentError, ["use_dora=True"]),
    "bias of B no bool": ({"lora_bias": "all"}, InvalidArgumentError, ["lora_bias='all'"]),
    "saved a name": ({"modules_to_save": "head"}, InvalidTypeError, ["modules_to_save='head'", "list"]),
    "saved not a regex": ({"modules_to_save": ["("]}, InvalidArgumentError, ["'('", "regular expression"]),
    "layers a name": ({"layers_to_transform": ["1"]}, InvalidTypeError, ["layers_to_transform=['1']", "number"]),
    "layers of a regex": (
        {"target_modules": ".*", "layers_to_transform": 1},
        InvalidArgumentError,
        ["target_modules='.*'", "list"],
    ),
    "pattern without layers": ({"layers_pattern": "h"}, InvalidArgumentError, ["'h'", "layers_to_transform"]),
    "excludes a number": ({"exclude_modules": 3}, InvalidTypeError, ["exclude_modules=3", "names"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_is_not_allowed_is_one_sentence(name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        LoRAConfig(**arguments)
    assert isinstance(caught.value, LoRAKernelsError)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_errors_are_also_value_and_type_errors() -> None:
    with pytest.raises(ValueError, match="rank"):
        LoRAConfig(r=0)
    with pytest.raises(TypeError, match="adapter_dtype"):
        LoRAConfig(adapter_dtype=torch.bool)


def test_the_fields_have_pefts_names() -> None:
    peft = pytest.importorskip("peft")
    ours = set(LoRAConfig.__dataclass_fields__) - {"adapter_dtype", "activation"}
    assert ours <= set(peft.LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 2.0), (True, 4.0)])
def test_scaling(rslora: bool, expected: float) -> None:
    assert scaling_of(4, 8, rslora) == expected


def test_a_pattern_matches_the_end_of_a_name_and_the_first_key_wins() -> None:
    pattern = {r"layers\.1\.q_proj": 1, "q_proj": 2, "q": 3, r"layers\.\d+\.v_proj": 4}
    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "xq_proj", "layers.3.v_proj", "v_proj", "a.q"]
    assert [pattern_value(pattern, name, 0) for name in names] == [1, 2, 2, 0, 4, 0, 3]
