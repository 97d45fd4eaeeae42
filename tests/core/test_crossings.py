"""Two features at once, where each alone is tested and a fault would be silent. ``crossings.py`` has the table."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import crossings
import test_branches
from cases import BACKENDS, Case, keep_mask, make, measures, run
from lora_kernels import FusedLoRALinear, LoRAConfig, dispatch, lora_linear, replace_linear, restore_linear
from lora_kernels import autograd as plain_autograd
from lora_kernels.gate import run_branches
from made_models import acting
from numerics import check_all, same_bits, three_ways

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)

# Frozen parts x groups x dropout

_THREE = tuple((n, r, False, "identity") for n, r in ((56, 8), (24, 4), (24, 3)))
GROUPS = [
    test_branches.Group(Case(p=0.3), _THREE),
    test_branches.Group(Case(), _THREE),
    test_branches.Group(Case(p=0.3), tuple((n, r, True, "gelu") for n, r, *_ in _THREE)),
]


@every_backend
@pytest.mark.parametrize("frozen", [("da0",), ("da1",), ("da0", "da1"), ("dx", "da0"), ("db0", "da2"), ("da0", "db0")])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_what_is_frozen_of_one_member_changes_no_other(
    group: test_branches.Group, frozen: tuple[str, ...], backend: str, device: str
) -> None:
    x, branches, dys = test_branches.draw(group, device)
    given = group, x, branches, dys, backend
    dispatch.select(x.device.type, x.dtype, backend)
    exact, yardstick, errors = test_branches.measures(*given)
    due = {name: leaf for name, leaf in test_branches.leaves(x, branches).items() if name not in frozen}
    for name in frozen:
        test_branches.leaves(x, branches)[name].requires_grad_(False)
    torch.manual_seed(1)
    ys = run_branches(x, branches, group.case.p, backend)
    found = dict(zip(due, torch.autograd.grad(ys, list(due.values()), dys), strict=True))
    check_all(found, exact, yardstick, group.case.dtype, expected=errors)


# Dropout x many tokens: what is cut into chunks of rows


@pytest.mark.parametrize(
    ("backend", "device", "m"),
    [(*pair, m) for pair in BACKENDS for m in (2049, 4200) if pair[0] != "triton" or m < 4000],
)
def test_the_mask_goes_on_from_chunk_to_chunk(backend: str, device: str, m: int) -> None:
    """Both passes of the native library sum over more rows than one chunk has; an interpreter meets more at once."""
    case = Case(m=m, k=17, n=5, r=2, p=0.3, bias=False)
    inputs = make(case, device)
    mask = keep_mask(case, inputs, backend)
    exact, yardstick, errors = measures(case, inputs, mask)
    check_all(run(case, inputs, backend), exact, yardstick, case.dtype, expected=errors)


# Backends x what is remembered of a choice


def test_a_choice_that_is_remembered_is_no_other_request_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen at the operators that run, for each pair of requests one after the other, in a memory that starts empty."""
    ran: list[str] = []
    find = plain_autograd.operators

    def watched(name: str) -> Any:
        ran.append(name)
        return find(name)

    monkeypatch.setattr(plain_autograd, "operators", watched)
    names = [None, *(name for name, device in BACKENDS if device == "cpu")]
    i = make(Case(m=3))
    for first, second in ((first, second) for first in names for second in names):
        monkeypatch.setattr(dispatch, "_choices", {})
        ran.clear()
        for name in (first, second):
            with dispatch.use_backend(name):
                lora_linear(i.x, i.weight, i.lora_a, i.lora_b)
        automatic = next(n for n in dispatch.ORDER if not dispatch._automatic_reasons(dispatch.backend(n), CPU))
        assert ran == [first or automatic, second or automatic]


CPU = dispatch.Problem("cpu", torch.float32)


# A bias in fp32 x a 16-bit base


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [24, 700])
def test_an_fp32_bias_over_a_16_bit_base_has_a_gradient_of_fp32(
    m: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A sum of what is 16-bit already: as exact as fp32 sums are, far finer than the base's dtype."""
    i = make(Case(m=m, k=16, n=20, r=2, dtype=dtype), device)
    bias = torch.zeros(20, device=device, requires_grad=True)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, bias, backend=backend)
    (dbias,) = torch.autograd.grad(y, [bias], i.dy)
    assert dbias.dtype == torch.float32
    exact, yardstick, errors = three_ways(torch.float32, lambda number: {"dbias": number(i.dy).sum(0)})
    check_all({"dbias": dbias}, exact, yardstick, torch.float32, expected=errors)


# Merging x rounding, by bits. All values are whole numbers that fp32 holds exactly, so there is one right result.


def whole_numbers(layer: FusedLoRALinear, most: int) -> None:
    """W and A of small whole numbers, B of larger ones: W + s B A needs more digits than 16 bits have."""
    generator = torch.Generator().manual_seed(4)
    for parameter, bound in ((layer.weight, most), (layer.lora_A, 8), (layer.lora_B, 500), (layer.bias, most)):
        parameter.data.copy_(torch.randint(-bound, bound + 1, parameter.shape, generator=generator))


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 128), (torch.float16, 2048)], ids=str)
def test_a_merged_weight_has_the_bits_of_one_rounding(
    dtype: torch.dtype, most: int, adapter_dtype: torch.dtype | None
) -> None:
    layer = acting(40, 24, r=4, dtype=dtype, adapter_dtype=adapter_dtype, lora_bias=True)
    whole_numbers(layer, most)
    layer.lora_bias.data.copy_(torch.arange(24))
    layer.scaling = 1.0 + 2.0**-8
    product = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    exact, bias = layer.weight.double() + product, layer.bias.double() + layer.scaling * torch.arange(24)
    twice = (layer.weight.double() + product.to(dtype).double()).to(dtype)
    assert not same_bits(exact.to(dtype), twice), "the numbers do not tell one rounding from two"
    layer.merge()
    assert same_bits(layer.weight.detach(), exact.to(dtype))
    assert same_bits(layer.bias.detach(), bias.to(dtype))


def test_dora_s_merged_weight_has_the_bits_of_one_rounding() -> None:
    """Rows of W + s B A are +-c, so a norm is 4 c for K = 16, and magnitudes are 4 c g: every step is exact in fp32."""
    layer = acting(16, 8, r=2, dtype=torch.bfloat16, use_dora=True)
    signs = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    c = torch.tensor([257.0, 259.0, 261.0, 263.0, 265.0, 267.0, 269.0, 271.0], dtype=torch.float64)
    g = 1.0 + 2.0**-7 + 2.0**-9
    layer.scaling = 1.0
    layer.lora_A.data.copy_(torch.stack([signs[0], torch.ones(16, dtype=torch.float64)]))
    layer.lora_B.data.copy_(torch.stack([c - 256.0, torch.zeros(8, dtype=torch.float64)], 1))
    whole = signs[0] * c.unsqueeze(1)
    layer.weight.data.copy_(whole - layer.lora_B.double() @ layer.lora_A.double())
    layer.lora_magnitude_vector.data.copy_(4.0 * c * g)
    exact = g * whole
    assert not same_bits(exact.to(torch.bfloat16), (g * whole.to(torch.bfloat16).double()).to(torch.bfloat16))
    layer.merge()
    assert same_bits(layer.weight.detach(), exact.to(torch.bfloat16))


@pytest.mark.parametrize("merged", [False, True])
def test_restored_weights_have_the_bits_that_they_were_left_with(merged: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 24, dtype=torch.bfloat16))
    replace_linear(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights=False))
    whole_numbers(model[0], 128)
    layer: Any = model[0]
    exact = layer.weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    base, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    if merged:
        layer.merge()
    restore_linear(model)
    assert type(model[0]) is torch.nn.Linear
    assert same_bits(model[0].weight.detach(), exact.to(torch.bfloat16) if merged else base)
    assert same_bits(model[0].bias.detach(), bias)


# Few tokens x everything else that a layer may have


LAYERS = [
    {"lora_bias": True},
    {"use_dora": True},
    {"activation": "gelu"},
    {"lora_dropout": 0.4},
    {"lora_dropout": 0.4, "use_dora": True},
    {"lora_dropout": 0.4, "activation": "relu", "lora_bias": True},
]


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_a_strided_x_of_few_rows_is_as_a_whole_one(arguments: dict[str, Any], rows: int) -> None:
    """x, dy: columns of larger tensors. The eager backend draws one mask for both."""
    layer = acting(24, 16, dtype=torch.float64, **arguments)
    wide, dwide = torch.randn(rows, 48, dtype=torch.float64), torch.randn(rows, 32, dtype=torch.float64)
    found: list[dict[str, Tensor]] = []
    for x, dy in ((wide[:, ::2], dwide[:, ::2]), (wide[:, ::2].contiguous(), dwide[:, ::2].contiguous())):
        leaves = {"dx": x.detach().requires_grad_()} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
        torch.manual_seed(6)
        with dispatch.use_backend("eager"):
            y = layer(leaves["dx"])
        found.append(dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)) | {"y": y})
    check_all(found[0], found[1], found[1], torch.float64)


# The table


def test_every_pair_of_features_has_its_test_or_the_reason_why_not() -> None:
    pairs = set(combinations(crossings.FEATURES, 2))
    assert len(pairs) == 153
    tested = set().union(*crossings.TESTS.values())
    assert not tested & crossings.REASONS.keys()
    assert tested | crossings.REASONS.keys() == pairs, "a pair has neither, or something else than a feature is named"


def test_every_test_that_the_table_names_is_there() -> None:
    shown = [word for reason in crossings.REASONS.values() for word in reason.split() if "::" in word]
    assert crossings.missing([*crossings.TESTS, *shown]) == []
    assert crossings.missing(["test_crossings.py::test_that_is_not_there", "test_no_file.py::test_it"]) != []


def test_reasons_are_short() -> None:
    assert all(0 < len(reason.split()) <= 25 for reason in crossings.REASONS.values())
