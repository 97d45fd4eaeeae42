"""The kernel calls that ``compile_report`` compiles: those that the launch code makes for described machines.

The launch code itself runs, on meta tensors and with every launch replaced by a note of it: so the block sizes,
argument types and alignments are those of a real call. Forward and backward run by the best predicted plan of each
kind, the part operators as they come.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....codes import FOUR_BITS, Codes
from ....kept import row_words
from ..choose.blocks import FEW_TOKENS, Machine
from ..choose.candidates import candidates
from ..choose.hidden_operand import operand_on
from ..choose.plans import GLUON_PLANS, BackwardPlan, BaseFirst, Cell, FewTokens, ForwardPlan, Fused, Ring, RingGrads

__all__ = ["ARCHITECTURES", "CASES", "QUICK", "Case", "Job", "backward_plans_of", "jobs_of", "plans_of", "recording"]

# A100, H200 and B200 by their data sheets; shared memory is what one program may use.
ARCHITECTURES = {
    80: Machine(capability=80, sm_count=108, shared_memory=166912, clock=1.41e9, bandwidth=2.0e12),
    90: Machine(capability=90, sm_count=132, shared_memory=232448, clock=1.98e9, bandwidth=4.8e12),
    100: Machine(capability=100, sm_count=148, shared_memory=232448, clock=1.96e9, bandwidth=8.0e12),
}
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Case:
    """A layer to compile for: K = N = 4096 and ``m`` tokens; ``part_operators``, ``experts``: these too."""

    dtype: torch.dtype
    r: int = 16
    p: float = 0.0
    adapter_dtype: torch.dtype | None = None
    tf32: bool = False
    m: int = 8192
    part_operators: bool = False
    experts: bool = False

    def __str__(self) -> str:
        name = "tf32" if self.tf32 else _TYPE_NAMES[self.dtype]
        adapter = f" adapters {_TYPE_NAMES[self.adapter_dtype]}" if self.adapter_dtype else ""
        return f"{name} r={self.r} p={self.p} m={self.m}{adapter}"


_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = (
    Case(_BF16, part_operators=True),
    Case(_BF16, p=0.1),
    Case(_BF16, r=8, adapter_dtype=_FP32),
    Case(_BF16, r=32, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, r=64, p=0.1, adapter_dtype=_FP32, part_operators=True, experts=True),
    Case(_BF16, r=128, p=0.1),
    Case(_BF16, r=300, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=512, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=8, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_FP16, p=0.1, part_operators=True),
    Case(_FP16, r=64, p=0.1, adapter_dtype=_FP32, part_operators=True, experts=True),
    Case(_FP16, m=8, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_FP32, tf32=True),
    Case(_FP32, tf32=True, r=64, p=0.1),
    Case(_FP32, p=0.1, part_operators=True),
)
QUICK = (CASES[4], CASES[8])  # rank 64 with dropout, and few tokens


@dataclass(frozen=True)
class Job:
    """One call of one kernel, as ``triton.compile`` wants it."""

    kernel: str
    arch: int
    case: str
    exact: bool  # fp32 products in IEEE arithmetic: no tensor core does those
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    def key(self) -> str:
        constants = {name: str(value) for name, value in self.constants.items()}
        return json.dumps([self.kernel, self.arch, self.signature, constants, self.aligned, self.options])


def plans_of(machine: Machine, cell: Cell) -> list[ForwardPlan]:
    """The best predicted forward plan of each kind and variant; of few tokens, with and without a split of K.

    ``BaseFirst`` only for few tokens: its kernels are ``LoraFirst``'s but for one load.
    """
    found: dict[tuple[object, ...], ForwardPlan] = {}
    for plan in candidates(machine, cell):
        if isinstance(plan, (Ring, *GLUON_PLANS)) or (isinstance(plan, BaseFirst) and cell.tokens > FEW_TOKENS):
            continue  # hopper_jobs.py has the Gluon kernels
        variant = plan.variant if isinstance(plan, Fused) else isinstance(plan, FewTokens) and plan.splits > 1
        found.setdefault((plan.kind, variant), plan)
    return list(found.values())


def backward_plans_of(machine: Machine, cell: Cell) -> list[BackwardPlan]:
    """The best predicted backward plan of each kind and variant, and of each way to dh and db, and to da."""
    found: dict[tuple[object, ...], BackwardPlan] = {}
    for plan in candidates(machine, cell):
        if isinstance(plan, (RingGrads, *GLUON_PLANS)):
            continue
        found.setdefault((plan.kind, getattr(plan, "variant", "")), plan)
        found.setdefault((plan.hidden.joint,), plan)
        found.setdefault(("da", plan.da.splits > 1), plan)
    return list(dict.fromkeys(found.values()))


def jobs_of(case: Case, arch: int) -> Iterator[Job]:
    """The kernel calls of one layer, forward and backward by each kind of plan, from the launch code itself."""
    from .. import gated_operators, operators, part_operators
    from ..run.call import Call
    from ..run.forward import ready_product

    m, k, n, r = case.m, 4096, 4096, case.r
    adapter, p = case.adapter_dtype or case.dtype, case.p

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, weight = (meta(*shape, dtype=case.dtype) for shape in ((m, k), (m, n), (n, k)))
    lora_a, lora_b, bias = (meta(*shape, dtype=adapter) for shape in ((r, k), (n, r), (n,)))
    h, gain = (meta(*shape, dtype=torch.float32) for shape in ((m, r), (n,)))
    state = meta(2, dtype=torch.int64) if p else None
    states = [] if state is None else [state]
    dtype = "tf32" if case.tf32 else str(case.dtype).removeprefix("torch.")
    cell, machine = Cell("forward", m, k, n, r, dtype, state is not None), ARCHITECTURES[arch]
    back = replace(cell, direction="backward")
    operand = operand_on(arch, case.dtype, k, n, r)
    kept = h if operand is None else meta(m, operand.columns, dtype=torch.bfloat16)
    calls: list[Job] = []
    with recording(operators, case, arch, calls):
        for plan in plans_of(machine, cell):
            operators.run_plan(plan, x, weight, lora_a, lora_b, bias, 2.5, p, state)
        for backward in backward_plans_of(machine, back):
            operators.run_backward(backward, dy, x, weight, lora_a, lora_b, None, kept, 2.5, p, state)
            operators.run_backward(backward, dy, x, weight, lora_a, lora_b, None, None, 2.5, p, state)
        if case.part_operators or r > 128:
            part_operators.row_norms(weight, lora_a, lora_b, 2.5)
        if case.part_operators:
            part_operators.gain_grad(dy, dy, gain, bias)
            for number in range(3):
                gated_operators.gated(dy, dy, number)
                gated_operators.gated_grad(dy, dy, dy, number, False)
            gated_operators.gated(dy[:, : n // 2], dy[:, n // 2 :], 0)
            gated_operators.gated_grad(dy[:, : n // 2], dy[:, : n // 2], dy[:, n // 2 :], 0, True)
            _call_values(n, k, case.dtype)
            _call_combine(case.m, case.dtype)
            part_operators.output_grads(dy, lora_b, h, bias, 2.5)
            part_operators.input_grad([dy, dy], [weight, weight], [h, h], [lora_a, lora_a], p, 2 * states)
            call = Call.forward(x, weight, None, lora_b, bias, 0.0, None, h, gain)
            ways = {
                (plan.kind, getattr(plan, "variant", "")): plan
                for plan in part_operators.product_plans(x.device, call)[::-1]
            }
            for way in ways.values():
                ready_product(way, call)(None, x, weight, lora_b, bias, gain, h, None, dy, 2.5)
        if m <= FEW_TOKENS:
            _call_few_tokens(x, lora_a, lora_b, bias, h, gain, p, state)
        if state is not None:
            operators.mask(state, m, k, p)
        if case.experts:
            _call_experts(case)
    yield from calls


def _call_experts(case: Case) -> None:
    """Both passes of gate_up_proj of 128 experts, 2048 -> 1536, top-8."""
    from ..choose import blocks
    from ..choose.experts import Experts
    from ..run.experts import ExpertsCall, backward_step, forward_step

    m, k, n, r, experts = 8 * case.m, 2048, 1536, case.r, 128
    adapter = case.adapter_dtype or case.dtype

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, weight, h = meta(case.m, k), meta(m, n), meta(experts, n, k), meta(m, r, dtype=_FP32)
    lora_a, lora_b = meta(experts, r, k, dtype=adapter), meta(experts, n, r, dtype=adapter)
    offsets, tokens = meta(experts, dtype=torch.int32), meta(m, dtype=torch.int64)
    dropped = meta(m, row_words(k), dtype=torch.int32) if case.p else None
    call = ExpertsCall(
        machine=blocks.machine_of(x.device),
        device=x.device,
        of=Experts(m, experts, r, case.dtype, case.tf32, case.p > 0),
        precision="tf32" if case.tf32 else "ieee",
        k=k,
        n=n,
        stride_x=x.stride(),
        stride_w=weight.stride(),
        stride_a=lora_a.stride(),
        stride_b=lora_b.stride(),
        a_dtype=adapter,
        b_dtype=adapter,
        keep_scale=1.0 / (1.0 - case.p),
    )
    given = (weight, lora_a, lora_b, offsets, tokens)
    forward_step(call)(None, x, *given, 2.5, dropped)
    backward_step(call, y.stride(), (True, True, True))(None, y, x, *given, h, 2.5, dropped)


def _call_combine(tokens: int, dtype: torch.dtype) -> None:
    """A token's eight rows by weights of both kinds and by none, each gradient alone and both; odd widths too."""
    from ..combine_operators import combine, combine_grad

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k, offsets, places = 8, meta(128, dtype=torch.int32), meta(8 * tokens, dtype=torch.int64)
    for width in (2048, 4096, 1031):
        rows, dy = meta(k * tokens, width), meta(tokens, width)
        own, wide = meta(tokens, k), meta(tokens, k, dtype=_FP32)
        for weights in (own, wide, None):
            combine(rows, weights, places, offsets, k, dtype)
        combine_grad(dy, rows, own, places, offsets, dtype)
        combine_grad(dy, rows, wide, places, offsets, dtype)
        combine_grad(dy, rows, own, places, offsets, None)
        combine_grad(dy, None, own, places, offsets, dtype)
    combine(meta(tokens, width), meta(tokens, 1), meta(tokens, dtype=torch.int64), offsets, 1, dtype)


_CODES = (Codes("nf4", 1, 64, 256), Codes("fp4", 1, 64), Codes("e4m3", 128, 128))
_NF4 = Codes("nf4", 1, 64)


def _parts_of(codes: Codes, n: int, k: int) -> list[Tensor]:
    """The tensors of such a weight (n, k)."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if codes.number == "e2m1":
        whole = [meta()] if codes.scales == "e4m3" else []
        return [meta(n, k // 2, dtype=torch.uint8), meta(n, k // codes.wide, dtype=torch.uint8), *whole]
    if codes.number not in FOUR_BITS:
        data = meta(n, k, dtype=torch.int8 if codes.number == "int8" else torch.uint8)
        return [data, meta(n // (codes.high or n) * (k // (codes.wide or k)))]
    data, count = meta(n * k // 2, dtype=torch.uint8), n * k // codes.wide
    if not codes.nested:
        return [data, meta(count)]
    return [data, meta(count, dtype=torch.uint8), meta(count // codes.nested), meta(256), meta()]


def _call_values(n: int, k: int, dtype: torch.dtype) -> None:
    """The values of NF4 and FP4 in blocks of 64, with plain and with nested statistics; in bf16 those of the others."""
    from ..code_operators import values

    four_bits = tuple(Codes(of, 1, 64, nested) for of in FOUR_BITS for nested in (0, 256))
    others = (*_CODES[2:], Codes("e2m1", 1, 32, scales="e8m0"), Codes("e2m1", 1, 16, scales="e4m3"))
    for codes in (*four_bits, *(others if dtype is _BF16 else ())):
        values(_parts_of(codes, n, k), codes, n, k, dtype)


def _call_few_tokens(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor,
    h: Tensor,
    gain: Tensor,
    p: float,
    state: Tensor | None,
) -> None:
    """In bf16 over nested NF4, also by a given h and a gain; FP8; NF4, large, and without an adapter; else over FP4."""
    from ..code_operators import few_tokens

    n, k = lora_b.shape[0], x.shape[1]
    for codes in (_CODES[0], _CODES[2]) if x.dtype is _BF16 else _CODES[1:2]:
        few_tokens(x, _parts_of(codes, n, k), codes, lora_a, lora_b, None, bias, None, 2.5, p, state, False)
    if x.dtype is _BF16:
        few_tokens(x, _parts_of(_CODES[0], n, k), _CODES[0], None, lora_b, h, bias, gain, 2.5, 0.0, None, True)
        large, more = lora_b.new_empty((14336, lora_b.shape[1])), x.new_empty((16, k))
        few_tokens(more, _parts_of(_NF4, 14336, k), _NF4, lora_a, large, None, None, None, 2.5, 0.0, None, False)
        few_tokens(x, _parts_of(_NF4, n, k), _NF4, None, None, None, bias, None, 1.0, 0.0, None, False)


@contextlib.contextmanager
def recording(operators: Any, case: Case, arch: int, calls: list[Job]) -> Iterator[None]:
    """Within it the operators see the machine ``arch``, and launches are noted in the place of being done."""
    from ..choose import blocks
    from ..run.prepared import Launch, ScratchLaunch

    def note(self: Launch, stream: int | None, *arguments: Any) -> None:
        calls.append(_job(self, arguments, case, arch))

    kept = [(blocks, "machine_of"), (Launch, "__call__"), (ScratchLaunch, "__call__")]
    values = [getattr(owner, name) for owner, name in kept]
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    operators.forget()
    for (owner, name), value in zip(kept, (lambda device: ARCHITECTURES[arch], note, note), strict=True):
        setattr(owner, name, value)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        for (owner, name), value in zip(kept, values, strict=True):
            setattr(owner, name, value)
        operators.forget()


def _job(launch: Any, arguments: tuple[Any, ...], case: Case, arch: int) -> Job:
    """Types the arguments as Triton's launcher does: 1 and None are constants, multiples of 16 aligned."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, (*arguments, *launch.static), strict=True))
    parameters = {parameter.name: parameter for parameter in kernel.params}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for name, value in values.items():
        specialised = not parameters[name].do_not_specialize
        one = specialised and isinstance(value, int) and value == 1
        if parameters[name].is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPE_NAMES[value.dtype]}"
            aligned.append(name)
        elif hasattr(value, "block_shape"):  # a descriptor for TMA, made on the host
            block, layout = list(value.block_shape), value.layout
            signature[name] = f"tensordesc<{_TYPE_NAMES[value.base.dtype]}{block},{layout!r}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialised:
                aligned.append(name)
    exact = case.dtype == torch.float32 and not case.tf32
    options = {"enable_fp_fusion": True, **launch.options}
    return Job(kernel.__name__, arch, str(case), exact, signature, constants, tuple(aligned), options)
