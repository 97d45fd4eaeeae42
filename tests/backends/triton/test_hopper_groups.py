"""The Gluon kernels of a group: launches, the device code emulated on the CPU, against float64 and single layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated_hopper_groups
from emulated_hopper import run_launch
from lora_kernels import reference
from lora_kernels.backends.triton.choose import hopper_blocks
from lora_kernels.backends.triton.choose import hopper_group_blocks as blocks
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.packed_mask import packed_keep_words, unpack
from numerics import check_all, same_bits, three_ways
from test_hopper import BF16, LARGE, SEED, SMALL, Memory, changed, exchange, smaller, summed

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from lora_kernels.backends.triton.run import descriptors, hopper
from lora_kernels.backends.triton.run import hopper_groups as groups
from lora_kernels.backends.triton.run.hopper_call import HopperCall
from lora_kernels.backends.triton.run.prepared import Launch

assert emulated_hopper_groups.EMULATED


@dataclass(frozen=True)
class Case:
    """Layers of one x; ``biases``: which members have one."""

    m: int = 200
    k: int = 264
    ns: tuple[int, ...] = (328, 136, 72)
    rs: tuple[int, ...] = (16, 16, 16)
    p: float = 0.0
    scalings: tuple[float, ...] = (0.5, -2.0, 1.0, 0.75)
    biases: tuple[bool, ...] = (False, False, False, False)
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = torch.float32
    machine: Machine = SMALL
    tile: str = "big"
    x_stride: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        default = Case()
        changed = {f: getattr(self, f) for f in self.__dataclass_fields__ if getattr(self, f) != getattr(default, f)}
        changed = {name: value for name, value in changed.items() if name != "device"}
        changed = {name: getattr(value, "sm_count", value) for name, value in changed.items()}
        return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in changed.items()) or "default"

    @property
    def group(self) -> groups.Group:
        device = torch.device(self.device)
        return tuple(
            HopperCall(self.machine, device, self.dtype, self.m, n, self.k, r, self.p, self.p > 0)
            for n, r in zip(self.ns, self.rs, strict=True)
        )


CASES = [
    *[Case(p=p) for p in (0.0, 0.1)],
    *[Case(ns=(264, 520), rs=(16, 16), p=p, machine=LARGE) for p in (0.0, 0.5)],
    *[Case(ns=(136, 72, 8, 264), rs=(8, 16, 3, 1), p=p) for p in (0.0, 0.1)],
    *[Case(m=m, k=k, p=p, machine=LARGE) for m, k in ((1, 8), (129, 400), (700, 648)) for p in (0.0, 0.1)],
    *[Case(rs=rs, ns=(136, 264, 72)[: len(rs)], p=p) for rs in ((5, 17, 33), (64, 16), (128, 8)) for p in (0.0, 0.1)],
    *[Case(biases=(True, False, True), tile="small", adapter_dtype=BF16, p=p) for p in (0.0, 0.1)],
    *[Case(dtype=torch.float16, rs=rs, ns=(136, 264, 72)[: len(rs)], p=p)
      for rs in ((16, 16, 16), (64, 17)) for p in (0.0, 0.1)],
    Case(dtype=torch.float16, biases=(False, True, True), machine=LARGE, m=129),
    Case(x_stride=528, p=0.1, scalings=(0.0, 1.0, 1.0)),
    Case(p=1e-6),
    Case(p=0.99),
]  # fmt: skip
QUICK = Case(p=0.1, machine=LARGE, k=400, rs=(5, 16, 17), biases=(True, False, True))


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Launches run the emulation, on guarded memory."""
    found = Memory()
    monkeypatch.setattr(Launch, "__call__", run_launch)
    monkeypatch.setattr(groups, "_new", found.new)
    monkeypatch.setattr(hopper, "_new", found.new)
    descriptors.forget()
    yield found
    descriptors.forget()
    found.check()


@dataclass
class Inputs:
    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    dys: list[Tensor]
    biases: list[Tensor | None]
    states: list[Tensor]


def make(case: Case) -> Inputs:
    """Each member's adapter term is about as large as its base's."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape) * scale).to(case.device, dtype)

    members = list(zip(case.ns, case.rs, strict=True))
    return Inputs(
        normal(case.m, max(case.x_stride, case.k))[:, : case.k],
        [normal(n, case.k, scale=case.k**-0.5) for n in case.ns],
        [normal(r, case.k, scale=case.k**-0.5, dtype=case.adapter_dtype) for r in case.rs],
        [normal(n, r, scale=2 * r**-0.5, dtype=case.adapter_dtype) for n, r in members],
        [normal(case.m, n) for n in case.ns],
        [normal(n) if has else None for n, has in zip(case.ns, case.biases, strict=False)],
        [torch.tensor([SEED[0] + i, SEED[1] - 7 * i], device=case.device) for i in range(len(case.ns))],
    )


def run(case: Case, i: Inputs) -> dict[str, Tensor]:
    """Both passes; h and dh are what their operands add up to."""
    group = case.group
    c = group[0]
    stream = torch.cuda.current_stream().cuda_stream if case.device == "cuda" else None
    ranks = tuple(one.operand.rank for one in group)
    scales = [scaling * c.keep_scale for scaling in case.scalings[: len(group)]]
    shrink = blocks.group_shrink_configs(ranks, c.masked, c.wide)[0]
    counters = groups.group_shrink_counters(shrink, group)
    a, b, zeros = groups.group_pack_step(group, counters)(stream, i.lora_as, i.lora_bs)
    h, words = groups.group_shrink_step(shrink, group)(stream, i.x, a, zeros, i.states if case.p else None, scales)
    tile = next(g for g in blocks.group_forward_configs() if g.name == case.tile)
    ys = groups.group_product_step(tile, group)(stream, i.x, i.weights, h, b, i.biases)
    joint = blocks.group_dh_db_configs(ranks, c.wide)[0]
    dh, db_parts = groups.group_dh_db_step(joint, group)(stream, i.dys, b, h, scales)
    if words is not None and len(group) == 4:  # whose masked terms have no room: two by two
        both = (dx_of(case, slice(0, 2), i, dh, a, words), dx_of(case, slice(2, 4), i, dh, a, words))
        dx = both[0] + both[1]
    else:
        dx = dx_of(case, slice(None), i, dh, a, words)
    da = blocks.group_da_configs(ranks, words is not None, c.wide)[0]
    da_parts = groups.group_da_step(da, group)(stream, i.x, dh, words)
    reduce = groups.group_reduce_grads_step(group, case.adapter_dtype, case.adapter_dtype)
    das, dbs = reduce(stream, da_parts, db_parts)
    if case.device == "cpu":
        assert zeros is None or int(zeros.abs().sum()) == 0, "counters are left zero"
    found = {"dx": dx}
    for number, (rank, r) in enumerate(zip(ranks, case.rs, strict=True)):
        found |= {f"y{number}": ys[number], f"da{number}": das[number], f"db{number}": dbs[number]}
        found |= {f"h{number}": summed(h[number], rank, r), f"dh{number}": summed(dh[number], rank, r)}
    return found


def dx_of(case: Case, some: slice, i: Inputs, dh: list[Tensor], a: list[Tensor], words: list[Tensor] | None) -> Tensor:
    """dx of some of the members."""
    group, stream = case.group[some], torch.cuda.current_stream().cuda_stream if case.device == "cuda" else None
    extra = tuple(c.operand.adapter_columns // c.operand.step for c in group)
    configs = blocks.group_dx_configs(len(group), words is not None)
    able = [g for g in configs if g.takes(tuple(c.n for c in group), extra)]
    config = next((g for g in able if g.name == case.tile), able[0])
    some_words = None if words is None else words[some]
    return groups.group_dx_step(config, group)(stream, i.dys[some], i.weights[some], dh[some], a[some], some_words)


def formulas(case: Case, i: Inputs, number: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Each member by the reference; dx is the sum, which the plain way rounds once a member."""
    adapter = reference.adapter_dtype(case.dtype)
    keep = 1.0 / (1.0 - case.p)
    found: dict[str, Any] = {}
    x = number(i.x)
    dx: Any = None
    for j, scaling in enumerate(case.scalings[: len(case.ns)]):
        weight, dy, a, b = (
            number(t) for t in (i.weights[j], i.dys[j], i.lora_as[j].to(adapter), i.lora_bs[j].to(adapter))
        )
        bias = i.biases[j] if j < len(i.biases) else None
        mask = unpack(packed_keep_words(i.states[j], case.m, case.k, case.p), case.k) if case.p else None
        y, h = reference.forward(x, weight, a, b, None if bias is None else number(bias), scaling, mask, case.p, None)
        g = reference.backward(dy, x, weight, a, b, scaling, mask, case.p)
        dx = g.dx if dx is None else dx + g.dx
        found |= {f"y{j}": y, f"h{j}": scaling * h, f"dh{j}": keep * (scaling * (dy @ b))}
        found |= {f"da{j}": g.da, f"db{j}": g.db}
    return found | {"dx": dx}


def check(case: Case) -> None:
    i = make(case)
    exact, yardstick, errors = three_ways(case.dtype, lambda number: formulas(case, i, number))
    check_all(run(case, i), exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    check(case)


def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    import emulated_hopper

    i = make(QUICK)
    first = run(QUICK, i)
    monkeypatch.setattr(emulated_hopper.random, "Random", lambda seed, kind=emulated_hopper.random.Random: kind(7))
    second = run(QUICK, i)
    assert [name for name in first if not same_bits(first[name], second[name])] == []


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_is_what_a_layer_by_itself_keeps(p: float) -> None:
    """h's operand and the mask's words of each member: so forward and backward may choose apart."""
    case = replace(QUICK, p=p)
    i, group = make(case), case.group
    ranks = tuple(c.operand.rank for c in group)
    config = blocks.group_shrink_configs(ranks, p > 0)[0]
    a, _, zeros = groups.group_pack_step(group, 64)(None, i.lora_as, i.lora_bs)
    states, scales = i.states if p else None, list(case.scalings[:3])
    hs, words = groups.group_shrink_step(config, group)(None, i.x, a, zeros, states, scales)
    for j, c in enumerate(group):
        single = next(s for s in hopper_blocks.shrink_configs(ranks[j]) if s.name == config.name)
        mine_a, _, counters = hopper.pack_step(c, None, 64)(None, i.lora_as[j], i.lora_bs[j])
        h, mask = hopper.shrink_step(single, c)(None, i.x, mine_a, counters, i.states[j], scales[j])
        assert same_bits(h, hs[j])
        assert same_bits(mine_a, a[j])
        assert words is None or same_bits(mask, words[j])


def test_every_configuration_gives_the_same() -> None:
    case = replace(QUICK, rs=(16, 16, 16))
    i, group = make(case), case.group
    exact, yardstick, errors = three_ways(BF16, lambda number: formulas(case, i, number))
    ranks, scales = (16, 16, 16), [scaling * group[0].keep_scale for scaling in case.scalings[:3]]
    a, b, zeros = groups.group_pack_step(group, 64)(None, i.lora_as, i.lora_bs)
    step = groups.group_shrink_step(blocks.group_shrink_configs(ranks, True)[0], group)
    h, words = step(None, i.x, a, zeros, i.states, scales)
    joint = groups.group_dh_db_step(blocks.group_dh_db_configs(ranks)[0], group)
    dh, _ = joint(None, i.dys, b, h, scales)
    found: list[dict[str, Tensor]] = []
    for shrink in blocks.group_shrink_configs(ranks, True):
        hs, _ = groups.group_shrink_step(shrink, group)(None, i.x, a, zeros, i.states, scales)
        found += [{f"h{j}": summed(each, 16, 16) for j, each in enumerate(hs)}]
    for product in blocks.group_forward_configs():
        ys = groups.group_product_step(product, group)(None, i.x, i.weights, h, b, i.biases)
        found += [{f"y{j}": y for j, y in enumerate(ys)}]
    for config in blocks.group_dx_configs(3, True):
        found += [{"dx": groups.group_dx_step(config, group)(None, i.dys, i.weights, dh, a, words)}]
    reduce = [groups.group_reduce_grads_step(group, *due) for due in ((torch.float32, None), (None, torch.float32))]
    for outer in blocks.group_da_configs(ranks, True):
        das, none = reduce[0](None, groups.group_da_step(outer, group)(None, i.x, dh, words), None)
        assert none is None
        found += [{f"da{j}": da for j, da in enumerate(das)}]
    for config in blocks.group_dh_db_configs(ranks):
        _, parts = groups.group_dh_db_step(config, group)(None, i.dys, b, h, scales)
        found += [{f"db{j}": db for j, db in enumerate(reduce[1](None, None, parts)[1])}]
    for results in found:
        check_all(results, exact, yardstick, BF16, expected=errors)


# ---- faults in the launches are seen


def member_changed(place: int, number: int, by: Callable[[Any], Any]) -> Callable[[Launch], None]:
    """One member's number of a tuple."""
    return changed(place, lambda values: (*values[:number], by(values[number]), *values[number + 1 :]))


FAULTS: dict[str, tuple[str, Callable[[Launch], None]]] = {
    "two members' columns exchanged": ("hopper_group_product_kernel", exchange(2, 3)),
    "a member's rank term left out": ("hopper_group_product_kernel", member_changed(11, 1, lambda extra: extra - 1)),
    "h read beside its place": ("hopper_group_product_kernel", member_changed(9, 2, lambda width: width // 2)),
    "M too small": ("hopper_group_product_kernel", changed(0, lambda m: m - 128)),
    "K too small": ("hopper_group_product_kernel", changed(1, lambda k: k - 64)),
    "a member too few of y": ("hopper_group_product_kernel", changed(12, lambda members: members - 1)),
    "two members' sums exchanged": ("hopper_group_dx_kernel", exchange(2, 3)),
    "dx without masks": ("hopper_group_dx_kernel", changed(17, lambda masked: not masked)),
    "a member too few of dx": ("hopper_group_dx_kernel", changed(12, lambda members: members - 1)),
    "a term of dx left out": ("hopper_group_dx_kernel", member_changed(11, 2, lambda extra: extra - 1)),
    "a row block too few of h": ("hopper_group_shrink_kernel", smaller(0)),
    "a share of K too few": ("hopper_group_shrink_kernel", smaller(1)),
    "a member's rank too small": ("hopper_group_shrink_kernel", member_changed(5, 2, lambda rank: rank // 2)),
    "h without masks": ("hopper_group_shrink_kernel", changed(11, lambda drop: not drop)),
    "too small a chunk": ("hopper_group_dh_db_kernel", changed(5, lambda chunk: chunk - 1)),
    "the widest member's columns too few": ("hopper_group_dh_db_kernel", smaller(0)),
    "a member too few of dh": ("hopper_group_dh_db_kernel", smaller(2)),
    "a row chunk too few of db": ("hopper_group_dh_db_kernel", smaller(1)),
    "a narrow member too narrow": ("hopper_group_dh_db_kernel", changed(3, lambda n: n - 8)),
    "da without masks": ("hopper_group_da_kernel", changed(9, lambda masked: not masked)),
    "a column chunk too few of da": ("hopper_group_da_kernel", smaller(0)),
    "a row chunk too few of da": ("hopper_group_da_kernel", smaller(1)),
    "a block too few of pack": ("hopper_group_pack_kernel", smaller(0)),
    "a member too few of pack": ("hopper_group_pack_kernel", smaller(1)),
    "a wrong rank": ("hopper_group_pack_kernel", member_changed(6, 0, lambda rank: rank - 1)),
    "counters not zeroed": ("hopper_group_pack_kernel", changed(5, lambda count: 1)),
    "a part of dh too few": ("hopper_group_reduce_dh_kernel", member_changed(1, 0, lambda parts: parts - 1)),
    "a block of rows too few": ("hopper_group_reduce_dh_kernel", smaller(0)),
    "a part of da too few": ("hopper_group_reduce_grads_kernel", changed(8, lambda parts: parts - 1)),
    "a block of db too few": ("hopper_group_reduce_grads_kernel", smaller(0)),
}


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


def check_with_memory(case: Case, memory: Memory) -> None:
    check(case)
    memory.check()


# ---- what fits, and what is told


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ranks", [(16, 16), (16, 16, 16), (16,) * 4, (64, 16), (32, 32, 32)])
def test_every_configuration_fits(ranks: tuple[int, ...], wide: bool) -> None:
    """In shared memory, as many programs as it says on one multiprocessor, and there is one of each kind."""
    lists: list[Any] = [blocks.group_dh_db_configs(ranks, wide), blocks.group_forward_configs()]
    for masked in (False, True):
        lists += [blocks.group_shrink_configs(ranks, masked, wide), blocks.group_da_configs(ranks, masked, wide)]
        lists += [blocks.group_dx_configs(len(ranks), masked)]
    assert [config for config in lists if not config] == ([()] if len(ranks) == 4 else [])  # four masked terms of dx
    for config in (config for configs in lists for config in configs):
        assert config.shared_memory <= hopper_blocks.SHARED_MEMORY
        assert getattr(config, "ctas", 1) * (config.shared_memory + 1024) <= 233472


CALL = HopperCall(LARGE, torch.device("cpu"), BF16, 8192, 4096, 4096, 16)


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ((CALL,), "it has 1 members and they are for 2 to 4"),
        ((CALL,) * 5, "it has 5 members"),
        ((CALL, replace(CALL, k=2048)), "member 1 has in_features 2048 and member 0 has 4096"),
        ((CALL, CALL, replace(CALL, m=1)), "member 2 has tokens 1"),
        ((CALL, replace(CALL, dtype=torch.float16)), "member 1 has dtype torch.float16"),
        ((CALL, replace(CALL, p=0.1, dropout=True)), "member 1 has p = 0.1 and member 0 has no dropout"),
        ((CALL, replace(CALL, r=129)), "of member 1, rank 129"),
    ],
)
def test_groups_that_they_do_not_take_are_told(group: groups.Group, sentence: str) -> None:
    assert groups.group_fault((CALL, replace(CALL, n=1024))) is None
    assert sentence in (groups.group_fault(group) or "")
