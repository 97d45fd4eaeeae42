"""The problems that the tests run, as data, and the one way to make and run them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels import dispatch, lora_linear, ops
from lora_kernels.accuracy import expected_errors, run_reference
from lora_kernels.verify.cases import Inputs

# "1": collect as on a machine with a GPU, to see which tests would run there; conftest.py runs none of them then.
PRETENDED = os.environ.get("LORA_KERNELS_TESTS_PRETEND_GPU") == "1"
CUDA = PRETENDED or torch.cuda.is_available()
# Every backend on every device it takes here; without a GPU, Triton's interpreter (conftest.py) takes CPU tensors.
BACKENDS = [
    (name, device)
    for device in (["cpu", "cuda"] if CUDA else ["cpu"])
    for name in reversed(dispatch.ORDER)
    if (PRETENDED and device == "cuda") or not dispatch.backend(name).why_not(dispatch.Problem(device, torch.float32))
]


@dataclass(frozen=True)
class Case:
    """One LoRA problem: y (M, N) of x (M, K) at rank R."""

    m: int = 24
    k: int = 40
    n: int = 56
    r: int = 8
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    p: float = 0.0
    bias: bool = True
    scaling: float = 0.5
    x_layout: str = "contiguous"  # or "rows" (a row-strided view), "transposed"
    zeroed: str = ""  # a tensor that is all zeros, to isolate the other terms

    def __str__(self) -> str:
        default = Case()
        changed = {f: getattr(self, f) for f in self.__dataclass_fields__ if getattr(self, f) != getattr(default, f)}
        return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in changed.items()) or "default"


SHAPES = [
    Case(),
    Case(m=1),
    Case(m=3, k=17, n=5, r=1),
    Case(m=65, k=33, n=70, r=3),
    Case(m=40, k=129, n=31, r=17),
    Case(m=20, k=16, n=16, r=64),
    Case(bias=False),
    Case(scaling=-2.0),
    Case(x_layout="rows"),
    Case(x_layout="transposed"),
    Case(zeroed="weight"),
    Case(zeroed="lora_b"),
    Case(zeroed="lora_a"),
    Case(p=0.1),
    Case(m=37, k=50, p=0.5),
]
HALF = (torch.float16, torch.bfloat16)
MIXED = [
    *[replace(Case(p=p), dtype=dtype) for dtype in HALF for p in (0.0, 0.1)],
    *[Case(dtype=dtype, adapter_dtype=torch.float32, p=p) for dtype in HALF for p in (0.0, 0.1)],
    Case(dtype=torch.float32, adapter_dtype=torch.bfloat16),
]
DOUBLE = [
    Case(dtype=torch.float64),
    Case(dtype=torch.float64, p=0.3),
    Case(dtype=torch.float64, adapter_dtype=torch.float32),
]


def contract(number: int, backend: str) -> tuple[str, ...]:
    """What of torch.library's contract to check an operator for, of a list's case of this number.

    Tracing with sizes that are symbols takes ten times as long as all else, and runs what no backend has for itself
    but by its ``Kept``: the fakes. So each backend has a case, and each case a backend, of which it is checked.
    """
    names = list(dict.fromkeys(name for name, _ in BACKENDS))
    traced = ["test_aot_dispatch_dynamic"] if names[number % len(names)] == backend else []
    return "test_schema", "test_autograd_registration", "test_faketensor", *traced


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors, the adapter's term about as large as the base's, so that its errors cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = case.adapter_dtype or case.dtype

    def draw(name: str, *shape: int, scale: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.0 if name == case.zeroed else scale)
        return values.to(device=device, dtype=dtype)

    if case.x_layout == "rows":
        x = draw("x", max(2 * case.m, 1), case.k, scale=1.0, dtype=case.dtype)[: 2 * case.m : 2]
    elif case.x_layout == "transposed":
        x = draw("x", case.k, case.m, scale=1.0, dtype=case.dtype).t()
    else:
        x = draw("x", case.m, case.k, scale=1.0, dtype=case.dtype)
    return Inputs(
        x=x.requires_grad_(),
        weight=draw("weight", case.n, case.k, scale=case.k**-0.5, dtype=case.dtype),
        lora_a=draw("lora_a", case.r, case.k, scale=case.k**-0.5, dtype=adapter_dtype).requires_grad_(),
        lora_b=draw("lora_b", case.n, case.r, scale=case.r**-0.5 / case.scaling, dtype=adapter_dtype).requires_grad_(),
        bias=draw("bias", case.n, scale=1.0, dtype=case.dtype).requires_grad_() if case.bias else None,
        dy=draw("dy", case.m, case.n, scale=1.0, dtype=case.dtype),
    )


def run(case: Case, inputs: Inputs, backend: str, seed: int = 1) -> dict[str, Tensor | None]:
    """Forward and every gradient through the public function and autograd."""
    torch.manual_seed(seed)
    i = inputs
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, case.p > 0, backend)
    leaves = [t for t in (i.x, i.lora_a, i.lora_b, i.bias) if t is not None]
    dx, da, db, *dbias = torch.autograd.grad(y, leaves, i.dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db, "dbias": dbias[0] if dbias else None}


def keep_mask(case: Case, inputs: Inputs, backend: str, seed: int = 1) -> Tensor | None:
    """The mask that ``run`` with the same seed drew, from the backend itself."""
    if not case.p:
        return None
    torch.manual_seed(seed)
    dispatch.select(inputs.x.device.type, case.dtype, backend)
    state = dispatch.backend(backend).dropout_state(inputs.x.detach(), case.p)
    return ops.operators(backend).mask(state, case.m, case.k, case.p)


def expected(case: Case, inputs: Inputs, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's results in ``dtype``: float64 is *exact*, the case's own dtype the *yardstick*."""
    i = inputs
    return run_reference(dtype, i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy, case.scaling, mask, case.p)


def measures(
    case: Case, inputs: Inputs, mask: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What results are judged by: exact, the yardstick, and the error to expect of each element."""
    dtype, i = dtype or case.dtype, inputs
    given = (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy, case.scaling, mask, case.p)
    return run_reference(torch.float64, *given), run_reference(dtype, *given), expected_errors(dtype, *given)
