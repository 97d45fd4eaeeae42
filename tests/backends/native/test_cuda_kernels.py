"""The CUDA kernels' bodies, run on the host block by block (``native_host``): no GPU is needed, and none is replaced.

What a GPU alone can show is left out: that the asm does what the PTX manual says, and how long it takes.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import DOUBLE, MIXED, SHAPES, Case, make, measures
from lora_kernels.accuracy import sum_error
from lora_kernels.reference import philox_keep_mask
from native_host.emulation import GRADIENT, SHRINK, Dropout, Emulation, compile_host
from numerics import check, check_all, same_bits

SEED = torch.tensor([0x0123456789ABCDEF, -7])
HALF = (torch.float16, torch.bfloat16)
LARGE = [
    Case(m=130, k=300, n=280, r=20, p=0.1, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(m=70, k=600, n=136, r=70, p=0.2, dtype=torch.float16),
    Case(m=600, k=72, n=200, r=5, p=0.1, dtype=torch.bfloat16),
    Case(m=600, k=40, n=72, r=33, p=0.1),
    Case(m=1, k=1100, n=64, r=16, dtype=torch.bfloat16),
    Case(m=300, k=33, n=65, r=40, p=0.3, dtype=torch.float64),
]
RAGGED = [replace(case, dtype=dtype) for case in SHAPES for dtype in HALF if case.m <= 40]
EMPTY = [Case(m=0), Case(m=0, r=20), Case(m=0, dtype=torch.bfloat16, p=0.1)]
CASES = [*SHAPES, *RAGGED, *MIXED, *DOUBLE, *LARGE, *EMPTY]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_host(tmp_path_factory.mktemp("cuda_host"))))


def results(case: Case, emulation: Emulation, fused: bool = True) -> dict[str, Tensor]:
    i = make(case)
    tensors = [None if t is None else t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy)]
    return emulation.run(*tensors, case.scaling, case.p, SEED if case.p else None, fused)  # type: ignore[arg-type]


def judged(case: Case, actual: dict[str, Tensor]) -> None:
    """The numerics policy, with the specification's mask."""
    inputs = make(case)
    mask = philox_keep_mask(SEED, case.m, case.k, case.p) if case.p else None
    exact, yardstick, errors = measures(case, inputs, mask)
    found = {name: value for name, value in actual.items() if name != "h"}
    check_all(found, exact, yardstick, case.dtype, expected=errors)


def judged_hidden(emulation: Emulation) -> None:
    """fp16 holds them in a high and a low part: an fp32 gradient is as good as an fp32 product's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 72, generator=generator).half()
    hidden = torch.randn(300, 20, generator=generator)
    actual = emulation.gradient(x, hidden, Dropout(None, 0), 1.0, False, torch.empty(20, 72))
    expected = sum_error(hidden.t(), x)
    exact, yardstick = hidden.double().t() @ x.double(), hidden.t() @ x.float()
    check("da", actual, exact, yardstick, torch.float16, expected=expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_reference(library: ctypes.CDLL, case: Case) -> None:
    judged(case, results(case, Emulation(library)))


@pytest.mark.parametrize("case", [c for c in CASES if c.r <= 16 and c.dtype != torch.float64], ids=str)
def test_large_instances_and_separate_passes(library: ctypes.CDLL, case: Case) -> None:
    """The instances for groups of 64 ranks with fewer, and db without the fused kernel."""
    judged(case, results(case, Emulation(library, small=False), fused=False))


@pytest.mark.parametrize("case", [*MIXED, *DOUBLE, *LARGE], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_no_warp_relies_on_the_order_of_warps(library: ctypes.CDLL, case: Case, fused: bool) -> None:
    """Warps run one after the other between barriers, in both orders: a missing barrier changes a result."""
    up, down = (results(case, Emulation(library, downwards=downwards), fused) for downwards in (False, True))
    assert all(same_bits(up[name], down[name]) for name in up)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 17), (33, 129), (9, 4100), (0, 4), (4, 0)])
@pytest.mark.parametrize("p", [0.0, 2**-18, 2**-16, 0.1, 0.5, 0.75, 0.99999])
def test_the_mask_is_the_reference_s(library: ctypes.CDLL, rows: int, columns: int, p: float) -> None:
    expected_mask = philox_keep_mask(SEED, rows, columns, p)
    assert torch.equal(Emulation(library).mask(SEED, rows, columns, p), expected_mask)


@pytest.mark.parametrize("dtype", HALF)
def test_unaligned_rows(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """x and dy one element into a row of odd stride: narrower loads, the same bits."""
    inputs = make(Case(dtype=dtype))
    x, weight, a, b, dy = (t.detach() for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.dy))
    shifted = [torch.nn.functional.pad(t, (1, 4))[:, 1:-4] for t in (x, dy)]
    arguments = (weight, a, b, None)
    plain = Emulation(library).run(x, *arguments, dy, 0.5, 0.1, SEED)
    moved = Emulation(library).run(shifted[0], *arguments, shifted[1], 0.5, 0.1, SEED)
    assert shifted[0].data_ptr() % 16
    assert all(same_bits(plain[name], moved[name]) for name in plain)


def test_hidden_products_keep_the_bits_of_fp32(library: ctypes.CDLL) -> None:
    judged_hidden(Emulation(library))


@pytest.mark.parametrize("layout", ["transposed", "every second", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapters_of_any_layout(library: ctypes.CDLL, layout: str, dtype: torch.dtype) -> None:
    inputs = make(Case(dtype=torch.bfloat16, adapter_dtype=dtype, k=72))
    x, weight, a, b, dy = (t.detach() for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.dy))
    laid = {
        "transposed": lambda t: t.t().contiguous().t(),
        "every second": lambda t: torch.stack([t, -t], dim=2).flatten(1)[:, ::2],
        "contiguous": lambda t: t.clone(),
    }[layout]
    plain = Emulation(library).run(x, weight, a, b, None, dy, 0.5, 0.0, None)
    other = Emulation(library).run(x, weight, laid(a), laid(b), None, dy, 0.5, 0.0, None)
    assert all(same_bits(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("fill", [float("inf"), -float("inf"), float("nan")])
def test_infinities_stay_where_they_are(library: ctypes.CDLL, fill: float) -> None:
    """One infinite or NaN token: its own row of y is not finite, no other row is touched."""
    case = Case(dtype=torch.bfloat16, r=5)
    inputs = make(case)
    x = inputs.x.detach().clone()
    x[7, 3] = fill
    others = [t.detach() for t in (inputs.weight, inputs.lora_a, inputs.lora_b, inputs.bias, inputs.dy)]
    bad, good = (Emulation(library).run(t, *others, 0.5, 0.0, None) for t in (x, inputs.x.detach()))
    rows = [row for row in range(case.m) if row != 7]
    assert same_bits(bad["y"][rows], good["y"][rows])
    assert not torch.isfinite(bad["y"][7]).any()


@pytest.mark.parametrize("kernel", [SHRINK, GRADIENT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_cover_the_sum_once(library: ctypes.CDLL, kernel: int, dtype: torch.dtype) -> None:
    """In order, without overlap, none empty, of whole steps; and never more blocks than twice what keeps a GPU busy."""
    emulation = Emulation(library)
    for extent in (0, 1, 63, 64, 65, 1000, 4096, 2**20, 2**31 + 5):
        for other in (1, 64, 5000):
            sizes = (other, extent) if kernel == SHRINK else (extent, other)
            slices = emulation.slices(kernel, dtype, *sizes, 16)
            assert slices.count * slices.length >= extent
            assert slices.count == 1 or (slices.count - 1) * slices.length < extent
            assert slices.length % 32 == 0
            assert 1 <= slices.count <= 512


FINITE_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("dtype", HALF)
def test_conversions_round_as_torch_does(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The host's stand-ins for the device's conversion instructions: all 16-bit numbers, and fp32 between them."""
    all_numbers = FINITE_BITS.view(dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    between = torch.cat([(all_numbers.float() + all_numbers.float().roll(-1)) / 2, bits.view(torch.float32)])
    assert same_finite(converted(library, all_numbers, torch.float32), all_numbers.float())
    assert same_finite(converted(library, between, dtype), between.to(dtype))


def converted(library: ctypes.CDLL, source: Tensor, to: torch.dtype) -> Tensor:
    kinds = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
    out = torch.empty(source.shape, dtype=to)
    pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    library.lora_convert(kinds[source.dtype], kinds[to], *pointers, ctypes.c_int64(source.numel()))
    return out


def same_finite(left: Tensor, right: Tensor) -> bool:
    """Equal bits, but for what is NaN in both."""
    nan = right.isnan()
    return bool((left.isnan() == nan).all()) and same_bits(left[~nan], right[~nan])


def test_the_host_refuses_to_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="g\\+\\+ is not installed"):
        compile_host(tmp_path)
