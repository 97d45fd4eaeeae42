"""``LoRAConfig``: what it accepts, and the one sentence for each value that it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_kernels import FusedLoRALinear, LoRAConfig, lora_linear, peft_fields, use_backend
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
    "alpha huge": ({"lora_alpha": 10**400}, InvalidArgumentError, ["lora_alpha=an integer of 1329 bits", "finite"]),
    "r huge": ({"r": 10**30}, InvalidArgumentError, ["r=1000", "rank"]),
    "r of thousands of digits": ({"r": 10**5000}, InvalidArgumentError, ["r=an integer of 16610 bits", "rank"]),
    "rslora a word": ({"use_rslora": "false"}, InvalidArgumentError, ["use_rslora='false'", "True or False"]),
    "dora a word": ({"use_dora": "no"}, InvalidArgumentError, ["use_dora='no'", "True or False"]),
    "rank pattern flags": ({"rank_pattern": {"(?i)q": 4}}, InvalidArgumentError, ["'(?i)q'", "(?i:name)"]),
    "alpha pattern flags": ({"alpha_pattern": {"(?i)q": 4}}, InvalidArgumentError, ["'(?i)q'", "(?i:name)"]),
    "saved with flags": ({"modules_to_save": ["(?i)head"]}, InvalidArgumentError, ["'(?i)head'", "(?i:name)"]),
    "layers with flags": (
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(?i)h"},
        InvalidArgumentError,
        ["'(?i)h'", "(?i:name)"],
    ),
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


def test_numbers_of_numpy_become_plain_ones() -> None:
    np = pytest.importorskip("numpy")
    config = LoRAConfig(
        r=np.int64(8),
        lora_alpha=np.float32(16),
        lora_dropout=np.float16(0.5),
        use_rslora=np.True_,
        lora_bias=np.False_,
        target_modules=["q"],
        rank_pattern={"q": np.int32(3)},
        alpha_pattern={"q": np.float64(0.5)},
        layers_to_transform=[np.int64(1), 2],
    )
    plain = LoRAConfig(8, 16.0, 0.5, ["q"], None, {"q": 3}, {"q": 0.5}, True, layers_to_transform=[1, 2])
    assert config == plain
    assert repr(config) == repr(plain)
    assert LoRAConfig(target_modules=["q"], layers_to_transform=np.int64(1)).layers_to_transform == 1
    for wrong in ({"r": np.float32(8)}, {"r": np.True_}, {"lora_alpha": np.float32("nan")}, {"r": np.int64(0)}):
        with pytest.raises(InvalidArgumentError):
            LoRAConfig(**wrong)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_layers_and_calls_take_numbers_of_numpy(kind: str, backend: str) -> None:
    number = getattr(pytest.importorskip("numpy"), kind)
    x, p = torch.randn(3, 8), number(0.1)
    for options in ({}, {"use_dora": True}, {"activation": "relu"}):
        layer = FusedLoRALinear(8, 6, r=number(2).astype(int), lora_alpha=number(4), **options)
        assert (type(layer.r), type(layer.lora_alpha), type(layer.scaling)) == (int, float, float)
        gradients = []
        for layer.lora_dropout in (p, float(p)):
            torch.manual_seed(0)
            with use_backend(backend):
                gradients += torch.autograd.grad(layer(x).sum(), [layer.lora_B])
        assert torch.equal(*gradients)
        tensors = x, layer.weight, layer.lora_A, layer.lora_B
        given = {"activation": layer.activation, "backend": backend}
        y = []
        for scaling, drop in ((number(2), p), (2.0, float(p))):
            torch.manual_seed(0)
            y.append(lora_linear(*tensors, scaling=scaling, dropout_p=drop, **given))
        assert torch.equal(*y)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("task_type", ["peft.LoraConfig", "leave it out", "save_adapter", "from_peft"]),
        ("inference_mode", ["leave it out", "requires_grad_(False)"]),
        ("revision", ["leave it out"]),
        ("use_qalora", ["pooled in groups", "peft.get_peft_model"]),
        ("rank", ["no such field", "r, lora_alpha, lora_dropout"]),
    ],
)
def test_a_field_that_it_lacks_is_a_sentence(name: str, words: list[str]) -> None:
    with pytest.raises(InvalidTypeError) as caught:
        LoRAConfig(**{name: None})
    assert str(caught.value).startswith(f"{name} was given to LoRAConfig")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_field_of_pefts_is_in_the_table_of_fields() -> None:
    peft = pytest.importorskip("peft")
    known = {*peft_fields.HELD, *peft_fields.KEPT, *peft_fields._REFUSED}
    assert set(peft.LoraConfig().to_dict()) <= known
    ours = set(peft_fields.HELD) | {"init_lora_weights", "adapter_dtype", "activation"}
    assert ours == set(LoRAConfig.__dataclass_fields__)


GIVEN = {
    "nothing": {},
    "all": {
        "r": 4,
        "lora_alpha": 3,
        "lora_dropout": 0.1,
        "target_modules": ["q"],
        "exclude_modules": ["1.q"],
        "rank_pattern": {"q": 2},
        "alpha_pattern": {"q": 5},
        "use_rslora": True,
        "bias": "all",
        "init_lora_weights": "pissa_niter_4",
        "modules_to_save": ["head"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    },
    "DoRA": {"use_dora": True, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_configuration_of_pefts_is_taken_over(name: str) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(**GIVEN[name])
    ours = LoRAConfig.from_peft(theirs, adapter_dtype=torch.bfloat16)
    for each in [*peft_fields.HELD, "init_lora_weights"]:
        assert getattr(ours, each) == getattr(theirs, each), each
    assert ours.adapter_dtype == torch.bfloat16
    assert LoRAConfig.from_peft(theirs.to_dict()) == replace(ours, adapter_dtype=None)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"peft_type": "IA3"}, InvalidArgumentError, ["peft_type='IA3'", "LoRA only", "get_peft_model"]),
        ({"peft_type": "LORA", "use_qalora": True}, InvalidArgumentError, ["use_qalora", "QA-LoRA"]),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, InvalidArgumentError, ["'eva'", "sample data"]),
        ({"r": 3}, InvalidArgumentError, ["no peft_type"]),
        (3, InvalidTypeError, ["type int", "peft.LoraConfig"]),
    ],
)
def test_what_it_cannot_say_is_refused(given: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        LoRAConfig.from_peft(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_field_of_pefts_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"does not know: from_the_future\. They are left out") as caught:
        LoRAConfig.from_peft({"peft_type": "LORA", "from_the_future": 1, "unset": None})
    assert caught[0].filename == __file__
