"""The kernels for few tokens in CUDA C++: their source on the host (``native_host/few_tokens.h``), and through NVRTC.

What a GPU alone can show is left out: that the asm does what the PTX manual says, and how long it takes.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Iterator
from ctypes import Structure, byref, c_bool, c_float, c_int, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, make, measures
from lora_kernels import nvrtc
from lora_kernels.backends.native.toolchain import find_compiler
from lora_kernels.backends.triton.choose import candidates
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.hidden_operand import hidden_operand
from lora_kernels.backends.triton.choose.launching import GRAPH, PREPARED
from lora_kernels.backends.triton.choose.plans import Cell, Ring, RingGrads, plan_from_json, plan_to_json
from lora_kernels.backends.triton.choose.ring import CONFIGS, GRAD_HEADERS, WORKSPACE_BYTES, grad_defines, ring_fault
from lora_kernels.backends.triton.run import cuda_kernels, ring, ring_grads
from lora_kernels.backends.triton.run.call import Call
from lora_kernels.backends.triton.run.cuda_kernels import CudaLaunch, cubin
from lora_kernels.backends.triton.run.pass_words import Constant
from lora_kernels.backends.triton.run.recording import Recorder
from lora_kernels.benchmark.roofline import MACHINES
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.kept import row_words
from lora_kernels.packed_mask import packed_keep_words, unpack
from lora_kernels.tuning.search import shortlist
from native_host.seeded import Fault, put_in_force, seed
from numerics import check, check_all, same_bits

ROOT = Path(__file__).parents[3]
SEED = torch.tensor([0x0123456789ABCDEF, -7])
H100 = MACHINES["h100"].gpu
SMALL = Machine(capability=90, sm_count=6, shared_memory=232448)
BF16, FP32 = torch.bfloat16, torch.float32


class Params(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "W", "A", "B", "bias", "words", "y", "h", "part", "flag", "count")),
        *((name, c_int) for name in ("M", "N", "K", "R", "ldx", "row_words", "rank")),
        *((name, c_int) for name in ("a32", "b32", "hc", "ks", "tiles", "ctas", "pdl")),
        ("s", c_float),
        ("keep", c_float),
    ]


class GradParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dy", "W", "B", "h", "dx_parts", "dh_parts", "db", "dbias")),
        *((n, c_int) for n in ("M", "N", "K", "R", "ld_dy", "rank", "b32", "bias32", "slices", "splits")),
        ("s", c_float),
    ]


class LastParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dx_parts", "dh_parts", "A", "x", "words", "dx", "da")),
        *((n, c_int) for n in ("M", "K", "R", "ldx", "row_words", "a32", "slices", "splits", "early")),
        ("s", c_float),
        ("keep", c_float),
    ]


def compile_host(folder: Path, faults: tuple[Fault, ...] = (), level: str = "-O1") -> ctypes.CDLL:
    """The sources on the host, with ``faults`` seeded, none of them in force."""
    paths = {name: folder / name for name in ("few_tokens.cuh", "few_tokens_grads.cuh")}
    for name, path in paths.items():
        path.write_text((ROOT / "csrc" / "cuda" / name).read_text())
    out = folder / "few_tokens.so"
    defines = [
        f'-DLORA_FORWARD_SOURCE="{paths["few_tokens.cuh"]}"',
        f'-DLORA_GRADS_SOURCE="{paths["few_tokens_grads.cuh"]}"',
    ]
    flags = [level, "-std=c++17", "-fPIC", "-shared", "-Wno-unknown-pragmas", *defines, *seed(folder, faults)]
    source = ROOT / "tests" / "native_host" / "few_tokens.cpp"
    subprocess.run([find_compiler("cpu").path, *flags, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_host(tmp_path_factory.mktemp("few_tokens"))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class OnHost:
    """Takes the place of ``CudaLaunch.__call__``: the arguments go to the same source on the host."""

    def __init__(self, library: ctypes.CDLL, downwards: bool = False) -> None:
        self.library, self.downwards = library, downwards

    def __call__(self, launch: CudaLaunch, stream: int | None, *arguments: Any) -> None:
        x, w, a, b, bias, words, y, h, memory, s, keep, *sizes = (*arguments, *launch.static)
        assert len(launch.signature) == len(arguments) + len(launch.static)
        tensors = (pointer(t) for t in (x, w, a, b, bias, words, y, h))
        params = Params(*tensors, None, None, None, *sizes, s, keep)
        assert launch.grid == params.hc + params.ctas * params.ks
        defines = dict(launch.source.defines)
        (instance,) = (
            i for i, c in enumerate(CONFIGS) if (c.row_tiles, c.warps) == (defines["LORA_TILES"], defines["LORA_WARPS"])
        )
        ended = self.library.lora_few_forward(
            instance, byref(params), c_void_p(memory.data_ptr()), launch.shared_bytes, c_bool(self.downwards)
        )
        assert ended == 1, "a block waits for ever, leaves a barrier, or takes another amount of shared memory"


def inputs(case: Case) -> tuple[Any, Tensor | None, Tensor | None]:
    i, state = make(case), SEED if case.p else None
    mask = unpack(packed_keep_words(SEED, case.m, case.k, case.p), case.k) if case.p else None
    return i, state, mask


def forward(case: Case, plan: Ring, machine: Machine, kept: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """y, and s h as it is kept, by the run of ``plan``."""
    i, state, _ = inputs(case)
    tensors = [None if t is None else t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias)]
    call = Call.forward(*tensors, case.p, state)  # type: ignore[arg-type]
    operand = hidden_operand(case.dtype, case.r) if kept else None
    call = replace(call, machine=machine, operand=operand)
    monkeypatch.setattr(ring, "draw_step", lambda m, k, p: lambda stream, seed: packed_keep_words(seed, m, k, p))
    y, h, words = ring.ready_ring(plan, call)(*tensors, case.scaling, state)
    assert words.shape == ((case.m, row_words(case.k)) if case.p else (0,))
    if operand is not None:
        return {"y": y, "h": operand.unpack(h, case.r), "operand": h}
    return {"y": y, "h": h}


def ways(case: Case, machine: Machine) -> list[Ring]:
    cell = Cell("forward", case.m, case.k, case.n, case.r, "bfloat16", case.p > 0)
    return [plan for plan in candidates.candidates(machine, cell) if isinstance(plan, Ring)]


def case_of(m: int, k: int, n: int, r: int, **fields: Any) -> Case:
    return Case(m=m, k=k, n=n, r=r, dtype=BF16, **{"adapter_dtype": FP32, **fields})


FORWARD = [
    (case_of(1, 1024, 48, 16), Ring(CONFIGS[0], 1, 4, 1, True), True),
    (case_of(8, 1088, 100, 5, p=0.25, adapter_dtype=BF16), Ring(CONFIGS[0], 1, 3, 1), True),
    (case_of(16, 1024, 80, 64, p=0.1), Ring(CONFIGS[0], 1, 2, 1), False),
    (case_of(13, 512, 33, 33, bias=False), Ring(CONFIGS[1], 1, 1, 1), True),
    (case_of(5, 832, 112, 16, p=0.5), Ring(CONFIGS[1], 1, 2, 2), False),
    (case_of(7, 1024, 40, 20, p=0.1), Ring(CONFIGS[1], 2, 4, 1, True), True),
    (case_of(3, 704, 70, 16), Ring(CONFIGS[2], 1, 2, 1), True),
    (case_of(16, 1024, 160, 24, adapter_dtype=BF16, p=0.9), Ring(CONFIGS[2], 1, 3, 1), False),
    (case_of(9, 1024, 96, 1), Ring(CONFIGS[2], 2, 2, 1), False),
    (case_of(4, 512, 17, 2), Ring(CONFIGS[1], 1, 1, 1), True),
]


@pytest.fixture
def on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    host = OnHost(library)
    monkeypatch.setattr(CudaLaunch, "__call__", lambda launch, stream, *arguments: host(launch, stream, *arguments))
    monkeypatch.setattr(ring, "_workspaces", {})
    return host


def judged(case: Case, actual: dict[str, Tensor]) -> None:
    i, _, mask = inputs(case)
    exact, yardstick, errors = measures(case, i, mask)
    check_all({"y": actual["y"]}, exact, yardstick, case.dtype, expected=errors)


def judged_operand(case: Case, plan: Ring, operand: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what ``HiddenOperand`` states of the fp32 h that the kernel keeps elsewhere."""
    layout = hidden_operand(case.dtype, case.r)
    assert layout is not None
    plain = forward(case, plan, SMALL, False, monkeypatch)["h"]
    assert same_bits(operand, layout.pack(case.scaling * plain))


def judged_hidden(case: Case, h: Tensor, kept: bool) -> None:
    """h against float64 on A rounded to x's dtype, as the kernels take it; the yardstick is fp32's product."""
    i, _, mask = inputs(case)
    x, a = i.x.detach(), i.lora_a.detach().to(BF16)
    keep = 1.0 / (1.0 - case.p) * (case.scaling if kept else 1.0)
    x = x if mask is None else x * mask
    check("h", h, keep * (x.double() @ a.double().t()), keep * (x.float() @ a.float().t()), BF16)


@pytest.mark.parametrize(("case", "plan", "kept"), FORWARD, ids=str)
@pytest.mark.parametrize("downwards", [False, True])
def test_forward_is_the_reference(
    case: Case, plan: Ring, kept: bool, downwards: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host.downwards = downwards
    actual = forward(case, plan, SMALL, kept, monkeypatch)
    judged(case, actual)
    judged_hidden(case, actual["h"], kept)
    if kept:
        judged_operand(case, plan, actual["operand"], monkeypatch)


def test_launches_share_a_workspace(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, of other sizes and producers: each waits for its own parts of h; the same bits twice."""
    first = [forward(case, plan, SMALL, kept, monkeypatch) for case, plan, kept in FORWARD]
    again = [forward(case, plan, SMALL, kept, monkeypatch) for case, plan, kept in FORWARD]
    assert all(same_bits(a[name], b[name]) for a, b in zip(again, first, strict=True) for name in a)
    assert len(ring._workspaces) == 1
    (memory,) = ring._workspaces.values()
    assert memory.numel() == WORKSPACE_BYTES
    assert memory[:8].view(torch.int64).item() == 2 * len(FORWARD) << 20


# What stands between « and » goes; see ``seeded.Fault``.
FAULTS = {
    "no mask": ("few_tokens.cuh", "«if (p.words) v = kept8(p, v, m, k);»", ""),
    "mask off by one": ("few_tokens.cuh", ">> («k % 32»);", "k % 32 + 1"),
    "another launch's flag": ("few_tokens.cuh", "st_release(p.flag + blockIdx.x, «*tag»)", "*tag + 1"),
    "one part of h left out": ("few_tokens.cuh", "q < «p.hc»; ++q) v += ldg_l2", "p.hc - 1"),
    "no scaling": ("few_tokens.cuh", "«v *= p.s;»", ""),
    "no 1 / (1 - p)": ("few_tokens.cuh", "«v *= p.keep;»", ""),
    "last chunk left out": ("few_tokens.cuh", "const int total = «per * mine»;\n float", "per * mine - 1"),
    "no low part of h": ("few_tokens.cuh", "narrow(«rest - rest == 0.f ? rest : 0.f»)", "0.f"),
    "one warp left out of the sum": ("few_tokens.cuh", "for (int w = «0»; w < NW; ++w) v += o", "1"),
    "no barrier after B is written": ("few_tokens.cuh", "«bar_sync(5, HW * 32);»  // hs, Bs", ""),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_host(tmp_path_factory.mktemp("faults"), tuple(FAULTS.values()))


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_a_fault_is_seen(fault: str | None, faulty: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_force(faulty, [None, *FAULTS].index(fault))
    assert any(is_seen(*given, OnHost(faulty, downwards), monkeypatch)
               for given in FORWARD[1:8] for downwards in (False, True)) == (fault is not None)  # fmt: skip


def is_seen(case: Case, plan: Ring, kept: bool, host: OnHost, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(CudaLaunch, "__call__", lambda launch, stream, *arguments: host(launch, stream, *arguments))
    monkeypatch.setattr(ring, "_workspaces", {})
    try:
        actual = forward(case, plan, SMALL, kept, monkeypatch)
        judged(case, actual)
        judged_hidden(case, actual["h"], kept)
        if kept:
            judged_operand(case, plan, actual["operand"], monkeypatch)
    except AssertionError:
        return True
    return False


MEASURED = json.loads((ROOT / "bench" / "results" / "nvidia-h100" / "few-tokens.json").read_text())["cells"]
NEARLY = 1.05


@pytest.mark.parametrize(
    "cell", MEASURED, ids=lambda c: f"{c['tokens']} tokens, {c['in_features']}x{c['out_features']}"
)
def test_the_choice_is_nearly_the_quickest_measured(cell: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100, untuned, of what was measured there, in graphs; else one launch is taken. It takes no NVRTC."""
    monkeypatch.setattr(nvrtc, "why_not", lambda: None)
    candidates.candidates.cache_clear()
    candidates.predicted.cache_clear()
    sizes = cell["tokens"], cell["in_features"], cell["out_features"]
    plan, eager = (
        candidates.candidates(H100, Cell("forward", *sizes, 16, "bfloat16", False), way)[0] for way in (GRAPH, PREPARED)
    )
    candidates.candidates.cache_clear()  # what it holds is of a machine with NVRTC
    candidates.predicted.cache_clear()
    assert cell["plans"][str(plan)] <= NEARLY * min(cell["plans"].values()), plan
    assert eager.launches == 1 or eager == plan  # the host takes longer than the device


@pytest.mark.parametrize(
    ("machine", "change", "sentence"),
    [
        (replace(SMALL, interpreter=True), {}, "Triton's interpreter"),
        (replace(SMALL, capability=75), {}, "compute capability 8.0; this is 7.5"),
        (SMALL, {"tokens": 32}, "up to 16 tokens"),
        (SMALL, {"r": 65}, "ranks up to 64"),
        (SMALL, {"dtype": "float16"}, "for bfloat16, and this is float16"),
        (SMALL, {"k": 4100}, "multiples of 64 in_features"),
    ],
)
def test_why_it_does_not_run(machine: Machine, change: dict[str, Any], sentence: str) -> None:
    cell = replace(Cell("forward", 4, 4096, 4096, 16, "bfloat16", False), **change)
    assert sentence in (ring_fault(machine, cell) or "")


def test_without_nvrtc_the_other_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "path", lambda: None)
    candidates.candidates.cache_clear()
    candidates.predicted.cache_clear()
    cell = Cell("forward", 4, 4096, 4096, 16, "bfloat16", False)
    try:
        assert "NVRTC was not found" in (ring_fault(SMALL, cell) or "")
        assert not any(isinstance(plan, Ring) for plan in candidates.candidates(SMALL, cell))
    finally:
        candidates.candidates.cache_clear()
        candidates.predicted.cache_clear()


def test_a_call_that_it_does_not_take() -> None:
    i = make(case_of(4, 512, 48, 2))
    call = Call.forward(i.x, i.weight.t().contiguous().t(), i.lora_a, i.lora_b, i.bias, 0.0, None)
    with pytest.raises(InvalidArgumentError, match="rows of one piece"):
        ring.ready_ring(Ring(CONFIGS[1]), replace(call, machine=SMALL))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("tokens", [8, 16])
def test_nvrtc_compiles_it(
    config: Any, tokens: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no spill: 640 threads leave 96 registers each, 384 leave 168. The second time from the cache."""
    if nvrtc.why_not() is not None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    source = cuda_kernels.Source(
        "few_tokens_forward_entry.cuh", ring.HEADERS, tuple(config.defines(tokens, True).items())
    )
    cubin.cache_clear()
    code = cubin(source, capability)
    monkeypatch.setattr(nvrtc, "compiled", lambda *_: pytest.fail("it was compiled again"))
    cubin.cache_clear()
    assert cubin(source, capability) == code
    cubin.cache_clear()
    usage = resources(code, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 65536 // (config.threads * (2 if config.blocks(SMALL, tokens) == 2 else 1))


def resources(code: bytes, folder: Path) -> dict[str, int]:
    from lora_kernels.backends.native.cuda_report import _USAGE, find_cuobjdump

    path = folder / "kernel.cubin"
    path.write_bytes(code)
    told = subprocess.run(
        [find_cuobjdump(), "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
    )
    return {name: int(amount) for name, amount in _USAGE.findall(told.stdout)}


GRADS = [
    (case_of(1, 512, 48, 16), RingGrads(1, 1), True),
    (case_of(8, 576, 100, 5, p=0.25, adapter_dtype=BF16), RingGrads(3, 2, True), True),
    (case_of(16, 640, 333, 64, p=0.1), RingGrads(2, 3), False),
    (case_of(13, 512, 1040, 33, bias=False), RingGrads(4, 2, True), True),
    (case_of(3, 768, 7, 1, p=0.5), RingGrads(1, 1), False),
]
ALL = "dx", "da", "db"


class GradsOnHost(OnHost):
    """Takes both launches of backward."""

    def __call__(self, launch: CudaLaunch, stream: int | None, *arguments: Any) -> None:
        given = (*arguments, *launch.static)
        assert len(launch.signature) == len(given)
        assert [kind == "*" for kind in launch.signature] == [v is None or isinstance(v, Tensor) for v in given]
        assert dict(launch.source.defines)["LORA_THREADS"] == launch.threads
        if launch.name == "few_tokens_first_grads":
            *tensors, s, m, n, k, r, ld_dy, rank, b32, bias32, slices, splits = given
            sizes = m, n, k, r, ld_dy, rank, b32, bias32, slices, splits
            run, params = self.library.lora_few_first_grads, GradParams(*map(pointer, tensors), *sizes, s)
        else:
            *tensors, s, keep, m, k, r, ldx, words, a32, slices, splits, early = given
            assert launch.dependent == bool(early)
            sizes = m, k, r, ldx, words, a32, slices, splits, early
            run, params = self.library.lora_few_last_grads, LastParams(*map(pointer, tensors), *sizes, s, keep)
        assert run(byref(params), launch.grid, launch.shared_bytes, c_bool(self.downwards)) == 1, launch.name


@pytest.fixture
def grads_on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> GradsOnHost:
    host = GradsOnHost(library)
    monkeypatch.setattr(CudaLaunch, "__call__", lambda launch, stream, *arguments: host(launch, stream, *arguments))
    return host


def grads(case: Case, plan: RingGrads, kept: bool, due: tuple[str, ...] = ALL) -> dict[str, Tensor]:
    """What is due by the run of ``plan``, poisoned before; h is what forward's policy gives, as fp32 or its operand."""
    i, _, mask = inputs(case)
    x, w, a, b, dy = (t.detach().contiguous() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.dy))
    keep, operand = 1.0 / (1.0 - case.p), hidden_operand(case.dtype, case.r) if kept else None
    h = keep * (x if mask is None else x * mask).float() @ a.to(BF16).float().t()
    h = h if operand is None else operand.pack(case.scaling * h)
    words = packed_keep_words(SEED, case.m, case.k, case.p) if case.p else None
    x_due, w_due, h_due = (tensor if name in due else None for name, tensor in (("da", x), ("dx", w), ("db", h)))
    call = Call.backward(dy, x_due, w_due, a, b, None if i.bias is None else i.bias.detach(), h_due, case.p, words)
    call = replace(call, machine=SMALL, operand=operand, by_descriptor=w_due is not None)  # dy's rows begin anywhere
    assert ring_grads.grads_call_fault(call) is None
    run = ring_grads.ready_ring_grads(plan, call, *(name in due for name in ALL))
    found = run(7, dy, x_due, w_due, a, b, h_due, case.scaling, words)
    return {name: t for name, t in zip((*ALL, "dbias"), found, strict=True) if t is not None}


@pytest.mark.parametrize(("case", "plan", "kept"), GRADS, ids=str)
@pytest.mark.parametrize("downwards", [False, True])
def test_the_gradients_are_the_reference(
    case: Case, plan: RingGrads, kept: bool, downwards: bool, grads_on_host: GradsOnHost, filled_with_nan: None
) -> None:
    grads_on_host.downwards = downwards
    i, _, mask = inputs(case)
    exact, yardstick, errors = measures(case, i, mask)
    found = grads(case, plan, kept)
    assert set(found) == {*ALL} | ({"dbias"} if i.bias is not None else set())
    check_all(found, exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize("due", [(), ("dx",), ("da",), ("db",), ("dx", "db"), ("da", "db")], ids=str)
def test_what_is_due_alone_has_the_same_bits(
    due: tuple[str, ...], grads_on_host: GradsOnHost, filled_with_nan: None
) -> None:
    case, plan, kept = GRADS[1]
    whole, part = grads(case, plan, kept), grads(case, plan, kept, due)
    assert set(part) == {*due, "dbias"}
    assert all(same_bits(tensor, whole[name]) for name, tensor in part.items())


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """Memory that nobody has written."""
    torch.use_deterministic_algorithms(True)  # ``fill_uninitialized_memory`` is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"m": 17}, "up to 16 tokens"),
        ({"r": 65}, "rank 64"),
        ({"b_dtype": torch.float16}, "gradients of bfloat16 and float32 alone"),
        ({"bias_dtype": torch.float64}, "gradients of bfloat16 and float32 alone"),
        ({"stride_w": (1, 48)}, "dy or W is not stored"),
        ({"by_descriptor": False}, "dy or W is not stored"),
        ({"stride_a": (1, 16)}, "A or x is not stored"),
        ({"stride_x": (512, 2)}, "A or x is not stored"),
        ({"stride_b": (1, 48)}, "B is not in one piece"),
    ],
)
def test_calls_whose_gradients_it_does_not_take(change: dict[str, Any], sentence: str) -> None:
    i = make(GRADS[0][0])
    call = Call.backward(i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.bias, None, 0.0, None)
    call = replace(call, machine=SMALL)
    assert ring_grads.grads_call_fault(call) is None
    with pytest.raises(InvalidArgumentError, match=sentence):
        ring_grads.ready_ring_grads(RingGrads(), replace(call, **change), True, True, True)


def test_no_prediction_has_the_gradients_chosen_and_the_tuner_measures_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "why_not", lambda: None)
    candidates.candidates.cache_clear()
    candidates.predicted.cache_clear()
    cell = Cell("backward", 4, 4096, 4096, 16, "bfloat16", False)
    plans = candidates.candidates(H100, cell)
    ways = [plan for plan in plans if isinstance(plan, RingGrads)]
    assert ways
    assert list(plans[-len(ways) :]) == ways
    assert {plan.pdl for plan in ways} == {False, True}
    assert {plan.pdl for plan in shortlist(H100, cell) if isinstance(plan, RingGrads)} == {False, True}
    assert candidates.in_order(H100, cell, ways[0])[0] == ways[0]
    assert plan_from_json(plan_to_json(ways[-1])) == ways[-1]


def test_the_launcher_can_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder makes a pass of it whose parameters are, byte for byte, what ctypes would give."""
    case, plan = case_of(4, 1024, 40, 2), Ring(CONFIGS[1], 2, 4, 1, True)
    i = make(case)
    tensors = tuple(t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias))
    launched: list[tuple[CudaLaunch, list[bytes]]] = []
    monkeypatch.setattr(cuda_kernels, "_loaded", lambda *_: 0x77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        CudaLaunch, "_launch", lambda self, f, stream, given: launched.append((self, self.parameters(given)))
    )
    call = replace(Call.forward(*tensors, 0.0, None), machine=SMALL, operand=hidden_operand(BF16, 2))
    recorder = Recorder(("cpu", -1, 0), 7, (*tensors, 0.5, None, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)))
    with recorder:
        y, h, _ = ring._run(plan, call)(7, *recorder.arguments)
    described = recorder.described((y, h))
    assert recorder.fault is None
    assert described is not None
    ((launch, parameters),), (kernel,) = launched, described.steps
    assert (kernel.function, kernel.threads, kernel.shared) == (0x77, launch.threads, launch.shared_bytes)
    assert kernel.cluster * kernel.grid[0] == launch.grid
    assert kernel.cluster == 2
    assert kernel.dependent
    said = [each.content for each in kernel.arguments if isinstance(each, Constant)]
    assert [p for p, kind in zip(parameters, (*launch.signature, "*", "*"), strict=True) if kind == "i32"] == [
        each for each in said if len(each) == 4
    ][1:]
    assert [type(each).__name__ for each in kernel.arguments[:11]] == [
        *("Place",) * 5,
        "Constant",
        *("Place",) * 3,
        "Number",
        "Constant",
    ]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 2])
def test_nvrtc_compiles_the_gradients(tokens: int, capability: int, tmp_path: Path) -> None:
    if nvrtc.why_not() is not None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    code = nvrtc.compiled("few_tokens_grads_entry.cuh", GRAD_HEADERS, capability, grad_defines(8 * tokens))
    usage = resources(code, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0


def test_graphs_and_streams_have_their_own_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager streams apart; a graph's streams apart from those and from other graphs'; past the last, a cleared one."""
    capture: list[int | None] = [None]
    device = torch.device("cpu")
    monkeypatch.setattr(ring, "_workspaces", {})
    monkeypatch.setattr(ring, "_ready", {})
    monkeypatch.setattr(ring, "capture_number", lambda stream: capture[0])
    eager = [ring.workspace(device, stream) for stream in (1, 2, 1)]
    assert eager[0] is eager[2]
    assert eager[0] is not eager[1]
    found = []
    for capture[0] in (5, 6):
        found += [ring._of_capture(device, 0, 1), ring._of_capture(device, 0, 2)]
        assert ring._of_capture(device, 0, 1) is found[-2]
    assert len({t.data_ptr() for t in (*eager, *found)}) == 6
    monkeypatch.setattr(ring, "_ready", {0: []})
    capture[0] = 9
    assert ring._of_capture(device, 0, 1) is not ring._of_capture(device, 0, 1)
