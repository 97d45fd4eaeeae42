"""PEFT's files of stacked experts, both ways, by values."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixtures
from lora_kernels import LoRAConfig, load_adapter, mark_only_lora_as_trainable, replace_linear, save_adapter
from lora_kernels.accuracy import judge
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.experts.layer import FusedLoRAExperts
from mixtures import TARGETS, logits
from numerics import same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

CHOICES = {"both": TARGETS, "gate_up": TARGETS[:1], "down": TARGETS[1:]}


def theirs(name: str, targets: list[str], folder: Path, **arguments: Any) -> nn.Module:
    """PEFT's model with an adapter that acts, and its files in ``folder``."""
    arguments = {"r": 3, "lora_alpha": 6, "target_modules": [], **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_parameters=targets, **arguments)
        model = peft.get_peft_model(mixtures.made(name), config)
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(folder)
    return model.eval()


def ours(name: str, targets: list[str], **arguments: Any) -> nn.Module:
    model = mixtures.made(name)
    replace_linear(model, LoRAConfig(**{"r": 3, "lora_alpha": 6, "target_parameters": targets, **arguments}))
    mark_only_lora_as_trainable(model)
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    return model


def by_peft(name: str, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(mixtures.made(name), folder)
    return model.eval()


def layers_of(model: nn.Module) -> dict[str, FusedLoRAExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRAExperts)}


def updates(model: nn.Module) -> dict[str, Tensor]:
    """s B A of each adapted Parameter, (E, N, K): of ours expert by expert, of PEFT's model by PEFT."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRAExperts):
            for own in module.options:
                a, b = module.lora_A[own].detach(), module.lora_B[own].detach()
                found[f"{path}.{own}"] = torch.stack([module.scaling(own) * (y @ x) for x, y in zip(a, b, strict=True)])
        elif hasattr(module, "parameter_name"):
            delta = module.get_delta_weight("default").detach()
            turned = getattr(module.get_base_layer(), "is_transposed", False)
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{name}.{module.parameter_name}"] = delta.transpose(1, 2) if turned else delta
    return found


def check_same(found: nn.Module, of_peft: nn.Module) -> None:
    """Expert by expert the same update, and the same logits."""
    one, other = updates(found), updates(of_peft)
    assert one.keys() == other.keys()
    assert one
    for name, update in one.items():
        for e, (x, y) in enumerate(zip(update, other[name], strict=True)):
            verdict = judge(f"{name} of expert {e}", x, y.double(), y, torch.float32)
            assert verdict.passed, str(verdict)
    wide = copy.deepcopy(of_peft).double()
    wide.base_model.model.set_experts_implementation("eager")  # grouped_mm has no fp64
    with torch.no_grad():
        verdict = judge("logits", logits(found), logits(wide), logits(of_peft), torch.float32, depth=8)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", mixtures.MODELS)
def test_what_peft_wrote_loads(name: str, choice: str, tmp_path: Path) -> None:
    model = theirs(name, CHOICES[choice], tmp_path)
    loaded = mixtures.made(name)
    report = load_adapter(loaded, tmp_path)
    assert {row.name for row in report} == set(updates(model))
    assert all(row.experts for row in report)
    check_same(loaded.eval(), model)
    assert all(p.requires_grad for layer in layers_of(loaded).values() for p in layer.adapter.values())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", mixtures.MODELS)
def test_what_is_written_here_loads_in_peft_and_here(name: str, choice: str, tmp_path: Path) -> None:
    model = ours(name, CHOICES[choice])
    save_adapter(model, tmp_path)
    check_same(model, by_peft(name, tmp_path))
    again = mixtures.made(name)
    load_adapter(again, tmp_path)
    assert same_bits(logits(again), logits(model))


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_ranks_of_any_size_both_ways(rank: int, tmp_path: Path) -> None:
    check_same_both(ours("qwen3_moe", TARGETS, r=rank), theirs("qwen3_moe", TARGETS, tmp_path / "p", r=rank), tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_both_ways(rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"layers\.1\..*\.gate_up_proj": 12}}
    arguments = {"use_rslora": rslora, **patterns}
    model, other = ours("mixtral", TARGETS, **arguments), theirs("mixtral", TARGETS, tmp_path / "p", **arguments)
    ranks = {own: of.r for layer in layers_of(model).values() for own, of in layer.options.items()}
    assert ranks == {"gate_up_proj": 3, "down_proj": 5}
    check_same_both(model, other, tmp_path)


def check_same_both(model: nn.Module, other: nn.Module, folder: Path) -> None:
    kind = {"MixtralForCausalLM": "mixtral", "Qwen3MoeForCausalLM": "qwen3_moe"}[type(model).__name__]
    loaded = mixtures.made(kind)
    load_adapter(loaded, folder / "p")
    check_same(loaded, other)
    save_adapter(model, folder / "o")
    check_same(model, by_peft(kind, folder / "o"))


def test_linear_layers_and_experts_in_one_file(tmp_path: Path) -> None:
    other = theirs("qwen3_moe", TARGETS, tmp_path / "p", target_modules=["q_proj", "o_proj"])
    loaded = mixtures.made("qwen3_moe")
    assert len(load_adapter(loaded, tmp_path / "p")) == 8
    check_same(loaded, other)
    model = ours("qwen3_moe", TARGETS, target_modules=["q_proj", "o_proj"])
    save_adapter(model, tmp_path / "o")
    check_same(model, by_peft("qwen3_moe", tmp_path / "o"))
    fields = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert fields["target_parameters"] == sorted(TARGETS)
    assert fields["target_modules"] == ["q_proj", "o_proj"]


def test_a_part_of_the_blocks(tmp_path: Path) -> None:
    targets = ["layers.1.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]
    model = ours("qwen3_moe", targets)
    save_adapter(model, tmp_path)
    check_same(model, by_peft("qwen3_moe", tmp_path))
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    ends = {re.sub(r".*layers\.(\d).*experts\.", r"\1 ", n) for n in names if "lora_A" in n}
    assert ends == {"0 lora_A.weight", "0 base_layer.lora_A.weight", "1 lora_A.weight"}


def test_exchanged_experts_are_seen(tmp_path: Path) -> None:
    """Two experts exchanged in A alone, in B alone or in both: the comparison of this file fails each time."""
    model = theirs("qwen3_moe", TARGETS, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    written = load_file(file)
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    order = torch.tensor([1, 0, *range(2, 8)])
    exchanged = {
        "A": written[name.format("A")].view(8, 3, -1)[order].reshape(24, -1),
        "B": written[name.format("B")].view(16, 3, 8)[..., order].reshape(16, -1),
    }
    for factors in ("A", "B", "AB"):
        save_file(written | {name.format(f): exchanged[f].contiguous() for f in factors}, file)
        loaded = mixtures.made("qwen3_moe")
        load_adapter(loaded, tmp_path)
        with pytest.raises(AssertionError, match="of expert 0"):
            check_same(loaded, model)


def test_exchanged_parameters_are_seen(tmp_path: Path) -> None:
    """In this model both Parameters' B have one shape, so nothing but the order of nesting tells them apart."""
    model = ours("qwen3_moe", TARGETS)
    layer = next(iter(layers_of(model).values()))
    assert layer.lora_B["gate_up_proj"].shape == layer.lora_B["down_proj"].shape
    save_adapter(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    inner = written["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"]
    assert torch.equal(inner.view(16, 3, 8).permute(2, 0, 1), layer.lora_B["gate_up_proj"])


def test_dropout_is_kept_in_a_field_of_our_own(tmp_path: Path) -> None:
    model = ours("mixtral", TARGETS, lora_dropout=0.25, target_modules=["q_proj"])
    with pytest.warns(LoRAKernelsWarning, match=r"writes lora_dropout=0 and keeps 0\.25.*PEFT refuses"):
        save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["lora_dropout"] == 0.0
    check_same(model, by_peft("mixtral", tmp_path))
    again = mixtures.made("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(again, tmp_path)
    assert {of.lora_dropout for layer in layers_of(again).values() for of in layer.options.values()} == {0.25}
    assert again.get_submodule("model.layers.0.self_attn.q_proj").lora_dropout == 0.25
    with pytest.warns(LoRAKernelsWarning, match="writes lora_dropout=0"):
        save_adapter(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == fields


def test_without_dropout_there_is_no_field_and_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoRAKernelsWarning)
        save_adapter(ours("mixtral", TARGETS), tmp_path)
    assert not any("lora_kernels" in name for name in json.loads((tmp_path / "adapter_config.json").read_text()))


def test_layers_that_are_there_get_the_values(tmp_path: Path) -> None:
    other = theirs("mixtral", TARGETS, tmp_path, lora_alpha=9)
    model = ours("mixtral", TARGETS)
    kept = dict(model.named_parameters())
    load_adapter(model, tmp_path)
    check_same(model, other)
    assert all(p is kept[name] for name, p in model.named_parameters())
    with pytest.raises(InvalidArgumentError, match="have adapters of the ranks"):
        load_adapter(ours("mixtral", TARGETS, rank_pattern={"down_proj": 4}), tmp_path)
    save_adapter(ours("mixtral", TARGETS[1:]), tmp_path / "one")
    with pytest.raises(LoRAStateError, match="has an adapter, and the file has none for it"):
        load_adapter(ours("mixtral", [], target_modules=["q_proj"]), tmp_path / "one")
    merged = ours("mixtral", TARGETS)
    for layer in layers_of(merged).values():
        layer.merge()
    with pytest.raises(LoRAStateError, match="are merged"):
        load_adapter(merged, tmp_path)


@pytest.mark.parametrize(
    ("base", "wanted", "dtype"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_dtypes_of_what_is_made(base: torch.dtype, wanted: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(ours("mixtral", TARGETS), tmp_path)
    model = mixtures.made("mixtral", base)
    load_adapter(model, tmp_path, adapter_dtype=wanted)
    assert {p.dtype for layer in layers_of(model).values() for p in layer.adapter.values()} == {dtype}


def changed(folder: Path, field: str | None = None, value: Any = None, **tensors: Any) -> None:
    """Changes a field of the configuration, or tensors of the file; None takes one out."""
    if field is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    file = folder / "adapter_model.safetensors"
    kept = load_file(file)
    for name, tensor in tensors.items():
        key = f"base_model.model.model.layers.0.mlp.experts.{name.replace('__', '.')}"
        kept.pop(key, None)
        if tensor is not None:
            kept[key] = tensor
    save_file(kept, file)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"field": "target_parameters", "value": TARGETS[:1]}, InvalidArgumentError, "2 adapters nested"),
        ({"field": "target_parameters", "value": []}, InvalidArgumentError, "names no Parameter of"),
        ({"field": "r", "value": 4}, InvalidArgumentError, r"where \(16, 16\) is expected.*4 experts"),
        ({"lora_A__weight": None}, InvalidArgumentError, "where lora_A and lora_B are expected"),
        ({"lora_A__weight": torch.ones(6, 8)}, InvalidArgumentError, r"lora_A \(6, 8\)"),
        ({"lora_A__weight": None, "lora_B__weight": None}, InvalidArgumentError, "1 adapters nested"),
        ({"lora_B__weight": torch.ones(16, 12, dtype=torch.int64)}, InvalidTypeError, "torch.int64"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, Any], error: Any, words: str, tmp_path: Path) -> None:
    save_adapter(ours("mixtral", TARGETS), tmp_path)
    changed(tmp_path, **change)
    model = mixtures.made("mixtral")
    kept = list(model.modules())
    with pytest.raises(error, match=words):
        load_adapter(model, tmp_path)
    assert list(model.modules()) == kept
    assert all(p.requires_grad for p in model.parameters())


OLD = {  # where transformers 4 had a model's experts, and what it called their layers: gate, up and down
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def old_file(
    name: str, folder: Path, leave: str = "$^", ranks: dict[str, int] | None = None, **fields: Any
) -> dict[str, Tensor]:
    """An adapter of transformers 4 of every expert's layers and of q_proj, but for keys that ``leave`` matches."""
    inner, names = OLD[name]
    model, tensors = mixtures.made(name), {}
    torch.manual_seed(5)
    for i, block in enumerate(model.model.layers):
        held = block.mlp.experts
        two, hidden = held.gate_up_proj.shape[1:]
        sizes = {names[0]: (two // 2, hidden), names[1]: (two // 2, hidden), names[2]: (hidden, two // 2)}
        shapes = {f"{inner}.{e}.{w}": size for e in range(held.num_experts) for w, size in sizes.items()}
        shapes["self_attn.q_proj"] = tuple(block.self_attn.q_proj.weight.shape)
        for path, (n, k) in shapes.items():
            r = next((r for end, r in (ranks or {}).items() if path.endswith(end)), 3)
            for factor, shape in (("A", (r, k)), ("B", (n, r))):
                key = f"base_model.model.model.layers.{i}.{path}.lora_{factor}.weight"
                tensors |= {} if re.search(leave, key) else {key: torch.randn(shape) * 0.1}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [*names, "q_proj"]} | fields
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("leave", ["$^", r"\.(w[13]|gate_proj|up_proj)\."])
@pytest.mark.parametrize("name", OLD)
def test_files_of_transformers_4_load_as_in_peft(name: str, leave: str, tmp_path: Path) -> None:
    targets = [target for target in (*OLD[name][1], "q_proj") if not re.search(leave, f".{target}.")]
    old_file(name, tmp_path / "old", leave, target_modules=targets)
    loaded = mixtures.made(name)
    load_adapter(loaded, tmp_path / "old")
    check_same(loaded.eval(), by_peft(name, tmp_path / "old"))
    mark_only_lora_as_trainable(loaded)
    save_adapter(loaded, tmp_path / "new")
    check_same(loaded, by_peft(name, tmp_path / "new"))
    load_adapter(loaded, tmp_path / "old")  # over itself


@pytest.mark.parametrize(("rslora", "leave"), [(False, "$^"), (True, "$^"), (False, r"\.w2\.")])  # PEFT loads the first
def test_files_of_transformers_4_keep_what_each_expert_computed(rslora: bool, leave: str, tmp_path: Path) -> None:
    tensors = old_file("mixtral", tmp_path, leave, use_rslora=rslora, lora_dropout=0.25, alpha_pattern={"w2": 9})
    model = mixtures.made("mixtral")
    load_adapter(model, tmp_path)
    root, found = (3**0.5 if rslora else 3), updates(model)
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", *(["down_proj"] if leave == "$^" else [])}
    for name, update in found.items():
        for e, own in enumerate(update):
            path = f"base_model.model.model.layers.{name.split('.')[2]}.block_sparse_moe.experts.{e}"
            layers = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
            pairs = [(tensors[f"{path}.{w}.lora_B.weight"], tensors[f"{path}.{w}.lora_A.weight"]) for w in layers]
            wanted = torch.cat([b @ a for b, a in pairs]) * ((6 if len(layers) == 2 else 9) / root)
            verdict = judge(f"{name} of expert {e}", own, wanted.double(), wanted, torch.float32, depth=2)
            assert verdict.passed, str(verdict)
    assert {of.lora_dropout for layer in layers_of(model).values() for of in layer.options.values()} == {0.25}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"leave": r"\.w3\."}, r"all of them must have an adapter"),
        ({"leave": r"experts\.2\."}, r"3 and 3 single experts.*stacks 4 experts"),
        ({"ranks": {"1.w1": 2}}, r"not of r=3"),
        ({"ranks": {"1.w1": 2}, "rank_pattern": {r"1\.w1": 2}}, r"ranks and alphas differ"),
        ({"leave": r"experts\.2\.w1\.lora_A"}, r"only plain LoRA is computed"),
    ],
)
def test_files_of_transformers_4_that_cannot_be_stacked(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    old_file("mixtral", tmp_path, **arguments)
    model = mixtures.made("mixtral")
    kept = list(model.modules())
    with pytest.raises(InvalidArgumentError, match=words):
        load_adapter(model, tmp_path)
    assert list(model.modules()) == kept


def test_files_of_transformers_4_for_a_model_that_is_not_transformers(tmp_path: Path) -> None:
    old_file("mixtral", tmp_path)
    model = nn.ModuleDict({"model": mixtures.made("mixtral").model.layers})
    with pytest.raises(InvalidArgumentError, match=r"made with transformers 4.*PeftModel.from_pretrained"):
        load_adapter(model, tmp_path)


def test_layers_that_differ_where_the_file_has_one_value(tmp_path: Path) -> None:
    model = ours("mixtral", TARGETS, lora_dropout=0.1)
    replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LoRAStateError, match="differ in lora_dropout"):
        save_adapter(model, tmp_path)
    other = ours("mixtral", TARGETS)
    replace_linear(other, LoRAConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LoRAStateError, match="differ in use_dora"):
        save_adapter(other, tmp_path)


def test_a_configuration_of_pefts(tmp_path: Path) -> None:
    config = LoRAConfig.from_peft(peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=TARGETS))
    model = mixtures.made("olmoe")
    replace_linear(model, config)
    assert {own for layer in layers_of(model).values() for own in layer.options} == {"gate_up_proj", "down_proj"}
