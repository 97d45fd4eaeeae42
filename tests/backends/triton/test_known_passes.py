"""Warm calls whose pass C++ finds by their tensors: what they give, what is no such call, the way back to Python."""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton import knobs

from driver_stand_in import DriverStandIn
from fake_kernels import STREAM, FakeKernel, launches
from lora_kernels.backends.triton.run import launcher
from lora_kernels.backends.triton.run.chosen import EitherRun, enter
from lora_kernels.backends.triton.run.launcher import KnownPasses, PassRun
from lora_kernels.backends.triton.run.prepared import Launch
from numerics import same_bits

pytestmark = pytest.mark.xdist_group("recorded launches")

CUDA = torch.device("cuda", 0)
P, KIND = 0.25, 3
ABSENT = torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)


class Operator:
    """``x (..., 8) -> y (..., 4)``, which is x wᵀ, nothing, and h, by a run that is entered once it is warm."""

    def __init__(self) -> None:
        self.kernel = FakeKernel("*fp32", "*fp32", "fp32", "i32", "constexpr")
        launch = Launch(self.kernel, (2, 1, 1), (8, None))

        def run(stream: int | None, x: Tensor, w: Tensor, bias: Tensor | None, number: float) -> tuple[Any, ...]:
            y, h = torch.mm(x, w.t()), torch.empty(x.shape[0], 2)
            launch(stream, x, h, number)
            return y, None, h

        self.known, self.run = KnownPasses(), PassRun(run, CUDA, ABSENT)

    def warm(self, x: Tensor, w: Tensor, bias: Tensor | None = None, either: bool = False) -> None:
        for _ in range(2):
            self.run(x, w, bias, 0.5)
        of: Any = EitherRun(self.run, self.run) if either else self.run
        enter(self.known, of, P, KIND, (x, w, bias), lambda: ABSENT)

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None, p: float = P, kind: int = KIND) -> Any:
        return self.known(0.5, p, kind, x, w, bias)


@pytest.fixture
def operator(driver: DriverStandIn) -> Operator:
    return Operator()


def made() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8), torch.randn(4, 8)


def test_it_gives_and_launches_what_the_run_does(operator: Operator, driver: DriverStandIn) -> None:
    x, w = made()
    assert operator(x, w) == ()
    operator.warm(x, w)
    launches(driver)
    other, own = made()
    y, nothing, h = operator(other, own)
    assert same_bits(y, other @ own.t())
    assert nothing is ABSENT[1]
    assert (h.shape, launches(driver), len(operator.kernel.launched)) == ((6, 2), 1, 1)


LEADING: dict[str, Callable[[Tensor], Tensor]] = {  # of (6, 8)
    "(2, 3, 8)": lambda x: x.view(2, 3, 8),
    "(1, 6, 1, 8)": lambda x: x.view(1, 6, 1, 8),
    "rows of another's memory": lambda x: torch.cat((torch.zeros(2, 8), x))[2:].view(3, 2, 8),
    "negated in place": lambda x: torch._neg_view(-x).view(2, 3, 8),
}


@pytest.mark.parametrize("name", LEADING)
def test_leading_dimensions_are_rows(operator: Operator, name: str) -> None:
    x, w = made()
    operator.warm(x, w)
    given = LEADING[name](x)
    y, _, h = operator(given, w)
    assert y.shape == (*given.shape[:-1], 4)
    assert y.is_contiguous()
    assert same_bits(y.view(6, 4), x @ w.t())
    assert h.shape == (6, 2)
    y += 1.0


def test_a_negated_tensor_is_taken_for_what_it_is(operator: Operator) -> None:
    x, w = made()
    operator.warm(x, w)
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    assert same_bits(operator(negated, w)[0], x @ w.t())
    assert same_bits(operator(x, torch._neg_view(-w))[0], x @ w.t())


def unaligned(tensor: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1), tensor.flatten()))[1:].view_as(tensor)


OTHERS: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "more rows": lambda x, w: (torch.randn(7, 8), w),
    "a vector": lambda x, w: (x[0], w),
    "other rows apart": lambda x, w: (torch.randn(6, 16)[:, :8], w),
    "columns apart": lambda x, w: (torch.randn(8, 6).t(), w),
    "rows at no one distance": lambda x, w: (x.view(2, 3, 8).transpose(0, 1), w),
    "another dtype": lambda x, w: (x.double(), w.double()),
    "off a boundary": lambda x, w: (unaligned(x), w),
    "no rows": lambda x, w: (x[:0], w),
    "a number": lambda x, w: (x.sum(), w),
    "sparse": lambda x, w: (x.to_sparse(), w),
    "on the meta device": lambda x, w: (x.to("meta"), w),
    "a tensor more": lambda x, w: (x, w, torch.ones(4)),
    "a tensor less": lambda x, w: (x, None),
    "another p": lambda x, w: (x, w, None, 0.5),
    "of another kind": lambda x, w: (x, w, None, P, 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_not_known(operator: Operator, driver: DriverStandIn, name: str) -> None:
    x, w = made()
    operator.warm(x, w)
    launches(driver)
    assert len(operator(*OTHERS[name](x, w))) == 0
    assert launches(driver) == 0
    assert len(operator(x, w)) == 3


def test_two_calls_are_known_apart(driver: DriverStandIn) -> None:
    one, other = Operator(), Operator()
    x, w = made()
    one.warm(x, w)
    assert len(other(x, w)) == 0
    other.warm(x[:4], w)
    assert len(one(x[:4], w)) == 0
    assert other(x[:4], w)[0].shape == (4, 4)
    other.known.clear()
    assert len(other(x[:4], w)) == 0
    assert len(one(x, w)) == 3


def test_lists_of_tensors(driver: DriverStandIn) -> None:
    """As a group has them: several results of rows, more than eight tensors, several numbers."""
    kernel = FakeKernel("*fp32", "*fp32", "fp32", "fp32")
    launch = Launch(kernel, (2, 1, 1), ())

    def run(stream: int | None, x: Tensor, ws: list[Tensor], numbers: list[float]) -> tuple[Tensor, ...]:
        ys, h = [torch.mm(x, w.t()) for w in ws], torch.empty(6, 2)
        launch(stream, x, h, *numbers)
        return *ys, h

    passes, known = PassRun(run, CUDA), KnownPasses()
    x, ws, numbers = torch.randn(6, 8), [torch.randn(4, 8) for _ in range(9)], [0.5, 0.25]
    for _ in range(2):
        passes(x, ws, numbers)
    enter(known, SimpleNamespace(passes=passes), P, KIND, (x, *ws), lambda: [x] * 10, 9)
    driver.parameters(0x700, (8, 8, 4, 4))
    launches(driver)
    *ys, h = known.many([1.0, 2.0], P, KIND, [x.view(3, 2, 8), *ws])
    assert [same_bits(y, (x @ w.t()).view(3, 2, 4)) for y, w in zip(ys, ws, strict=True)] == [True] * 9
    assert h.shape == (6, 2)
    (line,) = driver.take("cuLaunchKernelEx")
    assert line[-2:] == [struct.pack("<f", number).hex() for number in (1.0, 2.0)]
    assert len(known.many([1.0, 2.0], P, KIND, [x, *ws[:8]])) == 0
    assert len(known.many([1.0, 2.0], P, KIND, [x, *ws[::-1], None])) == 10
    assert len(known.many([1.0], P, KIND, [x, *ws])) == 0  # refused by the pass
    assert len(known.many([1.0, 2.0], P, KIND, [x] * 41)) == 0


def test_a_captured_graph_takes_its_own_run(operator: Operator, driver: DriverStandIn) -> None:
    x, w = made()
    operator.warm(x, w, either=True)
    assert len(operator(x, w)) == 3
    driver.capture(STREAM)
    assert len(operator(x, w)) == 0
    driver.capture(0)
    driver.fail("cuStreamIsCapturing", 700)
    assert len(operator(x, w)) == 0
    assert len(operator(x, w)) == 3


def test_what_is_the_same_in_a_graph_is_known_there(operator: Operator, driver: DriverStandIn) -> None:
    x, w = made()
    operator.warm(x, w)
    driver.capture(STREAM)
    assert len(operator(x, w)) == 3


def test_a_hook_of_triton_s_sees_the_launches(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = made()
    operator.warm(x, w)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    assert len(operator(x, w)) == 0


def test_a_pass_that_is_gone_is_not_known(operator: Operator) -> None:
    x, w = made()
    operator.warm(x, w)
    operator.run._pass = None
    gc.collect()
    assert len(operator(x, w)) == 0
    operator.warm(x, w)  # it is recorded anew, and known anew
    assert len(operator(x, w)) == 3


def test_what_the_driver_refuses_goes_the_long_way(operator: Operator, driver: DriverStandIn) -> None:
    x, w = made()
    operator.warm(x, w)
    driver.fail("cuLaunchKernelEx", 400)
    assert len(operator(x, w)) == 0
    assert len(operator(x, w)) == 3


def test_a_run_is_entered_once(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = made()
    operator.warm(x, w)
    monkeypatch.setattr(KnownPasses, "enter", lambda *arguments: pytest.fail("it was entered again"))
    enter(operator.known, operator.run, P, KIND, (x, w, None), lambda: ABSENT)


def test_without_a_library_nothing_is_known(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_found", launcher._Found(None, "there is none."))
    operator = Operator()
    x, w = made()
    operator.warm(x, w)
    assert operator(x, w) == ()


def test_what_is_no_such_pass_is_refused(operator: Operator) -> None:
    x, w = made()
    operator.warm(x, w)
    found = launcher._search().library
    assert found is not None
    ready: Any = operator.run._pass
    with pytest.raises(RuntimeError, match="other tensors or results"):
        found.enter_pass(99, ready.handle, P, KIND, False, 1, [None, None, None], [x, w, None])
    with pytest.raises(RuntimeError, match="no prepared pass 123456"):
        found.enter_pass(99, 123456, P, KIND, False, 1, [None], [x])
