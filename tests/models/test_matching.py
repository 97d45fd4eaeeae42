"""Which modules a configuration names: our rules against PEFT's own, and the output head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.models.matching import close_names, find_matches, name_matches, output_heads, selects
from random_examples import examples

SELECTIONS = [
    ["q_proj"],
    ("q_proj", "v_proj"),
    {"mlp.fc1"},
    ["layers.0.attn.q_proj"],
    ["proj"],
    ["head", "layers.1"],
    r".*\.(q|v)_proj",
    r"layers\.0\..*",
    "q_proj",
    r"head|.*fc\d",
    r".*",
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "act": nn.ReLU(), "fc2": nn.Linear(8, 4)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.q_proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


class Headed(Model):
    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Classifier(Model):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 2)

    def get_output_embeddings(self) -> None:
        return None


def matched(model: nn.Module, **arguments: object) -> list[str]:
    return [match.name for match in find_matches(model, LoRAConfig(**arguments)) if match.excluded is None]


@pytest.mark.parametrize("exclude", [None, ["v_proj"], ["layers.0.attn.q_proj", "head"], r"layers\.1\..*"])
@pytest.mark.parametrize("target", SELECTIONS, ids=str)
def test_names_match_as_in_peft(target: object, exclude: object) -> None:
    peft = pytest.importorskip("peft")
    utilities = pytest.importorskip("peft.tuners.tuners_utils")
    config = peft.LoraConfig(
        target_modules=list(target) if isinstance(target, tuple) else target, exclude_modules=exclude
    )
    names = [name for name, _ in Model().named_modules() if name]
    expected = [name for name in names if utilities.check_target_module_exists(config, name)]
    assert matched(Model(), target_modules=target, exclude_modules=exclude) == expected


@pytest.mark.parametrize("word", ["all-linear", "ALL-LINEAR"])
def test_all_linear_leaves_the_output_head_out(word: str) -> None:
    linears = [name for name, module in Model().named_modules() if isinstance(module, nn.Linear)]
    assert matched(Model(), target_modules=word) == linears
    assert matched(Headed(), target_modules=word) == [name for name in linears if name != "head"]
    assert matched(Classifier(), target_modules=word) == linears
    assert output_heads(nn.Sequential(Headed())) != set()


def test_the_head_of_a_wrapped_model_is_found() -> None:
    model = nn.DataParallel(Headed())
    assert output_heads(model) == {model.module.head}


def test_exclude_wins_and_is_remembered() -> None:
    matches = find_matches(Model(), LoRAConfig(target_modules=["q_proj"], exclude_modules=["layers.0.attn.q_proj"]))
    assert {match.name: match.excluded for match in matches} == {
        "layers.0.attn.q_proj": "layers.0.attn.q_proj",
        "layers.1.attn.q_proj": None,
        "q_proj": None,
    }


def test_a_shared_module_is_one_match_with_all_of_its_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    (match,) = find_matches(model, LoRAConfig(target_modules=["b.0"]))
    assert (match.name, match.places, match.module) == ("b.0", ("a", "b.0"), shared)


@pytest.mark.parametrize("target", [None, [], ""])
def test_no_targets_is_a_sentence(target: object) -> None:
    with pytest.raises(InvalidArgumentError, match="all-linear"):
        find_matches(Model(), LoRAConfig(target_modules=target))


LAYERS = [
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1]},
    {"layers_to_transform": [], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0], "layers_pattern": ["blocks", r"lay\w+"]},
    {"layers_to_transform": [3], "layers_pattern": "experts"},
]


@pytest.mark.parametrize("modules_to_save", [None, ["head"], ["q_proj"], [r"layers\.0"]], ids=str)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_layers_are_picked_as_in_peft(layers: dict[str, object], modules_to_save: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    utilities = pytest.importorskip("peft.tuners.tuners_utils")
    arguments = {"target_modules": ["q_proj", "up", "model.layers.0.q_proj"], "modules_to_save": modules_to_save}
    theirs, ours = peft.LoraConfig(**arguments, **layers), LoRAConfig(**arguments, **layers)
    names = [
        f"{start}layers.{i}.{end}" for start in ("", "model.", "a.b.") for i in (0, 1, 11) for end in ("q_proj", "k")
    ]
    names += [
        "head",
        "head.q_proj",
        "model.layers.0.experts.3.up",
        "model.blocks.0.q_proj",
        "h.1.up",
        "a.layers.0.layers.1.q_proj",
    ]
    chosen = {name for name in names if selects(ours, name)}
    assert chosen == {name for name in names if utilities.check_target_module_exists(theirs, name)}


def test_close_names() -> None:
    assert close_names("Q_PROJ", Model())[0] == "q_proj"
    assert close_names("layers.0.attn.qproj", Model())[0] == "layers.0.attn.q_proj"
    assert close_names("zzz", Model()) == []


def test_a_name_is_no_pattern_and_a_pattern_no_name() -> None:
    assert not name_matches(["q.proj"], "q_proj")
    assert name_matches("q.proj", "q_proj")
    assert not name_matches(["_proj"], "q_proj")
    assert not name_matches([], "q_proj")


PARTS = st.lists(st.sampled_from(["a", "b", "ab", "q_proj", "0", "1"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.lists(st.sampled_from(["a", "b", ".", "q_proj", ".*", r"\.", "0", "|"]), min_size=1, max_size=5).map(
    "".join
)


@examples(200)
@given(PARTS, st.lists(PARTS, min_size=1, max_size=3) | PATTERNS, st.none() | st.lists(PARTS, max_size=2) | PATTERNS)
def test_any_name_matches_as_in_peft(name: str, target: list[str] | str, exclude: list[str] | str | None) -> None:
    peft = pytest.importorskip("peft")
    theirs = pytest.importorskip("peft.tuners.tuners_utils").check_target_module_exists
    expected = bool(theirs(peft.LoraConfig(target_modules=target, exclude_modules=exclude), name))
    excluded = bool(exclude) and name_matches(exclude, name)
    assert (name_matches(target, name) and not excluded) == expected


LLAMA_SELECTIONS = [
    (["q_proj", "v_proj"], None),
    ("all-linear", None),
    ("all-linear", ["k_proj", "model.layers.0.mlp.up_proj"]),
    (r".*\.layers\.1\..*_proj", None),
    (r".*\.(gate|up)_proj", r".*\.0\..*"),
    (["lm_head", "o_proj"], None),
]


@pytest.mark.parametrize(("target", "exclude"), LLAMA_SELECTIONS, ids=str)
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_a_llama_is_matched_as_peft_does(kind: str, target: object, exclude: object) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    ours = matched(model, target_modules=target, exclude_modules=exclude)
    task = "SEQ_CLS" if "Classification" in kind else None
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=target, exclude_modules=exclude, task_type=task), model, low_cpu_mem_usage=True
    )
    lora = peft.tuners.lora.Linear
    assert ours == [name for name, module in theirs.named_modules() if isinstance(module, lora)]
    assert not {"lm_head", "score"} & set(ours) or target != "all-linear"
