"""The part operators of every backend: torch.library's contract, what they allow, and the norms against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import BACKENDS, Case, contract, make
from lora_kernels import dispatch, ops, reference
from lora_kernels.activations import GATES
from lora_kernels.backends import composed, eager
from lora_kernels.ops import Operators
from lora_kernels.reference import adapter_dtype
from lora_kernels.verify.cases import Inputs
from numerics import check, check_all, same_bits

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
CASES = [
    Case(m=6, k=10, n=8, r=3, p=0.5),
    Case(m=80, k=10, n=8, r=3, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(m=66, k=10, n=8, r=3, bias=False, x_layout="transposed", dtype=torch.float16),
    Case(m=0, k=10, n=8, r=3, p=0.5),  # beyond the number of backends: ``contract`` traces each of them of some rows
]


class Given:
    """Operators behind the dispatcher, and detached tensors: inputs, gain, dropout state, hidden matrices (M, R)."""

    def __init__(self, case: Case, backend: str, device: str) -> None:
        dispatch.select(device, case.dtype, backend)
        self.table: Operators = ops._registered[backend]
        i = make(case, device)
        self.i = Inputs(*(None if t is None else t.detach() for t in vars(i).values()))
        wide, hidden = torch.promote_types(case.dtype, torch.float32), self.table.kept.hidden_dtype(case.dtype)
        self.gain = torch.linspace(-1.0, 2.0, case.n, dtype=wide, device=device)
        self.state = dispatch.backend(backend).dropout_state(self.i.x, case.p) if case.p else None
        drawn = torch.randn(case.m, case.r + 4, generator=torch.Generator().manual_seed(3))
        self.sliced = drawn.to(device, hidden)[:, 2:-2]  # rows at a distance of R + 4
        self.case = case


def calls(g: Given) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator, everything due and as little as possible."""
    i, s, p, h = g.i, g.case.scaling, g.case.p, g.sliced
    states = [] if g.state is None else [g.state, g.state]
    return {
        "shrink": [(i.x, i.lora_a, p, g.state)],
        "product": [
            (i.x, i.weight, i.lora_b, h, i.bias, g.gain, s, True),
            (i.x, i.weight, i.lora_b, h, None, g.gain, s, False),
            (i.x, i.weight, i.lora_b, h, i.bias, None, s, False),
        ],
        "output_grads": [(i.dy, i.lora_b, h, i.bias, s), (i.dy, i.lora_b, None, None, s)],
        "input_grad": [([i.dy, i.dy], [i.weight, i.weight], [h, h], [i.lora_a, i.lora_a], p, states),
                       ([i.dy], [i.weight], [h], [i.lora_a], p, states[:1])],
        "a_grad": [(h, i.x, p, g.state)],
        "gain_grad": [(i.dy, i.dy, g.gain, i.bias), (i.dy, None, g.gain, None)],
        "row_norms": [(i.weight, i.lora_a, i.lora_b, s)],
        "gated": [(i.dy, i.dy + 1.0, 1)],
        "gated_grad": [(i.dy, i.dy + 1.0, i.dy - 1.0, 1, joined) for joined in (False, True)],
    }  # fmt: skip


PARTS = tuple(name for name in ops.OPERATOR_NAMES if name not in ("forward", "backward", "mask"))


@every_backend
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, name: str, backend: str, device: str) -> None:
    given = Given(case, backend, device)
    checks = contract(CASES.index(case), backend)
    for arguments in calls(given)[name]:
        torch.library.opcheck(getattr(given.table, name), arguments, test_utils=checks)


@every_backend
@pytest.mark.parametrize("name", PARTS)
def test_nothing_given_is_written_to_or_shared(name: str, backend: str, device: str) -> None:
    given = Given(Case(m=70, p=0.3), backend, device)
    for arguments in calls(given)[name]:
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        results = getattr(given.table, name)(*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        own = [result.untyped_storage().data_ptr() for result in results if result.numel()]
        assert not addresses & set(own)
        assert len(set(own)) == len(own)


@every_backend
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "f"), [(0, 5), (1, 1), (37, 203), (3, 2050)])
def test_a_gated_product_against_float64(
    m: int, f: int, dtype: torch.dtype, gate: str, joined: bool, backend: str, device: str
) -> None:
    """Of halves of one matrix, whose rows lie apart; the yardstick is PyTorch's composition, which rounds each step."""
    dispatch.select(device, dtype, backend)
    table, generator = ops._registered[backend], torch.Generator().manual_seed(7)
    both, outer = (3.0 * torch.randn(m, 2 * f, generator=generator).to(dtype) for _ in range(2))
    given = [t.to(device) for t in (outer[:, f:], both[:, :f], both[:, f:])]
    number = GATES.index(gate)

    def results(of: Operators, tensors: list[Tensor]) -> dict[str, Tensor]:
        dgate, dup = of.gated_grad(*tensors, number, joined)
        dgate, dup = (dgate[:, :f], dgate[:, f:]) if joined else (dgate, dup)
        return {"a": of.gated(*tensors[1:], number), "dgate": dgate, "dup": dup}

    wide = [t.double() for t in given]

    def exact() -> dict[str, Tensor]:
        dgate, dup = reference.gated_backward(*wide, gate)
        return {"a": reference.gated(*wide[1:], gate), "dgate": dgate, "dup": dup}

    dispatch.select(device, dtype, "eager")
    check_all(results(table, given), exact, results(ops._registered["eager"], given), dtype)


def exact_norms(i: Inputs, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + s B A written out, A and B rounded as over W's dtype they are."""
    rounded = (t.to(adapter_dtype(i.weight.dtype)).to(dtype) for t in (i.lora_b, i.lora_a))
    lora_b, lora_a = rounded
    return (i.weight.to(dtype) + scaling * lora_b @ lora_a).norm(dim=1)


@every_backend
@pytest.mark.parametrize(
    "case",
    [Case(), Case(k=129, n=31, r=17, scaling=-2.0), Case(n=70, r=64, dtype=torch.bfloat16), Case(zeroed="lora_b"),
     Case(dtype=torch.float16, adapter_dtype=torch.float32), Case(k=1, n=1, r=1), Case(n=300, k=513, r=8)],
    ids=str,
)  # fmt: skip
def test_row_norms_against_float64(case: Case, backend: str, device: str) -> None:
    given = Given(case, backend, device)
    norms = given.table.row_norms(given.i.weight, given.i.lora_a, given.i.lora_b, case.scaling)
    exact, yardstick = (exact_norms(given.i, case.scaling, dtype) for dtype in (torch.float64, torch.float32))
    check("norms", norms, exact, yardstick, torch.float32)
    turned = given.table.row_norms(given.i.weight.t().contiguous().t(), given.i.lora_a, given.i.lora_b, case.scaling)
    check("norms of a transposed weight", turned, exact, yardstick, torch.float32)


@every_backend
def test_row_norms_of_zeros_and_of_what_cancels(backend: str, device: str) -> None:
    """A row that is zero has the norm zero, not NaN; so has, nearly, one that the adapter cancels."""
    given = Given(Case(), backend, device)
    weight = given.i.weight.clone()
    lora_b = given.i.lora_b.clone()
    weight[3], lora_b[3] = 0.0, 0.0
    weight[5] = -0.5 * (lora_b[5] @ given.i.lora_a)
    norms = given.table.row_norms(weight, given.i.lora_a, lora_b, 0.5)
    assert norms[3] == 0.0
    assert torch.isfinite(norms).all()
    assert norms[5] < 1e-3 * weight[5].norm()


def test_in_pieces_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager holds few elements of W, and of dy, in fp32 at once: ragged pieces give what one piece gives."""
    case = Case(m=37, n=37, k=8, dtype=torch.bfloat16)
    given = Given(case, "eager", "cpu")
    i = given.i
    run: Callable[[], dict[str, Tensor | None]] = lambda: {  # noqa: E731
        "dx": given.table.row_norms(i.weight, i.lora_a, i.lora_b, 0.5),
        "dgain": given.table.gain_grad(i.dy, i.dy, given.gain, None)[1],
    }
    whole = run()
    exact = {"dx": exact_norms(i, 0.5, torch.float64), "dgain": (i.dy.double() ** 2).sum(0)}
    monkeypatch.setattr(composed, "_NORM_ELEMENTS", 5 * 37)
    check_all(run(), exact, {name: value for name, value in whole.items() if value is not None}, torch.float32)


class _RowsApart(TorchDispatchMode):
    """Counts what products are given of matrices whose rows are ragged and lie apart; past W's rows none read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.found = weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
            torch.ops.aten.linear,
        ):
            for given in args:
                apart = isinstance(given, Tensor) and given.dim() == 2 and given.element_size() == 2
                apart = apart and given.data_ptr() != self.weight
                matrix = given.t() if apart and given.stride(0) == 1 else given
                self.found += apart and not matrix.is_contiguous() and matrix.shape[1] % 32 != 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("m", [5, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_product_is_given_rows_that_it_would_read_past(
    dtype: torch.dtype, m: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AMX: the copies change no bit, and without them products would be given such rows."""
    g, counts, results = Given(Case(m=m, k=37, n=21, r=3, p=p, dtype=dtype), "eager", "cpu"), [], []
    for name in ("x", "dy"):
        tensor = getattr(g.i, name)
        apart = tensor.new_full((m, tensor.shape[1] + 5), float("nan"))[:, 2:-3].copy_(tensor)
        g.i = replace(g.i, **{name: apart})
    for amx in (False, True):
        monkeypatch.setattr(composed, "_READS_PAST_ROWS", amx)
        with _RowsApart(g.i.weight) as watch:
            given = [(name, arguments) for name, every in calls(g).items() for arguments in every]
            results.append([eager._composition.operators[name](*arguments) for name, arguments in given])
        counts.append(watch.found)
    assert counts[0] > 0
    assert counts[1] == 0
    if not torch.cpu._is_amx_tile_supported():
        assert all(same_bits(*pair) for pair in zip(*map(flat, results), strict=True))


def flat(results: Any) -> list[Tensor]:
    """The tensors of a list of tensors and tuples of them."""
    return [results] if isinstance(results, Tensor) else [tensor for result in results for tensor in flat(result)]
