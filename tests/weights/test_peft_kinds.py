"""What PEFT's own tests do over bitsandbytes' layers, on small random models: PEFT's layers beside the fused ones.

Models stay in training, without dropout: in evaluation bitsandbytes may lay 4-bit weights out anew, with other values.
Its int8 layers quantise x as well, and so do not give quite what the fused ones give.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from quantised import bits_of

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

APART = {"nf4": 1e-4, "int8": 0.05}  # the norm of the difference over the norm: of fp32, and of an x of 8 bits
ROUNDED = 0.05  # the same in 16 bits
NAMES = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(24).view(2, 12)
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, initializer_range=0.1, **LLAMA)
        ),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **T5)),
    }
    found = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(found[name])
    return found


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and bitsandbytes' own, of merging and of casts
        yield


def _pair(folder: Path, kind: str, dtype: torch.dtype = torch.float32, name: str = "default", **options: Any) -> Any:
    """The same PEFT model twice: as PEFT has it, and fused."""
    kbit, autocast = options.pop("kbit", False), options.pop("autocast_adapter_dtype", True)
    options = {"r": 4, "lora_alpha": 8, "target_modules": NAMES} | options
    pair = []
    for fused in (False, True):
        base = _base(folder, kind, dtype)
        if kbit:
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
        torch.manual_seed(1)
        config = peft.LoraConfig(**options)
        model = peft.get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=autocast)
        _start(model)
        if fused:
            lora_kernels.fuse_peft(model)
        pair.append(model.train())
    return pair


def _base(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(
        **({"load_in_8bit": True} if kind == "int8" else four | {"bnb_4bit_compute_dtype": dtype})
    )
    kinds = {"llama": transformers.LlamaForCausalLM, "t5": transformers.T5ForConditionalGeneration}
    of = next(made for name, made in kinds.items() if folder.name.startswith(name))
    return of.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype)


def _start(model: Any) -> None:
    """Values for every B, so that each adapter acts."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, labels=TOKENS, **arguments).logits
    return found


def _check(pair: Any, kind: str, run: Callable[[Any], Any] = _logits) -> None:
    stock, fused = map(run, pair)
    _check_close(fused, stock, APART[kind])


def _check_close(found: Tensor, expected: Tensor, apart: float) -> None:
    assert found.dtype is expected.dtype
    assert (found.double() - expected.double()).norm() <= apart * expected.double().norm()


def _check_training(pair: Any, apart: float, around: Callable[[], Any] = contextlib.nullcontext) -> None:
    """Logits and every gradient of a step; all calls of the fused model ran fused."""
    found = []
    for model in pair:
        model.zero_grad()
        with around():
            output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"y": output.logits})
    stock, fused = found
    assert stock.keys() == fused.keys()
    for name, tensor in stock.items():
        _check_close(fused[name].detach(), tensor.detach(), apart)
    calls = lora_kernels.peft.calls(pair[1])
    assert calls.fused
    assert not calls.own


@pytest.mark.parametrize("kind", APART)
def test_merging_by_peft(kind: str, folders: dict[str, Path]) -> None:
    pair = _pair(folders["llama"], kind)
    before = [_logits(model) for model in pair]
    for step in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        for model in pair:
            getattr(model, step)()
        stock, fused = map(bits_of, pair)
        assert stock == fused
        _check(pair, kind)
    for model in pair:
        with model.disable_adapter():  # which takes the merged weight apart again
            model.base_model.model(input_ids=TOKENS)
    assert bits_of(pair[0]) == bits_of(pair[1])
    for model in pair:
        model.merge_adapter()
    plain = [model.merge_and_unload() for model in pair]
    assert bits_of(plain[0]) == bits_of(plain[1])
    assert {type(module) for module in plain[1].modules()} == {type(module) for module in plain[0].modules()}
    _check(plain, kind)
    assert not torch.equal(_logits(plain[1]), before[1])


@pytest.mark.parametrize("kind", APART)
def test_several_adapters(kind: str, folders: dict[str, Path]) -> None:
    pair = _pair(folders["llama"], kind)
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=8, target_modules=NAMES))
        _start(model)
        model.eval()
    for rows in (["default", "b"], ["__base__", "b"]):
        _check(pair, kind, lambda model, rows=rows: _logits(model, adapter_names=rows))
    for model in pair:
        model.train()
        model.add_weighted_adapter(["default", "b"], [0.5, 0.25], "both", combination_type="cat")
        model.set_adapter("both")
    _check(pair, kind)
    for model in pair:
        model.delete_adapter("both")
        model.set_adapter("b")
    _check_training(pair, APART[kind])


@pytest.mark.parametrize(
    "options",
    [
        {"name": "other"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", APART)
def test_a_step_of_each_option(kind: str, options: dict[str, Any], folders: dict[str, Path]) -> None:
    pair = _pair(folders["llama"], kind, **options)
    _check_training(pair, APART[kind])
    if kind != "int8" or "use_dora" not in options:  # PEFT's DoRA leaves an int8 layer that raises when it is off
        _check(pair, kind, _without_adapter)


def _without_adapter(model: Any) -> Tensor:
    with model.disable_adapter():
        return _logits(model)


@pytest.mark.parametrize(("family", "names"), [("llama", NAMES), ("t5", ["q", "v", "wo"])])
@pytest.mark.parametrize("kind", APART)
def test_prepared_for_training_with_checkpoints(
    kind: str, family: str, names: list[str], folders: dict[str, Path]
) -> None:
    pair = _pair(folders[family], kind, kbit=True, target_modules=names)
    _check_training(pair, APART[kind])


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no autocast"])
@pytest.mark.parametrize("widened", [True, False], ids=["fp32 adapters", "adapters as the base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_pefts(dtype: torch.dtype, widened: bool, autocast: bool, folders: dict[str, Path]) -> None:
    pair = _pair(folders["llama"], "nf4", dtype, autocast_adapter_dtype=widened)
    _check_training(pair, ROUNDED, lambda: torch.autocast("cpu", dtype, enabled=autocast))
