"""The Gluon kernels' launches, the device code emulated on the CPU, against float64; the gate by what is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated_hopper import run_launch
from lora_kernels import reference
from lora_kernels.backends.triton.choose import hopper_blocks as blocks
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.hidden_operand import RANKS, hidden_operand
from lora_kernels.kept import row_words
from lora_kernels.packed_mask import packed_keep_words, unpack
from numerics import check_all, same_bits, three_ways

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton

from lora_kernels.backends.triton.choose import gluon as gate
from lora_kernels.backends.triton.run import descriptors, hopper
from lora_kernels.backends.triton.run.hopper_call import HopperCall, call_fault
from lora_kernels.backends.triton.run.prepared import Launch

SMALL = Machine(capability=90, sm_count=4, shared_memory=blocks.SHARED_MEMORY)  # few programs: each has several tiles
LARGE = Machine(capability=90, sm_count=132, shared_memory=blocks.SHARED_MEMORY)
SEED = (-(2**62) - 12345, 2**63 - 7)
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A layer, and the ways that its passes take; ``x_stride``: the distance of x's rows, 0 for contiguous ones."""

    m: int = 300
    k: int = 520
    n: int = 328
    r: int = 16
    p: float = 0.0
    scaling: float = 0.5
    x_stride: int = 0
    forward: str = "shrink"  # or "plain", "fused"
    backward: str = "joint"  # or "apart", "fused"
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = torch.float32
    affine: bool = False
    turned: bool = False  # A and B are views of other strides
    machine: Machine = SMALL
    tile: str = "big"
    device: str = "cpu"

    def __str__(self) -> str:
        default = Case()
        changed = {f: getattr(self, f) for f in self.__dataclass_fields__ if getattr(self, f) != getattr(default, f)}
        changed = {name: value for name, value in changed.items() if name not in ("machine", "device")}
        return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in changed.items()) or "default"

    @property
    def call(self) -> HopperCall:
        return HopperCall(
            self.machine, torch.device(self.device), self.dtype, self.m, self.n, self.k, self.r, self.p, self.p > 0
        )


CASES = [
    Case(),
    Case(p=0.1),
    *[Case(r=r, p=p) for r in (1, 8, 17, 64, 128) for p in (0.0, 0.5)],
    *[Case(m=m, p=p) for m in (1, 63, 64, 129, 700) for p in (0.0, 0.1)],
    *[Case(k=k, n=n, p=0.1) for k, n in ((264, 8), (256, 264), (648, 400), (8, 264), (520, 1032))],
    *[Case(x_stride=x, p=0.1, turned=True, r=5) for x in (528, 1040)],
    *[
        Case(forward="fused", backward="fused", m=m, n=n, k=k)
        for m in (1, 200, 300)
        for n, k in ((264, 264), (600, 520), (904, 776))
    ],
    *[Case(forward="fused", backward="fused", r=r, n=600) for r in (3, 32, 64, 128)],
    Case(forward="fused", affine=True, n=600, machine=LARGE),
    Case(forward="plain", k=512),
    Case(forward="plain", k=512, x_stride=640, r=64),
    Case(backward="apart", p=0.1, r=64),
    Case(backward="apart", m=129, machine=LARGE),
    *[Case(affine=True, adapter_dtype=BF16, p=p, tile="small", n=400) for p in (0.0, 0.1)],
    *[Case(p=p, machine=LARGE, scaling=-2.0) for p in (0.0, 0.1)],
    *[Case(dtype=torch.float16, r=r, p=p) for r in (5, 17, 64, 128) for p in (0.0, 0.1)],
    Case(dtype=torch.float16, backward="apart", affine=True, machine=LARGE, m=129, turned=True),
    Case(scaling=0.0, p=0.1),
    Case(p=1e-6),
    Case(p=0.99),
]
QUICK = Case(m=200, k=400, n=328, r=5, p=0.1, machine=LARGE)


@dataclass
class Memory:
    """The host code's allocations: filled with NaN (integers: ones), between guards that nothing may touch."""

    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    GUARD = 64

    def new(self, c: Any, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.empty(size + 2 * self.GUARD, dtype=dtype).view(torch.uint8).fill_(0xFF).view(dtype)
        self.kept.append((whole, whole[self.GUARD : self.GUARD + size]))
        return self.kept[-1][1].view(shape)

    def check(self) -> None:
        """Nothing was written outside of what was allocated."""
        for whole, _ in self.kept:
            guards = torch.cat([whole[: self.GUARD], whole[-self.GUARD :]])
            assert bool((guards.view(torch.uint8) == 0xFF).all()), "written outside of a tensor"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Launches run the emulation, on guarded memory."""
    found = Memory()
    monkeypatch.setattr(Launch, "__call__", run_launch)
    monkeypatch.setattr(hopper, "_new", found.new)
    descriptors.forget()
    yield found
    descriptors.forget()
    found.check()


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    gain: Tensor | None
    bias: Tensor | None


def make(case: Case) -> Inputs:
    """The adapter's term is about as large as the base's."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape) * scale).to(case.device, dtype)

    x = normal(case.m, max(case.x_stride, case.k))[:, : case.k]
    lora_a = normal(case.r, case.k, scale=case.k**-0.5, dtype=case.adapter_dtype)
    lora_b = normal(case.n, case.r, scale=2 * case.r**-0.5, dtype=case.adapter_dtype)
    if case.turned:
        lora_a, lora_b = lora_a.T.contiguous().T, lora_b.T.contiguous().T
    weight, dy = normal(case.n, case.k, scale=case.k**-0.5), normal(case.m, case.n)
    gain, bias = (normal(case.n, dtype=torch.float32), normal(case.n)) if case.affine else (None, None)
    return Inputs(x, weight, lora_a, lora_b, dy, gain, bias)


def run(case: Case, i: Inputs) -> dict[str, Tensor]:
    """Both passes by the case's ways; h and dh are what their operands add up to."""
    c = case.call
    stream = torch.cuda.current_stream().cuda_stream if case.device == "cuda" else None
    rank = c.operand.rank
    state = torch.tensor(SEED, device=case.device) if case.p else None
    scale = case.scaling * c.keep_scale
    shrink, fused = blocks.shrink_configs(rank, c.wide)[0], blocks.product_h_configs(rank)[0]
    counters = max(hopper.shrink_counters(shrink, c, c.k), hopper.shrink_counters(shrink, c, c.n))
    counters = max(counters, hopper.product_h_counters(fused, c))
    strides = (i.lora_a.stride(), i.lora_b.stride()) if case.turned else None
    a, b, zeros = hopper.pack_step(c, strides, counters)(stream, i.lora_a, i.lora_b)
    words, tile = None, next(g for g in blocks.forward_configs() if g.name == case.tile)
    if case.forward == "fused":
        y, h = hopper.product_h_step(fused, c)(stream, i.x, i.weight, a, b, zeros, scale, i.gain, i.bias)
    else:
        if case.forward == "plain":
            plain = blocks.plain_shrink_configs(rank)[0]
            h = hopper.plain_shrink_step(plain, c, i.x.stride(0))(stream, i.x, a, scale)
        else:
            h, words = hopper.shrink_step(shrink, c)(stream, i.x, a, zeros, state, scale)
        y = hopper.product_step(tile, c)(stream, i.x, i.weight, h, b, i.gain, i.bias)
    dy = i.dy if i.gain is None else (i.gain * i.dy).to(case.dtype)
    outer_db = blocks.outer_configs(rank, False, c.wide)[0]
    outer_da = blocks.outer_configs(rank, words is not None, c.wide)[0]
    dx = None
    if case.backward == "fused":
        dx, dh = hopper.dx_h_step(fused, c)(stream, dy, i.weight, b, a, zeros, scale, hopper.halves(fused, c))
        db_parts = hopper.db_step(outer_db, c)(stream, dy, h)
    elif case.backward == "apart":
        dh = hopper.dh_step(shrink, c)(stream, dy, b, zeros, scale)
        db_parts = hopper.db_step(outer_db, c)(stream, dy, h)
    else:
        dh, db_parts = hopper.dh_db_step(blocks.dh_db_configs(rank, c.wide)[0], c)(stream, dy, b, h, scale)
    if dx is None:
        able = [g for g in blocks.dx_configs(words is not None) if g.takes(c.n)]
        config = next((g for g in able if g.name == case.tile), able[0])
        dx = hopper.dx_step(config, c)(stream, dy, i.weight, dh, a, words)
    da_parts = hopper.da_step(outer_da, c)(stream, i.x, dh, words)
    da, db = hopper.reduce_grads_step(c, case.adapter_dtype, case.adapter_dtype)(stream, da_parts, db_parts)
    if case.device == "cpu":  # on a GPU this would wait, and two streams would not meet
        assert int(zeros.abs().sum()) == 0, "counters are left zero"
    return {"y": y, "h": summed(h, rank, case.r), "dh": summed(dh, rank, case.r), "dx": dx, "da": da, "db": db}


def summed(operand: Tensor, rank: int, r: int) -> Tensor:
    high, low = operand[:, :rank].double(), operand[:, rank:].double()
    assert not bool((high + low)[:, r:].any()), "what fills the rank up is zero"
    return (high + low)[:, :r].float()


def formulas(case: Case, i: Inputs, number: Callable[[Tensor], Any]) -> dict[str, Any]:
    adapter = reference.adapter_dtype(case.dtype)
    x, weight, a, b = (number(t) for t in (i.x, i.weight, i.lora_a.to(adapter), i.lora_b.to(adapter)))
    gain = None if i.gain is None else number(i.gain)
    bias = None if i.bias is None else number(i.bias)
    dy = number(i.dy if i.gain is None else (i.gain * i.dy).to(case.dtype))
    seed = torch.tensor(SEED, device=case.device)
    mask = unpack(packed_keep_words(seed, case.m, case.k, case.p), case.k) if case.p else None
    y, h = reference.forward(x, weight, a, b, bias, case.scaling, mask, case.p, gain)
    g = reference.backward(dy, x, weight, a, b, case.scaling, mask, case.p)
    keep = 1.0 / (1.0 - case.p)
    return {"y": y, "h": case.scaling * h, "dh": keep * (case.scaling * (dy @ b)), "dx": g.dx, "da": g.da, "db": g.db}


def check(case: Case) -> None:
    i = make(case)
    exact, yardstick, errors = three_ways(case.dtype, lambda number: formulas(case, i, number))
    check_all(run(case, i), exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [Case(p=0.1), Case(forward="fused", backward="fused", n=600)], ids=str)
def test_the_order_of_programs_changes_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import emulated_hopper

    i = make(case)
    first = run(case, i)
    monkeypatch.setattr(emulated_hopper.random, "Random", lambda seed, kind=emulated_hopper.random.Random: kind(7))
    second = run(case, i)
    assert [name for name in first if not same_bits(first[name], second[name])] == []


def test_every_configuration_gives_the_same() -> None:
    """All of hopper_blocks.py in turn for rank 16 and 64: by the policy, whichever is taken."""
    for rank in (16, 64):
        case = replace(QUICK, r=rank, k=512)
        i = make(case)
        exact, yardstick, errors = three_ways(BF16, lambda number: formulas(case, i, number))  # noqa: B023
        c = case.call
        a, b, zeros = hopper.pack_step(c, None, 64)(None, i.lora_a, i.lora_b)
        scale, state = case.scaling * c.keep_scale, torch.tensor(SEED)
        h, words = hopper.shrink_step(blocks.shrink_configs(rank)[0], c)(None, i.x, a, zeros, state, scale)
        dh, _ = hopper.dh_db_step(blocks.dh_db_configs(rank)[0], c)(None, i.dy, b, h, scale)
        found: list[dict[str, Tensor]] = []
        for shrink in blocks.shrink_configs(rank):
            found += [{"h": summed(hopper.shrink_step(shrink, c)(None, i.x, a, zeros, state, scale)[0], rank, rank)}]
            found += [{"dh": summed(hopper.dh_step(shrink, c)(None, i.dy, b, zeros, scale), rank, rank)}]
        for product in blocks.forward_configs():
            found += [{"y": hopper.product_step(product, c)(None, i.x, i.weight, h, b)}]
        for product in blocks.dx_configs(True):
            found += [{"dx": hopper.dx_step(product, c)(None, i.dy, i.weight, dh, a, words)}]
        reduce = hopper.reduce_grads_step(c, torch.float32, None), hopper.reduce_grads_step(c, None, torch.float32)
        for outer in blocks.outer_configs(rank, True):
            found += [{"da": reduce[0](None, hopper.da_step(outer, c)(None, i.x, dh, words), None)[0]}]
        for outer in blocks.outer_configs(rank, False):
            found += [{"db": reduce[1](None, None, hopper.db_step(outer, c)(None, i.dy, h))[1]}]
        for joint in blocks.dh_db_configs(rank):
            some_dh, parts = hopper.dh_db_step(joint, c)(None, i.dy, b, h, scale)
            found += [{"dh": summed(some_dh, rank, rank), "db": reduce[1](None, None, parts)[1]}]
        for results in found:
            check_all(results, exact, yardstick, BF16, expected=errors)


@pytest.mark.parametrize("m", [1, 300])
def test_the_rounded_form_gives_y(m: int) -> None:
    """The form that was measured, whose halves of h are rounded: y passes all the same."""
    case = Case(m=m, n=600)
    c, i = case.call, make(case)
    exact, yardstick, errors = three_ways(BF16, lambda number: formulas(case, i, number))
    config = replace(blocks.product_h_configs(16)[0], exact=False)
    a, b, flags = hopper.pack_step(c, None, hopper.product_h_counters(config, c))(None, i.lora_a, i.lora_b)
    y, _ = hopper.product_h_step(config, c)(None, i.x, i.weight, a, b, flags, case.scaling)
    check_all({"y": y}, exact, yardstick, BF16, expected=errors)


# ---- faults in the launches are seen


def exchange(first: int, second: int) -> Callable[..., Any]:
    """A Launch with two of its static arguments exchanged."""

    def fault(launch: Launch) -> None:
        static = list(launch.static)
        static[first], static[second] = static[second], static[first]
        launch.static = tuple(static)

    return fault


def changed(place: int, by: Callable[[Any], Any]) -> Callable[[Launch], None]:
    def fault(launch: Launch) -> None:
        launch.static = (*launch.static[:place], by(launch.static[place]), *launch.static[place + 1 :])

    return fault


def smaller(axis: int) -> Callable[[Launch], None]:
    def fault(launch: Launch) -> None:
        launch.grid = tuple(size - (index == axis) for index, size in enumerate(launch.grid))  # type: ignore[assignment]

    return fault


def zeroing_left_out(launch: Launch) -> None:
    static = list(launch.static)
    static[6] = 1  # of the counters the first alone
    launch.static = tuple(static)


FAULTS: dict[str, tuple[str, Callable[[Launch], None]]] = {
    "blocks of y exchanged": ("hopper_product_kernel", exchange(3, 4)),
    "M and N exchanged": ("hopper_product_kernel", exchange(0, 1)),
    "N and K exchanged": ("hopper_product_kernel", exchange(1, 2)),
    "the low-rank step left out": ("hopper_product_kernel", changed(8, lambda extra: extra - 1)),
    "W turned": ("hopper_product_kernel", changed(10, lambda turned: not turned)),
    "a block of columns too few of pack": ("hopper_pack_kernel", smaller(0)),
    "a wrong rank": ("hopper_pack_kernel", changed(7, lambda rank: rank - 1)),
    "counters not zeroed": ("hopper_pack_kernel", zeroing_left_out),
    "a row block too few": ("hopper_shrink_kernel", smaller(0)),
    "a share of K too few": ("hopper_shrink_kernel", smaller(1)),
    "M too small": ("hopper_shrink_kernel", changed(0, lambda m: m - 1)),
    "K too small": ("hopper_shrink_kernel", changed(1, lambda k: k - 128)),
    "h's rows too short": ("hopper_shrink_kernel", changed(5, lambda stride: stride // 2)),
    "no mask": ("hopper_shrink_kernel", changed(8, lambda drop: not drop)),
    "A turned": ("hopper_shrink_kernel", changed(9, lambda by_row: not by_row)),
    "too small a chunk": ("hopper_dh_db_kernel", changed(2, lambda chunk: chunk - 1)),
    "a column chunk too few": ("hopper_dh_db_kernel", smaller(0)),
    "N too small": ("hopper_dh_db_kernel", changed(1, lambda n: n - 8)),
    "da without the mask": ("hopper_outer_kernel", changed(7, lambda masked: not masked)),
    "a row chunk too few": ("hopper_outer_kernel", smaller(1)),
    "da's columns too few": ("hopper_outer_kernel", changed(1, lambda n: n - 8)),
    "a part too few": ("hopper_reduce_dh_kernel", changed(1, lambda parts: parts - 1)),
    "a block of rows too few": ("hopper_reduce_dh_kernel", smaller(0)),
    "a part of da too few": ("hopper_reduce_grads_kernel", changed(2, lambda parts: parts - 1)),
    "a block of db too few": ("hopper_reduce_grads_kernel", smaller(0)),
}


def check_with_memory(case: Case, memory: Memory) -> None:
    check(case)
    memory.check()


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_launch_is_seen(name: str, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault, in each launch of its kernel, makes the check above fail."""
    kernel, fault = FAULTS[name]
    met = []
    made = Launch.__init__

    def faulty(self: Launch, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if getattr(self.kernel, "fn", self.kernel).__name__ == kernel:
            fault(self)
            met.append(self)

    monkeypatch.setattr(Launch, "__init__", faulty)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_with_memory(QUICK, memory)
    memory.kept.clear()
    assert met


def test_flags_that_are_not_zero_are_seen() -> None:
    case = Case(forward="fused", backward="fused", n=600)
    c, i = case.call, make(case)
    config = blocks.product_h_configs(16)[0]
    a, b, _ = hopper.pack_step(c)(None, i.lora_a, i.lora_b)
    flags = torch.ones(hopper.product_h_counters(config, c), dtype=torch.int32)
    with pytest.raises(AssertionError, match="flags start at zero"):
        hopper.product_h_step(config, c)(None, i.x, i.weight, a, b, flags, 1.0)


# ---- what is there, and what fits


def test_nothing_is_missing_here() -> None:
    """Of Triton 3.6 and 3.7. The Gluon of another release may differ, as 3.9.0's does, and that is told."""
    measured = triton.__version__.startswith(("3.6.", "3.7."))
    for told in (gate.why_not(90), gate.why_not(None)):
        assert told is None or (not measured and "plain Triton kernels run" in told)


def test_asking_imports_triton_only_when_asked() -> None:
    asking = "import sys, lora_kernels.backends.triton.choose.gluon as gate; assert 'triton' not in sys.modules"
    code = f"{asking}; print(gate.why_not(80))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "compute capability 9.0" in done.stdout, done.stderr


@pytest.mark.parametrize("capability", [80, 89, 100, 120, 0])
def test_other_gpus_are_told(capability: int) -> None:
    assert "compute capability 9.0" in (gate.why_not(capability) or "")


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("triton.experimental.gluon.language", "NVMMASharedLayout"),
        ("triton.experimental.gluon.language", "warp_specialize"),
        ("triton.experimental.gluon.language.nvidia.hopper", "warpgroup_mma"),
        ("triton.experimental.gluon.language.nvidia.hopper.mbarrier", "arrive"),
        ("triton.experimental.gluon.nvidia.hopper", "TensorDescriptor"),
        ("triton.experimental.gluon.language", "shared_memory_descriptor"),
        ("triton.experimental.gluon.language.shared_memory_descriptor", "_reinterpret"),  # as Triton 3.9.0
    ],
)
def test_a_release_that_lacks_something_is_told(name: str, attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{name}.{attribute}")
    gate._lack.cache_clear()
    told = gate.why_not(90)
    monkeypatch.undo()
    gate._lack.cache_clear()
    assert told is not None
    assert attribute in told
    assert "plain Triton kernels run" in told


def test_a_release_with_other_arguments_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.experimental.gluon import language

    monkeypatch.setattr(language, "warp_specialize", lambda args, default, workers: None)
    gate._lack.cache_clear()
    told = gate.why_not(90)
    monkeypatch.undo()
    gate._lack.cache_clear()
    assert "warp_specialize takes other arguments" in (told or "")


@pytest.mark.parametrize("rank", RANKS)
def test_every_configuration_fits(rank: int) -> None:
    """In shared memory (as many programs as it says on one multiprocessor), and there is one of each kind."""
    lists = [blocks.product_h_configs(rank), blocks.shrink_configs(rank), blocks.dh_db_configs(rank)]
    lists += [blocks.plain_shrink_configs(rank), *(blocks.outer_configs(rank, masked) for masked in (False, True))]
    lists += [blocks.shrink_configs(rank, True), blocks.dh_db_configs(rank, True)]
    lists += [blocks.outer_configs(rank, masked, True) for masked in (False, True)]
    lists += [blocks.forward_configs(), blocks.dx_configs(False), blocks.dx_configs(True)]  # type: ignore[list-item]
    assert all(lists)
    for config in (config for configs in lists for config in configs):
        assert config.shared_memory <= blocks.SHARED_MEMORY
        assert getattr(config, "ctas", 1) * (config.shared_memory + 1024) <= 233472


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": torch.float32}, "torch.float32"),
        ({"r": 129}, "rank 129 is not from 1 to 128"),
        ({"k": 4100}, "in_features 4100"),
        ({"n": 12}, "out_features 12"),
        ({"m": 2**25, "r": 128}, "32-bit offsets"),
    ],
)
def test_what_they_do_not_take_is_told(change: dict[str, Any], sentence: str) -> None:
    call = HopperCall(LARGE, torch.device("cpu"), BF16, 8192, 4096, 4096, 16)
    assert call_fault(call) is None
    assert sentence in (call_fault(replace(call, **change)) or "")


@pytest.mark.parametrize(
    ("make_tensor", "sentence"),
    [
        (lambda: torch.zeros(8, 64, dtype=BF16).T, "not in one piece"),
        (lambda: torch.zeros(8 * 64 + 1, dtype=BF16)[1:].view(8, 64), "does not start on a 16-byte boundary"),
        (lambda: torch.zeros(8, 68, dtype=BF16)[:, :64], "136 bytes apart"),
        (lambda: torch.zeros(1, 64, dtype=BF16).expand(8, 64), "0 bytes apart"),
    ],
)
def test_tensors_that_tma_cannot_read_are_told(make_tensor: Callable[[], Tensor], sentence: str) -> None:
    assert sentence in (descriptors.operand_fault("x", make_tensor()) or "")
    assert descriptors.operand_fault("x", torch.zeros(8, 64, dtype=BF16)) is None


def test_descriptors_are_kept_by_all_that_they_say() -> None:
    """The same tensor gives the same one, another address, dtype, shape, stride or block another; no memory is kept."""
    tensor = torch.zeros(64, 128, dtype=BF16)
    first = descriptors.descriptor(tensor, (64, 64))
    assert descriptors.descriptor(tensor[:], (64, 64)) is first
    others = [tensor[8:], tensor[:, :64], tensor.view(torch.float16), tensor.as_strided((64, 128), (64, 1))]
    made = [descriptors.descriptor(other, (64, 64)) for other in others] + [descriptors.descriptor(tensor, (64, 32))]
    assert len({id(found) for found in (first, *made)}) == 6
    assert not any(isinstance(value, Tensor) for value in vars(first).values())


@pytest.mark.parametrize(("r", "columns"), [(1, 32), (16, 32), (17, 64), (64, 128), (128, 256)])
def test_the_operands_layout(r: int, columns: int) -> None:
    found = hidden_operand(BF16, r)
    assert found is not None
    assert (found.columns, found.bytes_per_token) == (columns, 2 * columns)
    assert found.columns % found.step == 0 == found.adapter_columns % found.step
    assert hidden_operand(torch.float32, r) is None


def test_words_have_rows_on_boundaries() -> None:
    assert [row_words(columns) for columns in (1, 128, 129, 4096)] == [4, 4, 8, 128]
