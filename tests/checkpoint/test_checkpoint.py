"""``save_adapter`` and ``load_adapter`` on a plain model: what is carried, and what is refused with a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_kernels
from lora_kernels import LoRAConfig, load_adapter, replace_linear, save_adapter
from lora_kernels.checkpoint.files import CONFIG, WEIGHTS, read_pair
from lora_kernels.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    LoRAKernelsError,
    LoRAKernelsWarning,
    LoRAStateError,
)
from lora_kernels.models.model import lora_layers
from made_models import Net, Snapshot, disturb, refused, tied
from numerics import same_bits

safetensors = pytest.importorskip("safetensors.torch")

PREFIX = "base_model.model."


def adapted(model: nn.Module | None = None, **arguments: Any) -> nn.Module:
    model = Net() if model is None else model
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["up"], "init_lora_weights": False, **arguments}
    replace_linear(model, LoRAConfig(**config))
    return model


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return fields


def set_field(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda path: (path / CONFIG).write_text(json.dumps({**fields_of(path), name: value}))


def set_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        tensors = safetensors.load_file(path / WEIGHTS)
        change(tensors)
        safetensors.save_file(tensors, path / WEIGHTS)

    return edit


def cut(count: int) -> Callable[[Path], Any]:
    return lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:count])


FIRST = f"{PREFIX}blocks.0.up"
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], list[str]]] = {
    "no configuration": (lambda p: (p / CONFIG).unlink(), InvalidArgumentError, ["has no adapter_config.json"]),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), InvalidArgumentError, ["has no adapter_model.safetensors"]),
    "pickled": (
        lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"),
        InvalidArgumentError,
        ["adapter_model.bin", "a pickle", "weights_only=True", "save_file"],
    ),
    "empty": (cut(0), InvalidArgumentError, ["cannot be read", "truncated"]),
    "header cut": (cut(40), InvalidArgumentError, ["cannot be read", "truncated"]),
    "tensors cut": (cut(-5), InvalidArgumentError, ["cannot be read", "truncated"]),
    "no JSON": (lambda p: (p / CONFIG).write_text("{"), InvalidArgumentError, ["is not JSON"]),
    "JSON too deep": (lambda p: (p / CONFIG).write_text("[" * 100_000), InvalidArgumentError, ["is not JSON", "deep"]),
    "no text": (lambda p: (p / CONFIG).write_bytes(b"\xff\xfe\x00"), InvalidArgumentError, ["is not JSON"]),
    "flags": (set_field("alpha_pattern", {"(?i)up": 4}), InvalidArgumentError, ["'(?i)up'", "(?i:name)"]),
    "alpha without end": (set_field("lora_alpha", 10**400), InvalidArgumentError, ["lora_alpha", "finite"]),
    "DoRA as a word": (set_field("use_dora", "false"), InvalidArgumentError, ["use_dora='false'", "True or False"]),
    "a list": (lambda p: (p / CONFIG).write_text("[]"), InvalidArgumentError, ["list", "object"]),
    "IA3": (set_field("peft_type", "IA3"), InvalidArgumentError, ["'IA3'", "scales activations", "not LoRA"]),
    "prefix": (set_field("peft_type", "PREFIX_TUNING"), InvalidArgumentError, ["prefix tuning", "not LoRA"]),
    "yet unknown": (set_field("peft_type", "NEXT"), InvalidArgumentError, ["'NEXT'", "another method"]),
    "no method": (set_field("peft_type", None), InvalidArgumentError, ["no peft_type"]),
    "a variant": (set_field("use_bdlora", {"a": 1}), InvalidArgumentError, ["use_bdlora", "block-diagonal"]),
    "PiSSA": (set_field("init_lora_weights", "pissa_niter_4"), InvalidArgumentError, ["pissa_niter_4", "base weights"]),
    "r": (set_field("r", 0), InvalidArgumentError, ["adapter_config.json", "r=0"]),
    "r as text": (set_field("r", "2"), InvalidArgumentError, ["adapter_config.json", "r='2'"]),
    "a pattern": (set_field("rank_pattern", [1]), InvalidArgumentError, ["adapter_config.json"]),
    "more targets": (
        set_field("target_modules", ["up", "down"]),
        InvalidArgumentError,
        ["'blocks.0.down'", "no adapter"],
    ),
    "fewer targets": (set_field("target_modules", ["0.up"]), InvalidArgumentError, ["'blocks.1.up'", "does not name"]),
    "another rank": (set_field("r", 3), InvalidArgumentError, ["lora_A (2, 8)", "(3, 8)", "'blocks.0.up'"]),
    "DoRA that is not there": (set_field("use_dora", True), InvalidArgumentError, ["no lora_magnitude_vector"]),
    "a bias that is not there": (set_field("lora_bias", True), InvalidArgumentError, ["no lora_B.bias"]),
    "a head that is not there": (set_field("modules_to_save", ["head"]), InvalidArgumentError, ["'head.weight'"]),
    "no B": (set_tensors(lambda t: t.pop(f"{FIRST}.lora_B.weight")), InvalidArgumentError, ["no lora_B.weight"]),
    "DoRA that is too much": (
        set_tensors(lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(12)})),
        InvalidArgumentError,
        ["a lora_magnitude_vector that"],
    ),
    "another model": (
        set_tensors(lambda t: t.update({f"{PREFIX}blocks.7.up.lora_A.weight": torch.ones(2, 8)})),
        InvalidArgumentError,
        ["'blocks.7.up'", "no such module", "'blocks.0.up'"],
    ),
    "a wider model": (
        set_tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 9)})),
        InvalidArgumentError,
        ["(2, 9)", "8 -> 12"],
    ),
    "integers": (
        set_tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)})),
        InvalidTypeError,
        ["torch.int32"],
    ),
    "an embedding's": (
        set_tensors(lambda t: t.update({f"{PREFIX}embed.lora_A.weight": torch.ones(2, 10)})),
        InvalidTypeError,
        ["'embed'", "a torch.nn.modules.sparse.Embedding", "plain model"],
    ),
    "a diagonal": (
        set_tensors(lambda t: t.update({f"{FIRST}.lora_diag": torch.ones(2)})),
        InvalidArgumentError,
        ["'blocks.0.up.lora_diag'", "no embeddings or variants"],
    ),
    "another vocabulary": (
        set_tensors(lambda t: t.update({f"{PREFIX}embed.weight": torch.ones(11, 8)})),
        InvalidArgumentError,
        ["embed.weight (11, 8)", "(10, 8)"],
    ),
    "a name without the prefix": (
        set_tensors(lambda t: t.update({"blocks.0.up.lora_A.weight": torch.ones(1, 1)})),
        InvalidArgumentError,
        [f"{FIRST}.lora_A.weight", "'blocks.0.up.lora_A.weight'", "both mean"],
    ),
    "a name of ours": (
        set_tensors(lambda t: t.update({f"{PREFIX}blocks.0.up.lora_A": torch.ones(2, 8)})),
        InvalidArgumentError,
        ["'blocks.0.up.lora_A'", "part of an adapter"],
    ),
    "no LoRA": (
        set_tensors(lambda t: (t.clear(), t.update({f"{PREFIX}head.weight": torch.ones(10, 8)}))),
        InvalidArgumentError,
        ["no tensors of a LoRA layer"],
    ),
}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_loaded_is_a_sentence_and_nothing_changes(name: str, replaced: bool, tmp_path: Path) -> None:
    damage, error, words = DAMAGES[name]
    save_adapter(adapted(), tmp_path)
    damage(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    refused(adapted() if replaced else Net(), lambda model: load_adapter(model, tmp_path), error, *words)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class Counting(Net):
    """It has buffers of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("value", [torch.tensor([1, 300]), torch.tensor([-1, 0]), torch.tensor([2j, 1])])
def test_numbers_that_a_buffer_cannot_hold_are_refused(value: Tensor, tmp_path: Path) -> None:
    save_adapter(adapted(Counting()), tmp_path)
    set_tensors(lambda t: t.update({f"{PREFIX}count": value}))(tmp_path)
    refused(Counting(), lambda m: load_adapter(m, tmp_path), InvalidTypeError, str(value.dtype), "torch.uint8")


def test_values_in_fp8_are_taken_into_an_fp32_model(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, modules_to_save=["head"])
    set_tensors(lambda t: t.update({f"{PREFIX}head.weight": torch.full((10, 8), 1.5).to(torch.float8_e4m3fn)}))(
        tmp_path
    )
    load_adapter(model := Net(), tmp_path)
    assert torch.equal(model.head.weight, torch.full((10, 8), 1.5))


def expanded(model: nn.Module) -> nn.Module:
    """With a Parameter that comes late, and whose elements are one number."""
    model.head.weight = nn.Parameter(torch.ones(1, 8).expand(10, 8))
    return model


@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_that_cannot_be_written_is_left_as_it_was(replaced: bool, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, modules_to_save=["head"])
    load = lambda model: load_adapter(model, tmp_path)  # noqa: E731
    refused(expanded(adapted() if replaced else Net()), load, LoRAStateError, "head.weight was expanded", "clone")
    with torch.inference_mode():
        model = adapted() if replaced else Net()
    refused(model, load, LoRAStateError, "torch.inference_mode", "torch.no_grad")


def with_buffer(value: Any) -> nn.Module:
    model = adapted()
    model.head.register_buffer("extra", value)
    return model


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 1}


@pytest.mark.parametrize("name", ["sparse", "complex128", "complex32", "mkldnn"])
def test_tensors_that_no_safetensors_file_holds_are_a_sentence(name: str, tmp_path: Path) -> None:
    kinds = {"sparse": lambda t: t.to_sparse(), "mkldnn": lambda t: t.to_mkldnn()}
    value = kinds.get(name, lambda t: t.to(getattr(torch, name)))(torch.ones(2, 2))
    save = lambda model: save_adapter(model, tmp_path / "new", modules_to_save=["head"])  # noqa: E731
    with pytest.raises(LoRAStateError, match=r"head\.extra is a tensor of .*, which a safetensors file cannot hold"):
        save(with_buffer(value))
    assert not (tmp_path / "new").exists()


def test_extra_state_that_is_no_tensor_is_a_sentence(tmp_path: Path) -> None:
    model = adapted()
    model.head = Extra(8, 10)
    refused(
        model,
        lambda m: save_adapter(m, tmp_path, modules_to_save=["head"]),
        LoRAStateError,
        "head._extra_state",
        "dict",
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"modules_to_save": ["("]}, "'('"),
        ({"modules_to_save": ["head", "haed"]}, "'haed'"),
        ({"modules_to_save": [1]}, "=[1]"),
        ({"task_type": 1}, "task_type=1"),
    ],
)
def test_arguments_that_saving_cannot_take_are_a_sentence(arguments: dict[str, Any], word: str, tmp_path: Path) -> None:
    refused(adapted(), lambda m: save_adapter(m, tmp_path / "new", **arguments), LoRAKernelsError, word)
    assert not (tmp_path / "new").exists()


def test_no_folder_and_a_folder_of_adapters_are_sentences(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "mine")
    refused(Net(), lambda model: load_adapter(model, tmp_path), InvalidArgumentError, "its folders 'mine'")
    refused(
        Net(), lambda model: load_adapter(model, "org/name"), InvalidArgumentError, "'org/name'", "snapshot_download"
    )
    refused(Net(), lambda model: load_adapter(model, None), InvalidTypeError, "None", "pathlib.Path")
    refused(adapted(), lambda model: save_adapter(model, 3), InvalidTypeError, "3", "pathlib.Path")
    refused(adapted(), lambda model: save_adapter(model, "a\0b"), InvalidArgumentError, "null character")


def test_models_that_an_adapter_cannot_be_put_onto(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    load = lambda model: load_adapter(model, tmp_path)  # noqa: E731
    merged, meta, frozen = adapted(), Net(), adapted()
    lora_kernels.merge_lora(merged)
    meta.blocks[1]["up"].to("meta")
    refused(merged, load, LoRAStateError, "'blocks.0.up' is merged", "unmerge_lora")
    refused(meta, load, LoRAStateError, "blocks.1.up.weight", "meta device")
    refused(adapted(r=3), load, InvalidArgumentError, "r=3", "r=2", "restore_linear")
    refused(adapted(use_dora=True), load, InvalidArgumentError, "lora_magnitude_vector")
    refused(adapted(target_modules=["up", "head"]), load, LoRAStateError, "'head' has an adapter")
    refused(3, load, InvalidTypeError, "int")
    refused(frozen.blocks[0]["up"], load, InvalidArgumentError, "no such module")


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    save = lambda model: save_adapter(model, tmp_path / "adapter")  # noqa: E731
    mixed, meta, pruned = adapted(), adapted(), adapted()
    prune.l1_unstructured(pruned.blocks[0]["up"], "lora_A", amount=1)
    mixed.blocks[1]["up"].lora_dropout = 0.5
    meta.blocks[1]["up"].to("meta")
    refused(Net(), save, LoRAStateError, "save_adapter", "replace_linear")
    refused(pruned, save, LoRAStateError, "blocks.0.up.lora_A_orig", "prune.remove")
    refused(mixed, save, LoRAStateError, "'blocks.0.up' and 'blocks.1.up' differ in lora_dropout")
    refused(meta, save, LoRAStateError, "blocks.1.up.lora_A.weight", "meta device")
    refused(adapted().blocks[0]["up"], save, LoRAStateError, "a LoRA layer itself")
    whole = lambda model: save_adapter(model, tmp_path / "adapter", modules_to_save=["blocks"])  # noqa: E731
    refused(adapted(), whole, LoRAStateError, "'blocks'", "holds LoRA layers")
    other = lambda model: save_adapter(model, tmp_path / "adapter", bias="some")  # noqa: E731
    refused(adapted(), other, InvalidArgumentError, "bias='some'")
    refused(adapted(tied(), modules_to_save=["head"]), save, LoRAStateError, "embed.weight", "Name that module")
    assert not (tmp_path / "adapter").exists()


def test_sharded_layers_are_saved_whole_and_not_loaded_into(tmp_path: Path) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = adapted()
    save_adapter(model, tmp_path / "whole")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        parallelize_module(model, mesh, {"blocks.0.up": ColwiseParallel()})
        save_adapter(model, tmp_path / "adapter")
        with pytest.raises(LoRAStateError, match=r"blocks.0.up.lora_A is on the meta device or sharded"):
            load_adapter(model, tmp_path / "whole")
    finally:
        torch.distributed.destroy_process_group()
    left, right = (safetensors.load_file(tmp_path / name / WEIGHTS) for name in ("whole", "adapter"))
    assert left.keys() == right.keys()
    assert all(same_bits(left[name], right[name]) for name in left)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"down": 5}, "alpha_pattern": {"^head": 1}},
    "rsLoRA, dropout": {"use_rslora": True, "lora_dropout": 0.25},
    "DoRA": {"use_dora": True},
    "bias of B": {"lora_bias": True, "bias": "lora_only"},
    "half": {"adapter_dtype": torch.bfloat16, "bias": "all"},
    "head": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_saved_is_loaded_bit_for_bit(name: str, replaced: bool, tmp_path: Path) -> None:
    plain = Net()
    model = adapted(copy.deepcopy(plain), **OPTIONS[name])
    lora_kernels.mark_only_lora_as_trainable(model, OPTIONS[name].get("bias", "none"))
    save_adapter(disturb(model), tmp_path)
    other = adapted(plain, **OPTIONS[name]) if replaced else plain
    parameters, drawn = dict(other.named_parameters()), torch.random.get_rng_state()
    report = load_adapter(other, tmp_path, adapter_dtype=OPTIONS[name].get("adapter_dtype"))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(other.get_parameter(name) is parameter for name, parameter in parameters.items())
    loaded, layers = other.state_dict(), list(lora_layers(model))
    assert all(same_bits(loaded[key], value) for key, value in model.state_dict().items())
    assert [layer.extra_repr() for _, layer in lora_layers(other)] == [layer.extra_repr() for _, layer in layers]
    assert [(layer.name, layer.r, layer.scaling) for layer in report] == [
        (n, layer.r, layer.scaling) for n, layer in layers
    ]


def test_what_a_loaded_adapter_trains(tmp_path: Path) -> None:
    save_adapter(adapted(bias="lora_only", modules_to_save=["head"]), tmp_path)
    model = Net().requires_grad_(False)
    report = load_adapter(model, tmp_path)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"head.weight"} | {f"blocks.{i}.up.{own}" for i in (0, 1) for own in ("lora_A", "lora_B", "bias")}
    assert set(report.others) == {"head.weight"} | {f"blocks.{i}.up.base_layer.bias" for i in (0, 1)}
    assert "loaded 3 other tensors: " in str(report)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return set_tensors(lambda tensors: [tensors.update({change(key): tensors.pop(key)}) for key in list(tensors)])


WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel around PEFT": lambda key: f"module.{key}",
    "DistributedDataParallel within PEFT": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "compiled within PEFT": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled around PEFT": lambda key: f"_orig_mod.{key}",
    "both around PEFT": lambda key: f"module._orig_mod.{key}",
    "compiled blocks": lambda key: key.replace("blocks.0.", "blocks.0._orig_mod."),
    "checkpointed blocks": lambda key: key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight") if ".lora_" in key else key,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_of_wrappers_and_of_the_adapter_are_read_over(name: str, tmp_path: Path) -> None:
    plain = Net()
    model = adapted(copy.deepcopy(plain), bias="lora_only", modules_to_save=["head"])
    save_adapter(disturb(model), tmp_path)
    before = set(safetensors.load_file(tmp_path / WEIGHTS))
    renamed(WRAPPED[name])(tmp_path)
    assert set(safetensors.load_file(tmp_path / WEIGHTS)) != before
    load_adapter(plain, tmp_path)
    loaded = plain.state_dict()
    assert all(same_bits(loaded[key], value) for key, value in model.state_dict().items() if "lora_" in key)
    assert same_bits(loaded["head.weight"], model.state_dict()["head.weight"])


def test_a_child_called_module_keeps_its_name(tmp_path: Path) -> None:
    plain = nn.ModuleDict({"module": Net()})
    model = adapted(copy.deepcopy(plain))
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert len(list(lora_layers(plain))) == 2


AMBIGUOUS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "twice": (
        lambda t: t.update({f"{PREFIX}_orig_mod.blocks.0.up.lora_A.weight": torch.zeros(2, 8)}),
        ["'base_model.model._orig_mod.blocks.0.up.lora_A.weight'", "both mean", "one of the two"],
    ),
    "two adapters": (
        lambda t: [
            t.update({key.replace(".weight", f".{who}.weight"): t[key].clone() for who in ("old", "new")}) or t.pop(key)
            for key in list(t)
        ],
        ["'new', 'old'", "one is loaded at a time"],
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_that_mean_one_thing_twice_are_refused(name: str, tmp_path: Path) -> None:
    change, words = AMBIGUOUS[name]
    save_adapter(adapted(), tmp_path)
    set_tensors(change)(tmp_path)
    refused(Net(), lambda model: load_adapter(model, tmp_path), InvalidArgumentError, *words)


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_a_loaded_adapter_is_never_narrower_than_fp32_unless_asked(
    base: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    save_adapter(adapted(adapter_dtype=stored), tmp_path)
    for asked in (None, torch.float16):
        model = Net().to(base)
        load_adapter(model, tmp_path, adapter_dtype=asked)
        widest = max((base, stored, torch.float32), key=lambda dtype: dtype.itemsize)
        assert {layer.lora_A.dtype for _, layer in lora_layers(model)} == {asked or widest}
    refused(Net(), lambda m: load_adapter(m, tmp_path, adapter_dtype=torch.int8), InvalidTypeError, "adapter_dtype")


def test_unknown_fields_are_warned_of_once_kept_and_written_back(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    for name in ("from_the_future", "another"):
        set_field(name, {"deep": [1]})(tmp_path)
    model = Net()
    with pytest.warns(UserWarning, match=r"does not know: another, from_the_future\. They are kept") as caught:
        load_adapter(model, tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    save_adapter(model, tmp_path / "again")
    assert fields_of(tmp_path / "again") == fields_of(tmp_path)


def test_a_configuration_that_says_little_has_pefts_defaults(tmp_path: Path) -> None:
    save_adapter(adapted(r=8, lora_alpha=8), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["up"]}))
    model = Net()
    load_adapter(model, tmp_path)
    assert {(layer.r, layer.scaling) for _, layer in lora_layers(model)} == {(8, 1.0)}


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list": ({"target_modules": ("up",)}, {"target_modules": ["up"]}),
    "an expression": ({"target_modules": r".*\.up"}, {"target_modules": r".*\.up"}),
    "excluded": ({"target_modules": ["up", "head"], "exclude_modules": ["head"]}, {"exclude_modules": ["head"]}),
    "layers": (
        {"target_modules": ["up", "down"], "layers_to_transform": 1, "layers_pattern": "blocks"},
        {"target_modules": ["up", "down"], "layers_to_transform": 1, "layers_pattern": "blocks"},
    ),
    "all-linear": ({"target_modules": "all-linear", "exclude_modules": ["head", "up"]}, {"exclude_modules": None}),
    "patterns": ({"rank_pattern": {"1.up": 3}}, {"r": 2, "rank_pattern": {"1.up": 3}}),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_that_chose_the_layers_is_kept(name: str, tmp_path: Path) -> None:
    arguments, expected = RULES[name]
    save_adapter(adapted(**arguments), tmp_path)
    fields = fields_of(tmp_path)
    assert {key: fields[key] for key in expected} == expected
    if name == "all-linear":
        assert fields["target_modules"] == ["blocks.0.down", "blocks.1.down"]


def test_layers_that_no_rule_gives_are_named_one_by_one(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})})

    model, other = nested(), nested()
    replace_linear(model, LoRAConfig(r=2, target_modules=["a"], exclude_modules=["b.a"]))
    replace_linear(model, LoRAConfig(r=3, target_modules=["c"]))
    save_adapter(model, tmp_path)
    assert fields_of(tmp_path)["target_modules"] == r"a|b\.c"  # as a list, "a" would mean b.a too
    load_adapter(other, tmp_path)
    assert [(name, layer.r) for name, layer in lora_layers(other)] == [("a", 2), ("b.c", 3)]


def test_a_scaling_that_was_set_is_carried(tmp_path: Path) -> None:
    model, other = adapted(use_rslora=True), Net()
    model.blocks[0]["up"].scaling = 0.3
    model.blocks[1]["up"].use_rslora = False
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert [layer.scaling for _, layer in lora_layers(other)] == [layer.scaling for _, layer in lora_layers(model)]


def test_a_layer_that_is_replaced_already_takes_the_adapters_settings(tmp_path: Path) -> None:
    save_adapter(adapted(lora_alpha=6, lora_dropout=0.25), tmp_path)
    model = adapted(lora_alpha=5, use_rslora=True)
    load_adapter(model, tmp_path)
    layers = [layer for _, layer in lora_layers(model)]
    assert {(layer.scaling, layer.lora_alpha, layer.use_rslora, layer.lora_dropout) for layer in layers} == {
        (3.0, 6, False, 0.25)
    }


def test_merged_layers_are_saved_as_they_were(tmp_path: Path) -> None:
    model = adapted(lora_bias=True, bias="lora_only")
    save_adapter(model, tmp_path / "before")
    lora_kernels.merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    before, merged = read_pair(tmp_path / "before"), read_pair(tmp_path / "merged")
    assert merged[0] == before[0]
    assert all(torch.equal(merged[1][key], tensor) for key, tensor in before[1].items())


def test_a_shared_layer_is_saved_once_and_loaded_at_all_places(tmp_path: Path) -> None:
    def shared() -> nn.Module:
        torch.manual_seed(5)
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, other = adapted(shared(), target_modules=["0"]), shared()
    with pytest.warns(UserWarning, match="'0' also stands at '2'.*PEFT adapts the first place alone"):
        save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert other[0] is other[2]
    assert torch.equal(other(torch.ones(8)), model(torch.ones(8)))


def test_tied_modules_that_are_saved_whole_stay_tied_where_their_values_agree(tmp_path: Path) -> None:
    model, other = adapted(tied(), modules_to_save=["head", "embed"]), tied()
    save_adapter(model, tmp_path)
    assert load_adapter(other, tmp_path).notes == ()
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.head.weight)
    apart, again = adapted(modules_to_save=["head", "embed"]), tied()
    save_adapter(apart, tmp_path)
    assert len(load_adapter(again, tmp_path).notes) == 2
    assert torch.equal(again.head.weight, apart.head.weight)
    assert torch.equal(again.embed.weight, apart.embed.weight)


def test_a_wrapped_model_is_saved_and_loaded_under_its_own_names(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path)
    assert all(key.startswith(f"{PREFIX}blocks.") for key in read_pair(tmp_path)[1])
    part = Net()
    part.blocks[0] = torch.compile(part.blocks[0], backend="eager")
    load_adapter(torch.compile(part, backend="eager"), tmp_path)
    saved = model.blocks[0]["up"].lora_A.cpu()  # where there is one GPU, DataParallel has moved the model there
    assert torch.equal(part.blocks[0]._orig_mod["up"].lora_A, saved)


def test_a_failure_while_the_layers_are_made_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(bias="all", modules_to_save=["head"]), tmp_path)
    model = Net()
    before = Snapshot(model)
    monkeypatch.setattr("lora_kernels.checkpoint.loading.train_biases", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, tmp_path)
    before.assert_unchanged(model)


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("full")


def test_restoring_forgets_the_adapter(tmp_path: Path) -> None:
    save_adapter(adapted(modules_to_save=["head"], bias="all"), tmp_path)
    model = Net()
    load_adapter(model, tmp_path)
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        lora_kernels.restore_linear(model)
    save_adapter(adapted(model), tmp_path)
    assert (fields_of(tmp_path)["modules_to_save"], fields_of(tmp_path)["bias"]) == (None, "none")
