"""Quantised experts: NF4 and FP4 as bitsandbytes' ``replace_parameter_4bit`` makes them, and gpt-oss's MXFP4."""

from __future__ import annotations

import copy
import types
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixtures
from lora_kernels import (
    LoRAConfig,
    adapters_disabled,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_lora,
    ops,
    replace_linear,
    restore_linear,
    save_adapter,
)
from lora_kernels.config import AdapterOptions
from lora_kernels.errors import LoRAStateError
from lora_kernels.experts.autograd import project
from lora_kernels.experts.layer import FusedLoRAExperts, around_experts
from lora_kernels.experts.problem import Adapter
from lora_kernels.experts.routing import Routing
from lora_kernels.experts.run import stacked
from lora_kernels.weights import mxfp4
from lora_kernels.weights.stacked import PackedExperts
from mixtures import TARGETS, logits
from numerics import check_all, same_bits
from test_layer import inputs, made_whole, results

pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
quantise = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit

NAMES = ["gate_up_proj", "down_proj"]


def pair(kind: str, dtype: torch.dtype = torch.float32, names: list[str] = NAMES, **how: Any) -> tuple[Any, Any]:
    """A module with quantised weights, and one with the same values as plain Parameters."""
    module = mixtures.experts(kind, dtype)
    for name in names:
        quantise(module, name, blocksize=64, **how)
    plain = mixtures.experts(kind, dtype)
    for name in names:
        plain._parameters[name].data.copy_(meant(module, name))
    return module, plain


def meant(module: Any, name: str) -> Tensor:
    """The package's values, of one long row: of rows that are not whole blocks its AVX-512 code gives others'."""
    made = module.parametrizations[name]
    state = copy.copy(made[0].quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return bnb.functional.dequantize_4bit(made.original, state).view(shape)


def adapted(module: Any, names: list[str] = NAMES, **options: Any) -> FusedLoRAExperts:
    layer = around_experts(module, dict.fromkeys(names, AdapterOptions(3, 6.0, **options)))
    mixtures.move(p for p in layer.parameters() if p.requires_grad)
    return layer


@pytest.mark.parametrize(
    ("kind", "dtype", "how"),
    [
        ("qwen3_moe", torch.float32, {}),
        ("qwen3_moe", torch.bfloat16, {"compress_statistics": True}),
        ("mixtral", torch.float16, {"quant_type": "fp4"}),
        ("gpt_oss", torch.float32, {"compress_statistics": True}),  # stored transposed, with biases
        ("without gate", torch.float32, {"names": ["up_proj", "down_proj"]}),
        ("qwen3_moe", torch.float32, {"names": ["down_proj"]}),
    ],
    ids=str,
)
def test_as_by_the_same_values_in_plain_parameters(kind: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    module, plain = pair(kind, dtype, **how)
    targets = how.get("names", NAMES) if kind == "without gate" else NAMES
    layer, twin = adapted(module, targets), adapted(plain, targets)
    check_twins(layer, twin, dtype)


def check_twins(layer: FusedLoRAExperts, twin: FusedLoRAExperts, dtype: torch.dtype) -> None:
    """Output and every gradient beside those of the same values in plain Parameters."""
    found, wanted = results(layer, *inputs(layer, dtype)), results(twin, *inputs(twin, dtype))
    exact = partial(made_whole, twin, *inputs(twin, dtype), torch.float64, merged=False)
    check_all(found, exact, wanted, dtype)


def test_exporting_them_is_refused() -> None:
    """PyTorch's own error was of a number that depends on data."""
    layer = adapted(pair("mixtral")[0])
    with pytest.raises(LoRAStateError, match=r"torch\.export was called on stacked experts"):
        torch.export.export(layer, inputs(layer, torch.float32)[:3], strict=False)


@pytest.mark.parametrize("way", ["eager", "native"])
def test_dropout_is_drawn_for_each_expert_and_again_in_backward(way: str) -> None:
    """By a weight of zeros: dx is zero where the mask is, which is then what forward and da have to have taken."""
    module = mixtures.experts("qwen3_moe")
    module.down_proj.data.zero_()
    quantise(module, "down_proj", blocksize=64)
    torch.manual_seed(0)
    index = torch.arange(8).repeat(20, 1)  # 20 rows for each of the 8 experts
    x, dy = torch.randn(160, 8).requires_grad_(), torch.randn(160, 16)
    a, b = torch.randn(8, 3, 8).requires_grad_(), torch.randn(8, 16, 3).requires_grad_()
    y = project(x, stacked(module, "down_proj"), Adapter(a, b, 2.0), Routing(index, 8, False), 0.5, way=way)
    y.backward(dy)
    mask = (x.grad != 0).view(8, 20, 8)
    assert not any(torch.equal(mask[0], other) for other in mask[1:])

    def formulas(dtype: torch.dtype) -> dict[str, Tensor]:
        rows, of_a, of_b, outer = (each.detach().to(dtype) for each in (x.view(8, 20, 8), a, b, dy.view(8, 20, 16)))
        dropped, dh = rows * mask * 2.0, 2.0 * outer @ of_b
        h = dropped @ of_a.transpose(1, 2)
        found = {"y": 2.0 * h @ of_b.transpose(1, 2), "dx": dh @ of_a * mask * 2.0}
        return found | {"da": dh.transpose(1, 2) @ dropped, "db": 2.0 * outer.transpose(1, 2) @ h}

    found = {"y": y.detach().view(8, 20, 16), "dx": x.grad.view(8, 20, 8), "da": a.grad, "db": b.grad}
    check_all(found, partial(formulas, torch.float64), formulas(torch.float32), torch.float32)


def test_one_experts_values_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a matrix's size is saved, and at most one expert's values live beside another's."""
    module, _ = pair("qwen3_moe")
    layer = adapted(module)
    alive: list[Any] = []
    most = 0
    made = PackedExperts.of

    def watched(self: PackedExperts, expert: int, dtype: torch.dtype) -> Tensor:
        nonlocal most
        values = made(self, expert, dtype)
        alive.append(weakref.ref(values.untyped_storage()))
        alive[:] = [ref for ref in alive if ref() is not None]
        most = max(most, len(alive))
        return values

    monkeypatch.setattr(PackedExperts, "of", watched)
    x, index, weights, dy = inputs(layer, torch.float32)
    y = layer(x, index, weights)
    del alive[:]
    y.backward(dy)
    assert 1 <= most <= 2  # the former one's goes when the name is given to the next


def test_two_adapters_after_another_save_and_restore(tmp_path: Path) -> None:
    """A model with NF4 experts: trained adapters are saved, loaded, switched off and taken away; merging is refused."""

    def model() -> Any:
        made = mixtures.made("qwen3_moe")
        for block in made.model.layers:
            for name in NAMES:
                quantise(block.mlp.experts, name, blocksize=64)
        return made

    one = model()
    before, kinds = logits(one), [type(module) for module in one.modules()]
    state = one.state_dict()
    report = replace_linear(one, LoRAConfig(r=3, lora_alpha=6, target_parameters=TARGETS))
    assert {row.experts for row in report} == {8}
    mark_only_lora_as_trainable(one)
    still = off(one)
    mixtures.move(p for p in one.parameters() if p.requires_grad)
    acting = logits(one)
    assert not torch.allclose(acting, still)
    assert same_bits(off(one), still)
    assert all(same_bits(one.state_dict()[name], tensor) for name, tensor in state.items())
    assert same_bits(logits(copy.deepcopy(one)), acting)
    with pytest.raises(LoRAStateError, match=r"is quantized, and stacked experts are not quantized again"):
        merge_lora(one, quantize=True)
    save_adapter(one, tmp_path)
    other, plain = model(), mixtures.made("qwen3_moe")
    load_adapter(other, tmp_path)
    assert same_bits(logits(other), acting)
    load_adapter(plain, tmp_path)  # the same file onto 16 or 32 bits
    restore_linear(one)
    assert [type(module) for module in one.modules()] == kinds
    assert same_bits(logits(one), before)


def off(model: nn.Module) -> Tensor:
    with adapters_disabled(model):
        return logits(model)


def test_what_cannot_be_read_is_refused_in_a_sentence() -> None:
    module = mixtures.experts("qwen3_moe")
    quantise(module, "down_proj", blocksize=256)  # 128 numbers an expert
    with pytest.raises(LoRAStateError, match=r"each expert whole blocks"):
        adapted(module)
    other = mixtures.experts("qwen3_moe")
    nn.utils.parametrize.register_parametrization(other, "down_proj", nn.Identity())
    with pytest.raises(LoRAStateError, match=r"parametrized, and not by bitsandbytes"):
        adapted(other)


class Swizzled:
    """What transformers reads of a Triton tensor to save it: here a layout that turns the order of the bytes."""

    def __init__(self, data: Tensor) -> None:
        turned = data.transpose(-1, -2).flip(-2)
        layout = types.SimpleNamespace(unswizzle_data=lambda held: held.flip(-2))
        self.storage = types.SimpleNamespace(data=turned, layout=layout)


def mxfp4_experts() -> tuple[Any, Any]:
    """transformers' module with weights in MXFP4, and gpt-oss's plain one with what transformers makes of them."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(num_local_experts=4, hidden_size=64, intermediate_size=32)
    torch.manual_seed(3)
    module, plain = Mxfp4GptOssExperts(config), GptOssExperts(config)
    for name, (n, k) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        blocks = torch.randint(0, 256, (4, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 126, (4, n, k // 32), dtype=torch.uint8)
        del module._parameters[name]
        setattr(module, name, Swizzled(blocks.flatten(2)))
        setattr(module, f"{name}_precision_config", types.SimpleNamespace(weight_scale=Swizzled(scales)))
        plain._parameters[name].data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        bias = torch.randn(4, n)
        module._parameters[f"{name}_bias"].data = plain._parameters[f"{name}_bias"].data = bias
    return module.requires_grad_(False), plain.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mxfp4_has_the_values_that_transformers_makes(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 4, 2, 16), dtype=torch.uint8)
    scales = torch.randint(114, 140, (3, 4, 2), dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (E, K, N)
    for e in range(3):
        assert same_bits(mxfp4.values([blocks[e], scales[e]], "", 4, 64, dtype), wanted[e].t().contiguous())


def test_mxfp4_experts_compute_what_gpt_oss_does() -> None:
    module, plain = mxfp4_experts()
    layer, twin = adapted(module), adapted(plain)
    assert isinstance(stacked(layer, "down_proj"), PackedExperts)
    found, wanted = results(layer, *wide_inputs()), results(twin, *wide_inputs())
    check_all(found, partial(made_whole, twin, *wide_inputs(), torch.float64, merged=False), wanted, torch.float32)
    assert type(layer.to_plain()) is type(module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is interpreted")
def test_kernels_in_triton_make_mxfp4s_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with the very bits; each expert's in one launch."""
    from lora_kernels.backends.triton import code_operators

    made, layer = [], adapted(mxfp4_experts()[0])
    before = results(layer, *wide_inputs())

    def noted(*arguments: Any) -> Tensor:
        made.append(arguments[1].number)
        return code_operators.values(*arguments)

    monkeypatch.setattr(ops, "_code_kernels", {"cpu": ops.CodeKernels(noted, code_operators.few_tokens)})
    after = results(layer, *wide_inputs())
    assert set(made) == {"e2m1"}
    assert all(same_bits(before[name], after[name]) for name in before)


def wide_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    x, weights = torch.randn(40, 64).requires_grad_(), torch.rand(40, 2).requires_grad_()
    return x, index, weights, torch.randn(40, 64)


def test_mxfp4_experts_that_are_not_loaded_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = transformers.GptOssConfig(num_local_experts=4, hidden_size=64, intermediate_size=32)
    with pytest.raises(LoRAStateError, match="has no scales yet"):
        adapted(Mxfp4GptOssExperts(config))
