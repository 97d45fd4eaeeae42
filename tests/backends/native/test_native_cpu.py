"""The native library's CPU kernels against float64, through the operators, with the mask that the seed means.

What every backend must do is tested with all of them elsewhere; here is what this one could get wrong by itself: block
and vector boundaries, addresses, strides, threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from cases import DOUBLE, HALF, MIXED, SHAPES, Case, Inputs, expected, make, measures
from lora_kernels import FusedLoRALinear, dispatch, ops, reference, use_backend
from lora_kernels.accuracy import expected_errors, run_reference
from lora_kernels.dispatch import Problem
from lora_kernels.ops import Operators
from numerics import check_all, same_bits

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT))

SEED = (-(2**62) - 12345, 2**63 - 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 130)
FEATURES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)
RANKS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 300)
BOUNDARIES = [
    *[Case(m=m, k=45, n=53, r=5, dtype=dtype, p=0.1) for m in TOKENS for dtype in DTYPES],
    *[Case(m=m, k=k, n=37, r=3, dtype=dtype) for m, k, dtype in product((2, 35), FEATURES, DTYPES[:3])],
    *[Case(m=m, k=37, n=n, r=3, dtype=dtype) for m, n, dtype in product((2, 35), FEATURES, DTYPES[:3])],
    *[Case(m=m, k=48, n=40, r=r, dtype=dtype, p=0.1) for m, r, dtype in product((2, 35), RANKS, DTYPES[:3])],
    *[Case(m=m, k=k, n=40, r=17, p=p) for m, k, p in product((2, 35), (1, 7, 8, 9, 31, 65), (0.1, 0.5, 0.9))],
    *[Case(m=m, k=k, n=40, r=17, p=p) for m, k, p in product((2, 35), (33, 257, 300), (2**-18, 0.25, 0.75))],
]
ADAPTERS = [
    Case(m=m, dtype=dtype, adapter_dtype=adapter, p=0.1)
    for m, dtype, adapter in product((3, 35), DTYPES, DTYPES)
    if dtype != adapter
]
LARGE = [
    Case(m=m, k=k, n=n, r=r, dtype=dtype, p=p)
    for m, k, n in ((1, 1031, 777), (16, 520, 1030), (40, 1100, 70), (200, 519, 390), (600, 258, 130), (2100, 24, 35))
    for r, dtype, p in ((16, torch.float32, 0.0), (16, torch.bfloat16, 0.1), (80, torch.float16, 0.0))
]


@pytest.fixture(scope="module")
def operators() -> Operators:
    dispatch.select("cpu", torch.float32, "native")
    return ops.operators("native")


def run(operators: Operators, case: Case, i: Inputs) -> dict[str, Tensor]:
    """All results of forward and backward."""
    i = Inputs(*(None if t is None else t.detach() for t in vars(i).values()))
    state = torch.tensor(SEED) if case.p else None
    y, h, _ = operators.forward(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, state)
    assert h.dtype == operators.kept.hidden_dtype(case.dtype)
    arguments = (i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.bias, h, case.scaling, case.p, state)
    dx, da, db, dbias = operators.backward(*arguments)
    return {"y": y, "dx": dx, "da": da, "db": db} | ({} if i.bias is None else {"dbias": dbias})


def check(operators: Operators, case: Case, i: Inputs) -> None:
    mask = reference.philox_keep_mask(torch.tensor(SEED), *i.x.shape, case.p) if case.p else None
    # fp64 over coarser adapters: no gradient can be closer than their rounding, and float64 judges by a ceiling alone.
    judged_as = torch.float32 if case.dtype is torch.float64 and case.adapter_dtype else case.dtype
    exact, yardstick, errors = measures(case, i, mask, judged_as)
    check_all(run(operators, case, i), exact, yardstick, judged_as, expected=errors)


@pytest.mark.parametrize("case", [*SHAPES, *MIXED, *DOUBLE, *BOUNDARIES, *ADAPTERS, *LARGE], ids=str)
def test_against_float64(operators: Operators, case: Case) -> None:
    check(operators, case, make(case))


@pytest.mark.parametrize("p", [0.0, 0.9])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 24, 40), (20, 24, 0), (3, 24, 0), (20, 0, 40), (3, 0, 40), (0, 0, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_sizes(operators: Operators, m: int, k: int, n: int, p: float, dtype: torch.dtype) -> None:
    case = Case(m=m, k=max(k, 1), n=n, r=2, p=p, dtype=dtype)
    i = make(case)
    check(operators, case, replace(i, x=i.x.detach()[:, :k], weight=i.weight[:, :k], lora_a=i.lora_a.detach()[:, :k]))


# Addresses


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _every_other_row(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=1)[:, 0]


def _every_other_element(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def _one_element_off(t: Tensor) -> Tensor:
    """The storage begins one element before: no alignment beyond the element's own."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _within_wider_rows(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (1, 2), value=float("nan"))[..., 1:-2]


LAYOUTS = (_transposed, _every_other_row, _every_other_element, _one_element_off, _within_wider_rows)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 35])
def test_any_layout(
    operators: Operators, m: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], name: str
) -> None:
    case = Case(m=m, k=37, n=41, r=17, dtype=dtype, p=0.1)
    i = make(case)
    tensor = getattr(i, name).detach()
    given = layout(tensor) if tensor.dim() == 2 else _every_other_element(_one_element_off(tensor))
    assert torch.equal(given, tensor)
    check(operators, case, replace(i, **{name: given}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 35])
def test_expanded_tensors(operators: Operators, m: int, dtype: torch.dtype) -> None:
    """Strides of zero, in each dimension and in both."""
    case = Case(m=m, k=37, n=41, r=3, dtype=dtype, p=0.1)
    i = make(case)
    for name in ("x", "weight", "lora_a", "lora_b", "dy"):
        tensor = getattr(i, name).detach()
        for few in (tensor[:1], tensor[:, :1], tensor[:1, :1]):
            check(operators, case, replace(i, **{name: few.expand(tensor.shape)}))
    check(operators, case, replace(i, bias=i.bias.detach()[:1].expand(case.n)))


@pytest.mark.parametrize("name", ["x", "weight", "dy"])
@pytest.mark.parametrize("m", [3, 35])
def test_rows_beyond_32_bit_addresses(operators: Operators, m: int, name: str) -> None:
    """The last row starts beyond 2**31 elements of its storage, of which only the rows are ever touched."""
    case = Case(m=m, dtype=torch.bfloat16, p=0.1)
    i = make(case)
    tensor = getattr(i, name).detach()
    rows, columns = tensor.shape
    stride = 2**31 // (rows - 1) + 1
    storage = torch.empty(stride * (rows - 1) + columns, dtype=case.dtype)
    far = storage.as_strided((rows, columns), (stride, 1)).copy_(tensor)
    check(operators, case, replace(i, **{name: far}))


# What comes out


@pytest.mark.parametrize("case", [Case(m=m, dtype=dtype, p=0.2) for m in (2, 70) for dtype in DTYPES], ids=str)
def test_every_output_is_written(operators: Operators, case: Case) -> None:
    """Results allocated full of NaN come out as those allocated anyhow."""
    usual = run(operators, case, make(case))
    torch.use_deterministic_algorithms(True)  # which has torch fill what it allocates
    try:
        assert torch.empty(1).isnan()
        filled = run(operators, case, make(case))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(usual[name], filled[name]) for name in usual)


@pytest.mark.parametrize("m", [5, 35])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dropped_element_does_not_hide_nan(operators: Operators, m: int, bad: float) -> None:
    """As in torch.nn.functional.dropout, 0 times NaN is NaN."""
    case = Case(m=m, p=0.5)
    i = make(case)
    keep = reference.philox_keep_mask(torch.tensor(SEED), case.m, case.k, case.p)
    column = int((~keep[2]).nonzero()[0])
    x = i.x.detach().clone()
    x[2, column] = bad
    out = run(operators, case, replace(i, x=x))
    assert not torch.isfinite(out["y"][2]).any()
    assert torch.isfinite(out["y"][[row for row in range(m) if row != 2]]).all()
    assert not torch.isfinite(out["da"][:, column]).any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [5, 35])
def test_an_infinite_h_stays_infinite(operators: Operators, m: int, dtype: torch.dtype) -> None:
    x, weight, lora_a, lora_b = (torch.ones(shape, dtype=dtype) for shape in ((m, 24), (40, 24), (1, 24), (40, 1)))
    x[:, 0] = float("inf")
    y, _, _ = operators.forward(x, weight, lora_a, lora_b, None, 0.5, 0.0, None)
    assert torch.isinf(y).all()


@pytest.mark.parametrize("m", [3, 64])
def test_one_rounding(operators: Operators, m: int) -> None:
    """y in bf16: its error is below that of base, branch and sum each rounded, as in PEFT."""
    case = Case(m=m, k=128, n=96, r=16, dtype=torch.bfloat16)
    i = make(case)
    exact, y = expected(case, i, None, torch.float64)["y"], run(operators, case, i)["y"]
    peft = torch.nn.functional.linear(i.x, i.weight, i.bias) + (i.x @ i.lora_a.t() @ i.lora_b.t()) * case.scaling
    assert (y.double() - exact).norm() < (peft.double() - exact).norm()


@pytest.mark.one_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_it_is_pefts_layer(tokens: int, dtype: str) -> None:
    """Forward and every gradient of the module, judged with PEFT's own results as the yardstick."""
    pytest.importorskip("peft")
    from lora_kernels.benchmark.providers import PROVIDERS, make_setups
    from lora_kernels.benchmark.workloads import Workload

    (setup,) = make_setups(Workload("step", tokens, 48, 40, 4, dtype, bias=True), "cpu")

    def results(name: str) -> dict[str, Tensor]:
        layer = PROVIDERS[name].build(setup)
        with layer.context():
            y = layer.call(setup.x)
            dx, da, db = torch.autograd.grad(y, [setup.x, *layer.trainable], setup.dy)
        return {"y": y.detach(), "dx": dx, "da": da, "db": db}

    linear = setup.linear
    arguments = (setup.x, linear.weight, setup.lora_a, setup.lora_b, linear.bias, setup.dy, setup.scaling, None, 0.0)
    exact, errors = run_reference(torch.float64, *arguments), expected_errors(setup.dtype, *arguments)
    check_all(results("native"), exact, results("peft"), setup.dtype, expected=errors)


# Threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "case", [Case(m=m, k=130, n=97, r=9, p=0.1, dtype=d) for m in (2, 90) for d in DTYPES], ids=str
)
def test_any_number_of_threads_and_the_same_bits_twice(operators: Operators, case: Case, count: int) -> None:
    with threads(count):
        check(operators, case, make(case))
        first, second = (run(operators, case, make(case)) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


def test_many_python_threads_at_once(operators: Operators) -> None:
    cases = [Case(m=m, k=130, n=97, r=9, p=0.1, dtype=dtype) for m in (1, 90) for dtype in DTYPES]
    with threads(1):
        alone = [run(operators, case, make(case)) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda case: run(operators, case, make(case)), cases * 10))
    for index, results in enumerate(together):
        assert all(same_bits(value, alone[index % len(cases)][name]) for name, value in results.items())


def test_calls_by_python_threads_that_each_use_the_pool(operators: Operators) -> None:
    case = Case(m=90, k=130, n=97, r=9, p=0.1)
    with threads(2), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(operators, case, make(case)), range(40)))
    assert all(same_bits(value, results[0][name]) for result in results for name, value in result.items())


def _in_a_process(code: str) -> str:
    environment = os.environ | {"LORA_KERNELS_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_SET_UP = """
import os, torch
from lora_kernels import FusedLoRALinear
layer, x = FusedLoRALinear(512, 384, r=8, init_lora_weights=False), torch.randn(200, 512)
y = layer(x)
"""


@pytest.mark.one_library
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts a process's threads in /proc: Linux only")
def test_the_number_of_threads_is_obeyed() -> None:
    code = """
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
layer(x).sum()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert (
        _in_a_process(_SET_UP.replace("import os, torch", "import os, torch; torch.set_num_threads(1)") + code) == "0"
    )


@pytest.mark.one_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_computes_too() -> None:
    """With one thread, as torch's own DataLoader sets it in its workers: a pool of OpenMP does not outlive a fork."""
    code = """
threads = torch.get_num_threads()
torch.set_num_threads(1)
alone = layer(x)
torch.set_num_threads(threads)
layer(x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(layer(x), alone) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _in_a_process(_SET_UP + code) == "0"


# What is refused


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(6, 9)},
        {"x": torch.ones(6)},
        {"x": torch.ones(6, 10, dtype=torch.float64)},
        {"x": torch.ones(6, 10, dtype=torch.int32)},
        {"weight": torch.ones(8, 11)},
        {"lora_a": torch.ones(3, 9)},
        {"lora_a": torch.ones(2, 10)},
        {"lora_a": torch.ones(3, 10, dtype=torch.int8)},
        {"lora_b": torch.ones(7, 3)},
        {"lora_b": torch.ones(24)},
        {"bias": torch.ones(9)},
        {"bias": torch.ones(8, 1)},
        {"dy": torch.ones(6, 7)},
        {"dy": torch.ones(5, 8)},
        {"h": torch.ones(5, 3)},
        {"h": torch.ones(6, 2)},
        {"h": torch.ones(6, 3, dtype=torch.bfloat16)},
        {"state": torch.ones(3, dtype=torch.int64)},
        {"state": torch.ones(2)},
    ],
    ids=lambda changed: ",".join(f"{name}{list(t.shape)}:{t.dtype}" for name, t in changed.items()),
)
def test_an_operator_refuses_what_it_cannot_run(operators: Operators, changed: dict[str, Tensor]) -> None:
    """``lora_linear`` checks before; called by themselves the operators must raise and never touch other memory."""
    given = {
        "x": torch.ones(6, 10),
        "weight": torch.ones(8, 10),
        "lora_a": torch.ones(3, 10),
        "lora_b": torch.ones(8, 3),
        "bias": torch.ones(8),
        "state": torch.ones(2, dtype=torch.int64),
        "dy": torch.ones(6, 8),
        "h": torch.ones(6, 3),
    } | changed
    settings = {"scaling": 1.0, "p": 0.5}
    forward = {name: given[name] for name in ("x", "weight", "lora_a", "lora_b", "bias", "state")}
    if not changed.keys() <= {"dy", "h"}:
        with pytest.raises(RuntimeError):
            operators.forward(**forward, **settings)
    with pytest.raises(RuntimeError):
        operators.backward(**given, **settings)


def test_a_layer_names_it_and_runs_it() -> None:
    layer = FusedLoRALinear(24, 16, r=4, init_lora_weights=False)
    with use_backend("native"):
        assert dispatch.explain(layer).backend == "native"
        assert layer(torch.randn(5, 24)).shape == (5, 16)
