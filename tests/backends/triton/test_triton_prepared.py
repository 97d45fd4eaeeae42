"""Launches made ready once: the second call binds nothing, and what Triton would specialise on makes another one."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, make
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose.plans import Plan
from lora_kernels.backends.triton.run import forward as forward_run
from lora_kernels.backends.triton.run import steps
from lora_kernels.backends.triton.run.call import Call
from lora_kernels.backends.triton.run.prepared import Cache, Launch, ScratchLaunch, first_that_runs
from lora_kernels.backends.triton.run.wrong_code import lanes_that_overflow
from lora_kernels.errors import BackendUnavailableError

BF16 = torch.bfloat16


class Compiled:
    """What Triton's ``kernel[grid](...)`` returns, and how it is launched again."""

    packed_metadata = ()

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, stream=None: self.calls.append((grid, arguments, stream))


class Kernel:
    """Stands in for a Triton kernel and counts how often it is bound."""

    def __init__(self, name: str, calls: list[Any], returns: bool = True, ptx: str = "") -> None:
        self.ptx = ptx
        self.__name__, self.calls, self.returns, self.bound = name, calls, returns, 0

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        return SimpleNamespace(asm={"ptx": self.ptx})

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.bound += 1
            return Compiled(self.calls) if self.returns else None

        return run


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Kernel]]:
    """All forward kernels replaced."""
    stand_ins = {}
    for module, name in [(forward_run, name) for name in vars(forward_run)] + [(steps, "shrink_kernel")]:
        if name.endswith("_kernel"):
            stand_ins[name] = Kernel(name, [])
            monkeypatch.setattr(module, name, stand_ins[name])
    operators.forget()
    yield stand_ins
    operators.forget()


def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float = 0.5) -> None:
    operators.forward(x, weight, a, b, bias, scaling, 0.0, None)


def bound(kernels: dict[str, Kernel]) -> int:
    return sum(kernel.bound for kernel in kernels.values())


def tensors(case: Case) -> list[Tensor]:
    i = make(case)
    return [t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias) if t is not None]


@pytest.mark.parametrize("m", [3, 35])
def test_the_second_call_binds_nothing(kernels: dict[str, Kernel], m: int) -> None:
    """And hands the kernel the new tensors and scaling between the same static arguments."""
    x, *others = tensors(Case(m=m))
    forward(x, *others)
    once = bound(kernels)
    other = x.clone()
    forward(other, *others, scaling=0.25)
    forward(other, *others, scaling=0.25)
    assert bound(kernels) == once
    name = "few_tokens_kernel" if m == 3 else "forward_kernel"
    grid, arguments, stream = kernels[name].calls[0]
    assert len(kernels[name].calls) == 2
    assert arguments[0] is other
    assert next(value for value in arguments if isinstance(value, float)) == 0.25
    assert len(grid) == 3
    assert stream is None


def _moved(tensor: Tensor) -> Tensor:
    """The same numbers, one element off a 16-byte boundary."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor)


CHANGES = {
    "more tokens": lambda x, w, a, b, bias: (torch.cat([x, x]), w, a, b, bias),
    "another stride of x": lambda x, w, a, b, bias: (x.t().contiguous().t(), w, a, b, bias),
    "x off 16 bytes": lambda x, w, a, b, bias: (_moved(x), w, a, b, bias),
    "another stride of B": lambda x, w, a, b, bias: (x, w, a, b.t().contiguous().t(), bias),
    "B off 16 bytes": lambda x, w, a, b, bias: (x, w, a, _moved(b), bias),
    "fp32 adapters": lambda x, w, a, b, bias: (x, w, a.float(), b.float(), bias),
    "another rank": lambda x, w, a, b, bias: (x, w, a[:4], b[:, :4].contiguous(), bias),
    "no bias": lambda x, w, a, b, bias: (x, w, a, b, None),
    "fp32 bias": lambda x, w, a, b, bias: (x, w, a, b, bias.float()),
    "every second bias": lambda x, w, a, b, bias: (x, w, a, b, torch.stack([bias, bias], 1)[:, 0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_specialised_on_is_in_the_key(kernels: dict[str, Kernel], change: Any) -> None:
    given = tensors(Case(m=35, dtype=BF16))
    forward(*given)
    once = bound(kernels)
    forward(*change(*given))
    assert bound(kernels) > once


@pytest.fixture
def backward_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Kernel]]:
    """All kernels of backward replaced."""
    stand_ins = {}
    for module in (steps, forward_run):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stand_ins[name] = Kernel(name, [])
            monkeypatch.setattr(module, name, stand_ins[name])
    operators.forget()
    yield stand_ins
    operators.forget()


def backward(given: list[Tensor], scaling: float = 0.5, **changes: Any) -> None:
    x, weight, a, b, bias = given
    tensors = {"dy": x.new_ones(x.shape[0], weight.shape[0]), "h": torch.ones(x.shape[0], a.shape[0])}
    tensors |= {"x": x, "weight": weight, "a": a, "b": b, "bias": bias} | changes
    operators.backward(*(tensors[n] for n in ("dy", "x", "weight", "a", "b", "bias", "h")), scaling, 0.0, None)


BACKWARD_CHANGES = {
    "another stride of dy": lambda x, w, a, b, bias: {"dy": x.new_ones(w.shape[0], x.shape[0]).t()},
    "dy off 16 bytes": lambda x, w, a, b, bias: {"dy": _moved(x.new_ones(x.shape[0], w.shape[0]))},
    "another stride of x": lambda x, w, a, b, bias: {"x": x.t().contiguous().t()},
    "another stride of W": lambda x, w, a, b, bias: {"weight": w.t().contiguous().t()},
    "fp32 adapters": lambda x, w, a, b, bias: {"a": a.float(), "b": b.float()},
    "no bias": lambda x, w, a, b, bias: {"bias": None},
    "no h": lambda x, w, a, b, bias: {"h": None},
}


@pytest.mark.parametrize("change", BACKWARD_CHANGES.values(), ids=BACKWARD_CHANGES)
def test_backward_is_bound_once_and_anew_where_it_is_specialised(
    backward_kernels: dict[str, Kernel], change: Any
) -> None:
    given = tensors(Case(m=35, dtype=BF16))
    backward(given)
    once = bound(backward_kernels)
    backward(given, scaling=1)
    assert bound(backward_kernels) == once
    backward(given, **change(*given))
    assert bound(backward_kernels) > once


def test_an_int_is_not_compiled_in(kernels: dict[str, Kernel]) -> None:
    """Triton would take an int of 1 for a constant."""
    operators.forward(*tensors(Case(m=35)), 1, 0.0, None)
    operators.forward(*tensors(Case(m=35)), 1, 0.0, None)
    (_, arguments, _), *_ = kernels["forward_kernel"].calls
    assert type(arguments[9]) is float


def test_a_release_that_returns_something_else_still_launches() -> None:
    kernel = Kernel("kernel", [], returns=False)
    ready = Launch(kernel, (1, 1, 1), ())
    for _ in range(3):
        ready(None)
    assert kernel.bound == 3


WRONG = """
	mul.wide.u32 	%rd80, %r1, 2147483648;
	shl.b64 	%rd82, %rd81, 34;
	or.b64 	%rd83, %rd80, %rd82;
	shl.b32 	%r96, %r3, 2;
	mov.b64 	{_, %r10}, %rd83;
"""  # Triton 3.6.0's of few_tokens_kernel, x in fp32 whose rows lie 80 numbers apart
RIGHT = (
    "",
    WRONG.replace("2147483648", "16"),  # t * 16 fits; the compiler has made this of expand_kernel
    WRONG.replace("{_, %r10}", "{%r10, _}"),
    WRONG.replace("%rd83, %rd80", "%rd83, %rd79"),
    WRONG.replace("2147483648", "3528531795"),  # Philox
)


@pytest.mark.parametrize(
    "ptx", [WRONG, WRONG.replace("mul.wide.u32 	%rd80, %r1, 2147483648", "shl.b64 	%rd80, %rd7, 28")]
)
def test_what_is_compiled_wrongly_is_not_launched(ptx: str) -> None:
    """The next plan serves; where there is none, a sentence says what to do."""
    wrong, right = Kernel("wrong_kernel", [], ptx=ptx), Kernel("right_kernel", [], ptx=RIGHT[1])
    runs = [Launch(kernel, (1, 1, 1), ()) for kernel in (wrong, right)]
    run, _ = first_that_runs(runs, lambda launch: launch(None))
    assert run is runs[1]
    assert (wrong.bound, right.bound) == (0, 1)
    with pytest.raises(BackendUnavailableError, match=r"compiled wrong_kernel wrongly.*install triton 3.7"):
        first_that_runs(runs[:1], lambda launch: launch(None))


@pytest.mark.parametrize("ptx", RIGHT)
def test_what_is_compiled_rightly_is_launched(ptx: str) -> None:
    assert lanes_that_overflow(ptx) == 0
    kernel = Kernel("right_kernel", [], ptx=ptx)
    Launch(kernel, (1, 1, 1), ())(None)
    assert kernel.bound == 1


def test_the_allocator_is_set_for_the_launch_alone() -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime import _allocation

    def current() -> Any:
        return _allocation._allocator.get()

    seen = []

    class Looks(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: seen.append(current())

    def mine(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    def check() -> None:
        before = current()
        ScratchLaunch(Looks("kernel", []), (1, 1, 1), ())(None)
        assert current() is before
        triton.set_allocator(mine)
        ScratchLaunch(Looks("kernel", []), (1, 1, 1), ())(None)
        assert current() is mine

    contextvars.copy_context().run(check)
    assert len(seen) == 2
    assert mine not in seen


def test_a_plan_that_does_not_fit_is_stepped_over(kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    given = tensors(Case(m=35))
    tried = []

    def ready(plan: Plan, call: Call) -> forward_run.Run:
        def run(*arguments: Any) -> Any:
            tried.append(plan)
            if len(tried) < 3:
                raise (OutOfResources(9, 1, "shared memory"), RuntimeError("PassManager::run failed"))[len(tried) - 1]
            return given[0], given[0]

        return run

    monkeypatch.setattr(operators, "ready", ready)
    forward(*given)
    forward(*given)
    assert tried[2] == tried[3]
    assert len({str(plan) for plan in tried}) == 3

    operators.forget()
    monkeypatch.setattr(operators, "ready", lambda plan, call: lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(*given)


def test_a_full_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.backends.triton.run.prepared._LIMIT", 2)
    cache: Cache[int] = Cache()
    assert [cache.keep(key, key) for key in range(3)] == [0, 1, 2]
    assert dict(cache) == {2: 2}
