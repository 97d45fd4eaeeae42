"""LoRA layers over quantised weights: values, gradients, what is kept, state dicts, copies, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, dispatch, replace_linear
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError, UnsupportedTransformError
from lora_kernels.models.model import lora_layers
from lora_kernels.weights import known
from numerics import check_linear, same_bits
from quantised import (
    BITSANDBYTES,
    CALLABLE,
    KINDS,
    OTHERS,
    adapted,
    block_fp8,
    bnb,
    check_beside,
    check_layer,
    quantised,
    results_of,
    twin,
    values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("sizes", [(64, 96), (80, 50)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_dequantised_weight(
    kind: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    sizes = (sizes[0], sizes[1] // 16 * 16) if kind == "ao-nvfp4" else sizes  # torchao makes no other
    layer = adapted(kind, *sizes, dtype)
    x, dy = torch.randn(2, 40, sizes[0], dtype=dtype), torch.randn(2, 40, sizes[1], dtype=dtype)
    check_layer(layer, x.flatten(0, 1), dy.flatten(0, 1), values(layer).to(dtype))
    assert layer(x).shape == dy.shape
    assert layer(x[:0]).shape == dy[:0].shape


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"use_dora": True, "lora_dropout": 0.5}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_option_is_that_of_the_same_layer_over_the_values(kind: str, options: dict[str, Any]) -> None:
    layer = adapted(kind, 64, 96, torch.float32, **options)
    other = twin(layer, values(layer), torch.float32)
    x, dy = torch.randn(40, 64), torch.randn(40, 96)
    check_beside(results_of(layer, x, dy), results_of(other, x, dy), partial(results_of, other.double(), x, dy))


@pytest.mark.parametrize("tokens", [3, 40])
def test_outliers_of_x_are_multiplied_as_they_are(tokens: int) -> None:
    """bitsandbytes' own int8 layer quantises x, and keeps columns above its threshold of 6 apart."""
    layer = FusedLoRALinear.from_linear(quantised("int8", 64, 96, torch.float32, threshold=6.0), r=4, lora_alpha=4)
    nn.init.normal_(layer.lora_B, std=0.5)
    x = torch.randn(tokens, 64)
    x[:, ::9] *= 60.0
    check_layer(layer, x, torch.randn(tokens, 96), values(layer))


@pytest.mark.skipif("fp8" not in KINDS, reason="this version of transformers has no FP8 layers")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_in_the_blocks_of_published_models(dtype: torch.dtype) -> None:
    base = block_fp8(nn.Linear(300, 200).to(dtype), (128, 128))
    layer = FusedLoRALinear.from_linear(base, r=4, lora_alpha=4)
    nn.init.normal_(layer.lora_B, std=0.5)
    for tokens in (3, 40):
        x, dy = torch.randn(tokens, 300, dtype=dtype), torch.randn(tokens, 200, dtype=dtype)
        check_layer(layer, x, dy, values(layer).to(dtype))


def test_x_of_another_dtype_is_multiplied_in_the_layers_own() -> None:
    layer = adapted("nf4", 64, 96, torch.bfloat16)
    x = torch.randn(8, 64)
    y = layer(x)
    assert y.dtype is torch.float32
    assert torch.equal(y, layer(x.bfloat16()).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_autocast_decides_where_the_layer_has_no_dtype_of_its_own() -> None:
    layer = adapted("nf4", 64, 96)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()).float())


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_alone_is_the_dequantised_product(kind: str) -> None:
    layer = adapted(kind, 64, 96, torch.float32)
    x = torch.randn(8, 64, requires_grad=True)
    with layer.enable_lora(False):
        y = layer(x)
    y.sum().backward()
    check_linear(y.detach(), x.detach(), values(layer), layer.bias.detach())
    check_linear(x.grad, torch.ones(8, 96), values(layer).t())


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_base_alone_compiles(needs_grad: bool) -> None:
    layer, x = adapted("nf4", 64, 96, torch.float32), torch.randn(8, 64, requires_grad=needs_grad)
    with layer.enable_lora(False):
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_values_is_kept_for_backward(kind: str, options: dict[str, Any]) -> None:
    layer = adapted(kind, 256, 512, torch.float32, **options)
    x, kept = torch.randn(16, 256, requires_grad=True), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    owned = [
        *(p for p in layer.parameters() if not hasattr(p, "__tensor_flatten__")),
        *known.read(layer, layer.weight).parts,
        x,
    ]
    of_layer = {tensor.untyped_storage().data_ptr() for tensor in owned}
    more = sum(size for place, size in kept.items() if place not in of_layer)
    row = 4 * (512 if layer.use_dora else 0)
    assert more <= 16 * (4 * 64 + row) + 4 * 4096  # h, and with DoRA what its gain is multiplied with
    assert more < 512 * 256
    y.sum().backward()


@pytest.mark.parametrize("members", [1, 3])
def test_at_most_one_weight_is_dequantised_at_a_time(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from lora_kernels import ops

    alive: list[Any] = []
    most = 0
    made = ops._dequantize

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal most
        found = made(*arguments)
        alive.append(weakref.ref(found.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr("lora_kernels.branches_autograd.values_of", _counting(counted))
    monkeypatch.setattr("lora_kernels.backends.native.coded.dequantize", counted)
    model = _attention(members)
    y = model(torch.randn(40, 64, requires_grad=True))
    y.sum().backward()
    assert len(alive) == 2 * members
    assert most == 1
    assert all(ref() is None for ref in alive)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; of one that holds others, these."""
    if hasattr(one, "__tensor_flatten__"):
        names, _ = one.__tensor_flatten__()
        return type(one) is type(other) and all(_same(getattr(one, name), getattr(other, name)) for name in names)
    return one.shape == other.shape and same_bits(one.reshape(-1), other.reshape(-1))


def _counting(counted: Any) -> Any:
    def values_of(layout: Any, parts: Any, dtype: Any, after: Any) -> Any:
        return counted(list(parts), layout.form, layout.spec, layout.rows, layout.columns, dtype, after)

    return values_of


class _Heads(nn.Module):
    """Layers that read one x, as q, k and v do."""

    def __init__(self, count: int, kind: str = "nf4-nested") -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")[:count]
        for name, n in zip(names, (96, 64, 64), strict=False):
            self.add_module(name, quantised(kind, 64, n, torch.float32))
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self.names], -1)


def _attention(count: int, kind: str = "nf4-nested") -> nn.Module:
    torch.manual_seed(0)
    model = _Heads(count, kind)
    replace_linear(model, LoRAConfig(r=4, target_modules=list(model.names)))
    lora_kernels.share_inputs(model)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model.train()


@pytest.mark.parametrize("tokens", [40, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_gives_what_its_layers_give(kind: str, tokens: int) -> None:
    model = _attention(3, kind)
    plain = copy.deepcopy(model)
    for name in model.names:
        layer = model.get_submodule(name)
        setattr(plain, name, twin(layer, values(layer), torch.float32))
    x, dy = torch.randn(tokens, 64), torch.randn(tokens, 224)
    check_beside(results_of(model, x, dy), results_of(plain, x, dy), partial(results_of, plain.double(), x, dy))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_checkpoint_gives_the_same(reentrant: bool, p: float) -> None:
    layer = adapted("nf4-nested", 64, 96, torch.float32, lora_dropout=p)
    x, dy, found = torch.randn(40, 64), torch.randn(40, 96), []
    for checkpointed in (False, True):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        y = checkpoint(layer, own, use_reentrant=reentrant) if checkpointed else layer(own)
        y.backward(dy)
        found.append((y.detach(), own.grad, layer.lora_A.grad, layer.lora_B.grad))
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_a_double_backward_is_that_of_the_values() -> None:
    layer = adapted("nf4", 64, 96, torch.float32)
    other, x = twin(layer, values(layer), torch.float32), torch.randn(8, 64)
    found = []
    for each in (layer, other, copy.deepcopy(other).double()):
        own = x.to(each.lora_A.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(each(own).square().sum(), own, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [each.lora_A, each.lora_B])
        found.append(dict(zip(("lora_A", "lora_B"), second, strict=True)))
    check_beside(*found)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("due", ["x", "lora_A", "lora_B", "lora_bias", "x lora_B", "lora_A lora_bias"])
def test_what_is_not_due_is_left_out_and_changes_nothing(due: str, p: float) -> None:
    layer = adapted("nf4", 64, 96, torch.float32, lora_bias=True, lora_dropout=p)
    x, dy = torch.randn(24, 64), torch.randn(24, 96)
    expected = results_of(layer, x, dy)
    for name, parameter in layer.adapter.items():
        parameter.requires_grad_(name in due.split())
        parameter.grad = None
    own = x.clone().requires_grad_("x" in due.split())
    torch.manual_seed(1)
    layer(own).backward(dy)
    found = {"dx": own.grad} | {name: parameter.grad for name, parameter in layer.adapter.items()}
    names = {"x": "dx"}
    for name in ("x", "lora_A", "lora_B", "lora_bias"):
        key = names.get(name, name)
        assert (found[key] is not None) == (name in due.split())
        assert found[key] is None or same_bits(found[key], expected[key])


@pytest.mark.parametrize("x", [[1.0] * 64, None], ids=["a list", "nothing"])
def test_what_is_no_tensor_is_told_in_a_sentence(x: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"must be|was given|were given"):
        adapted("nf4", 64, 96, torch.float32)(x)


@pytest.mark.parametrize("frozen", ["lora_B", "lora_bias", "x"])
def test_a_double_backward_of_what_is_due(frozen: str) -> None:
    layer = adapted("nf4", 64, 96, torch.float32, lora_bias=True)
    other, x = twin(layer, values(layer), torch.float32), torch.randn(8, 64)
    found = []
    for each in (layer, other, copy.deepcopy(other).double()):
        if frozen != "x":
            each.adapter[frozen].requires_grad_(False)
        own = x.to(each.lora_A.dtype).requires_grad_(frozen != "x")
        (da,) = torch.autograd.grad(each(own).square().sum(), each.lora_A, create_graph=True)
        left = [each.lora_A, each.lora_B] if frozen != "lora_B" else [each.lora_A]
        second = torch.autograd.grad(da.square().sum(), left)
        found.append(dict(zip(("lora_A", "lora_B"), second, strict=False)))
    check_beside(*found)


def test_a_double_backward_that_would_need_x_is_refused() -> None:
    layer = adapted("nf4", 64, 96, torch.float32)
    layer.lora_A.requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    with pytest.raises(UnsupportedTransformError, match=r"x was not kept"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize(("options", "name"), [({}, "PackedLinear"), ({"use_dora": True}, "Branches")], ids=str)
def test_a_plain_adapter_takes_the_shorter_way(options: dict[str, Any], name: str) -> None:
    layer = adapted("nf4", 64, 96, torch.float32, **options)
    y = layer(torch.randn(8, 64))
    assert type(y.grad_fn).__name__ == f"{name}FunctionBackward"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_the_same(kind: str) -> None:
    layer = adapted(kind, 64, 96, torch.float32)
    x = torch.randn(8, 64)
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    others = [copy.deepcopy(layer), loaded, layer.to("cpu")]
    if kind in BITSANDBYTES:  # of float8 tensors PyTorch makes no pickle but in a file of its own
        others += [pickle.loads(pickle.dumps(layer)), layer.float()]
    for other in others:
        assert torch.equal(other(x), layer(x))
        assert isinstance(other, type(quantised(kind, 64, 96)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_with_all_that_a_weight_is_read_by(kind: str) -> None:
    one, other = adapted(kind, 64, 96, torch.float32), adapted(kind, 64, 96, torch.float32)
    x = torch.randn(8, 64)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert all(_same(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_state_dict_of_another_shape_is_refused() -> None:
    state = adapted("nf4", 96, 64, torch.float32).state_dict()
    layer = adapted("nf4", 64, 96, torch.float32)
    kept = {name: value for name, value in state.items() if name.startswith("weight")}
    with pytest.raises(InvalidTypeError, match="Load the state dict of the same model"):
        layer.load_state_dict(kept, strict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_gives_the_packages_own_layer_back(kind: str) -> None:
    model = nn.Sequential(quantised(kind, 64, 96, torch.float32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own, weight, x = type(model[0]), type(model[0].weight), torch.randn(8, 64)
    expected = copy.deepcopy(model).train()(x) if kind in CALLABLE else None
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    model(x).sum().backward()
    lora_kernels.restore_linear(model)
    assert type(model[0]) is own
    assert type(model[0].weight) is weight
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(_same(after[name], value) for name, value in before.items())
    assert expected is None or torch.equal(model.train()(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = nn.Sequential(quantised(kind, 64, 96, torch.float32))
    plain, x = copy.deepcopy(model), torch.randn(8, 64)
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B)
    lora_kernels.save_adapter(model, tmp_path)
    lora_kernels.load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), model(x))


def test_a_report_counts_the_numbers_that_a_weight_stands_for() -> None:
    model = nn.Sequential(quantised("nf4", 64, 96, torch.float32))
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    assert report.total == 64 * 96 + 96 + 2 * (64 + 96)
    told = str(lora_kernels.explain(model[0], tokens=64))
    assert "native multiplies up to 16 tokens with its codes. Else each pass dequantizes it once" in told


@pytest.mark.skipif("ao-nvfp4" not in KINDS, reason="this version of torchao has other tensors")
def test_a_report_does_not_tell_of_codes_that_no_kernel_reads() -> None:
    layer = adapted("ao-nvfp4", 64, 96)
    assert known.read(layer, layer.weight).kernels == ()
    assert "Its weight is quantized: each pass dequantizes it once" in str(lora_kernels.explain(layer, tokens=4))


@pytest.mark.skipif("ao-nvfp4" not in KINDS, reason="this version of torchao has other tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("whole", [None, 0.37])
def test_nvfp4_values_have_torchaos_bits(
    whole: float | None, swizzled: bool, by_columns: bool, dtype: torch.dtype
) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    one = None if whole is None else torch.tensor(whole)
    w = NVFP4Tensor.to_nvfp4(torch.randn(256, 128).to(dtype), 16, one, is_swizzled_scales=swizzled)
    linear = nn.Linear(*((256, 128) if by_columns else (128, 256)), bias=False, dtype=dtype)
    linear.weight = nn.Parameter(w.t() if by_columns else w, requires_grad=False)
    expected = linear.weight.dequantize()  # type: ignore[operator]
    layer = FusedLoRALinear.from_linear(linear, r=4)
    found = known.read(layer, layer.weight).dequantize(dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


def _not_quantised() -> Any:
    return bnb.nn.Linear4bit(64, 96)


def _unknown() -> Any:
    layer = quantised("nf4", 64, 96)
    layer.weight.quant_state.quant_type = "int3"
    return layer


def _part() -> Any:
    layer = quantised("nf4", 64, 96)
    layer.out_features = 48
    return layer


def _training() -> Any:
    layer = quantised("nf4", 64, 96, quant_storage=torch.float32)
    layer.weight.requires_grad_(True)
    return layer


class _Own(bnb.nn.Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def _own() -> Any:
    return _Own(64, 96).to("cpu")


def _of_another_package() -> Any:
    class HQQLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    HQQLinear.__module__ = "hqq.core.quantize"
    return HQQLinear(64, 96)


def _quantising_x() -> Any:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Sequential(nn.Linear(64, 96))
    ao.quantize_(layer, ao.Int8DynamicActivationInt8WeightConfig())
    return layer[0]


def _fp8(**changes: Any) -> Any:
    if "fp8" not in KINDS:
        pytest.skip("this version of transformers has no FP8Linear")
    layer = quantised("fp8", 64, 96)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def _torchao(**changes: Any) -> Any:
    if "ao-int8" not in KINDS:
        pytest.skip("this version of torchao has other tensors")
    layer = quantised("ao-int8", 64, 96)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def _parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


REFUSED = {
    "of another package": (_of_another_package, "fuse_peft leaves it to PEFT"),
    "quantises x too": (_quantising_x, "weight-only"),
    "FP8, on meta": (lambda: _fp8().to("meta"), "on the meta device"),
    "FP8, of 4 bits": (lambda: _fp8(weight=_parameter(96, 32, dtype=torch.int8)), "a weight in torch.int8"),
    "FP8, a part": (lambda: _fp8(out_features=48), "it is a part"),
    "FP8, other blocks": (lambda: _fp8(block_size=(64, 64)), "is expected for blocks of"),
    "torchao, on meta": (lambda: _torchao().to("meta"), "on the meta device"),
    "torchao, a part": (lambda: _torchao(out_features=48), "it is a part"),
    "not quantised": (_not_quantised, "not quantized yet"),
    "on meta": (lambda: bnb.nn.Linear4bit(64, 96, device="meta"), "not quantized yet"),
    "unknown type": (_unknown, "quant_type='int3'"),
    "a part": (_part, "Quantize the whole"),
    "training": (_training, "only adapters can train"),
    "int8, not quantised": (lambda: bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False), "not quantized yet"),
    "int8, training": (lambda: bnb.nn.Linear8bitLt(64, 96), "has_fp16_weights=True"),
    "its own forward": (_own, "its own behaviour would be lost"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_told_in_a_sentence(case: str) -> None:
    made, sentence = REFUSED[case]
    with pytest.raises(InvalidTypeError, match=sentence):
        FusedLoRALinear.from_linear(made(), r=2)


@pytest.mark.skipif("fp8" not in KINDS, reason="this version of transformers has no FP8Linear")
def test_an_fp8_weight_that_lost_its_scales_is_told_of() -> None:
    layer = adapted("fp8", 64, 96, torch.float32).to(torch.bfloat16)
    with pytest.raises(LoRAStateError, match="without its scales"):
        layer(torch.randn(8, 64))


@pytest.mark.skipif("ao-int8" not in KINDS, reason="this version of torchao has other tensors")
def test_a_weight_of_torchaos_that_trains_is_told_of() -> None:
    layer = adapted("ao-int8", 64, 96, torch.float32)
    layer.weight.requires_grad_(True)
    with pytest.raises(LoRAStateError, match="only adapters train"):
        layer(torch.randn(8, 64))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_takes_a_part_of_the_weight_is_refused(init: str) -> None:
    model = nn.Sequential(quantised("nf4", 64, 96))
    with pytest.raises(InvalidArgumentError, match="before it is quantized"):
        replace_linear(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=init))
    assert type(model[0]) is bnb.nn.Linear4bit


def test_a_wrong_x_is_told_in_a_sentence() -> None:
    layer = adapted("nf4", 64, 96)
    with pytest.raises(InvalidArgumentError, match="shapes that do not fit"):
        layer(torch.randn(8, 63))
    with layer.enable_lora(False), pytest.raises(InvalidArgumentError, match="quantised weight"):
        layer(torch.randn(8, 63))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_operators_take_a_package_s_own_parameter(kind: str, tokens: int) -> None:
    """A compiled graph hands it over as it is, and its methods are other ones than a tensor's."""
    layer = adapted(kind, 64, 96, torch.float32)
    packed = known.read(layer, layer.weight)
    parts = [layer.weight, *packed.parts[1:]]
    assert type(parts[0]) is not Tensor
    of, none = (*packed.layout[:2], 96, 64), (None, None)
    own = torch.ops.lora_kernels
    expected = packed.dequantize()
    assert same_bits(own.dequantize.default(parts, *of, torch.float32, None), expected)
    dispatch.backend("native").register("cpu")
    x, dy = torch.randn(tokens, 64), torch.randn(tokens, 96)
    y, _ = own.native_packed_product.default(x, parts, *of, *none, *none, 1.0, False)
    torch.testing.assert_close(y, x @ expected.t())
    torch.testing.assert_close(own.native_packed_input_grad.default(dy, parts, *of, *none, 0.0, None), dy @ expected)


@pytest.mark.parametrize("kinds", [("nf4-nested", "int8"), *zip(OTHERS, reversed(OTHERS), strict=True)], ids=str)
def test_a_compiler_makes_the_values_again_in_backward(kinds: tuple[str, str]) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    one, other = kinds
    model = nn.Sequential(adapted(one, 64, 96, torch.float32), adapted(other, 96, 64, torch.float32))
    kept: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keeping(name: str) -> Any:
        def seen(graph: Any, _: Any) -> Any:
            kept[name] += [node.target for node in graph.graph.nodes]
            if name == "forward":
                (output,) = (node for node in graph.graph.nodes if node.op == "output")
                kept["outputs"] = [node.target for node in output.args[0] if node is not None]
            return graph.forward

        return seen

    ways = {"fw_compiler": keeping("forward"), "bw_compiler": keeping("backward")}
    compiled = torch.compile(
        model, backend=aot_autograd(**ways, partition_fn=min_cut_rematerialization_partition), fullgraph=True
    )
    x, dy = torch.randn(40, 64), torch.randn(40, 64)
    found, expected = results_of(compiled, x, dy), results_of(model, x, dy)
    assert all(same_bits(one, other) for one, other in zip(found.values(), expected.values(), strict=True))
    own = torch.ops.lora_kernels
    operators = own.dequantize.default, own.native_packed_product.default, own.native_packed_input_grad.default
    counts = [sum(kept[name].count(op) for op in operators) for name in ("forward", "backward", "outputs")]
    assert counts == [2, 2, 0]


def _hqq(base: type) -> Any:
    """HQQ's layer as its package has it, a module with ``in_features`` and no weight, or one of ``nn.Linear``."""

    class HQQLinear(base):
        def __init__(self) -> None:
            super().__init__(*(() if base is nn.Module else (64, 96)))
            self.in_features, self.out_features = 64, 96
            self.register_buffer("W_q", torch.zeros(96, 32, dtype=torch.uint8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], 96)

    HQQLinear.__module__ = "hqq.core.quantize"
    return HQQLinear()


@pytest.mark.parametrize("base", [nn.Module, nn.Linear])
def test_a_layer_of_another_package_is_told_alike_alone_and_in_a_model(base: type) -> None:
    sentences = []
    for call in (
        lambda: FusedLoRALinear.from_linear(_hqq(base), r=2),
        lambda: replace_linear(nn.Sequential(_hqq(base)), LoRAConfig(r=2, target_modules=["0"])),
    ):
        with pytest.raises(InvalidTypeError) as caught:
            call()
        sentences.append(str(caught.value))
    assert sentences[0].startswith("HQQLinear is hqq's quantized layer")
    assert "fuse_peft leaves it to PEFT" in sentences[0]
    assert sentences[1].endswith(sentences[0])


def test_torchaos_int4_for_gpus_is_refused_with_advice_that_works() -> None:
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.int4.int4_tensor")
    weight = module.Int4Tensor(
        torch.zeros(96, 32, dtype=torch.int8), torch.ones(2, 96), torch.zeros(2, 96), [1, 32], torch.Size([96, 64])
    )
    layer = nn.Linear(64, 96, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InvalidTypeError, match="IntxWeightOnlyConfig") as caught:
        FusedLoRALinear.from_linear(layer, r=2)
    assert "Dequantize it" not in str(caught.value)  # it has no such function
    FusedLoRALinear.from_linear(quantised("ao-int4", 64, 96, torch.bfloat16), r=2)  # what is advised


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"off": True}], ids=str)
@pytest.mark.parametrize("kind", ["nf4-nested", "int8", *(kind for kind in ("ao-int8", "fp8") if kind in KINDS)])
def test_an_exported_program_computes_the_same(kind: str, options: dict[str, Any]) -> None:
    layer = adapted(kind, 64, 96, torch.float32, **({} if "off" in options else options)).eval()
    rows = {"input": {0: torch.export.Dim("m", min=2)}}
    with layer.enable_lora("off" not in options):
        program = torch.export.export(layer, (torch.randn(4, 64),), dynamic_shapes=rows)
        file, x = io.BytesIO(), torch.randn(23, 64)
        torch.export.save(program, file)
        file.seek(0)
        for each in (program, torch.export.load(file)):
            assert torch.equal(each.module()(x), layer(x))
