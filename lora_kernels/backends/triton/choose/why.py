"""Why a pass takes its plan: measured or predicted, what it launches and moves, and why no other way is taken.

It rests on ``candidates.in_order``, by which the operators choose too, so what it tells is what runs, unless a kernel
turns out not to compile: then the next of the same ranking does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ....explaining.report import Launch, Other, PassPlan, by_how_much
from ....kept import row_words
from .blocks import FEW_TOKENS, FEW_TOKENS_RANK, Machine, next_power_of_2
from .candidates import (
    candidates,
    fits,
    host_seconds,
    in_order,
    of_row,
    on_one_stream,
    predicted_seconds,
)
from .candidates import order as cost_of
from .cost import BackwardModel, Model, SkinnyModel, bytes_of_h
from .gluon_candidates import gluon_fault
from .group_candidates import static_fault, tokens_fault
from .group_plans import GROUP_KERNELS, Apart, DxHopperGroup, HopperGroup
from .hopper_cost import HopperModel
from .hopper_group_cost import HopperGroupModel
from .launching import GRAPH, PREPARED, PYTHON, Launching
from .plans import (
    GLUON_PLANS,
    UNMEASURED,
    VARIANTS,
    BackwardPlan,
    BaseFirst,
    Cell,
    DxFused,
    DxHopper,
    FewTokens,
    ForwardPlan,
    Fused,
    GluonPlan,
    Hopper,
    HopperInside,
    LoraFirst,
    Plan,
    Ring,
    RingGrads,
)
from .ring import grads_bytes, ring_fault
from .table import Row
from .tuned import Loaded

__all__ = ["WAYS", "cells", "group_notes", "launches", "pass_plan", "plans", "reads_by_descriptor", "way_of"]

_GLUON = {"forward": ("hopper", "hopper_inside"), "backward": ("dx_hopper", "dx_inside")}
WAYS = {
    "forward": (
        "ring",
        "few_tokens",
        *_GLUON["forward"],
        *(f"fused {v}" for v in VARIANTS),
        "lora_first",
        "base_first",
    ),
    "backward": ("ring_grads", *_GLUON["backward"], *(f"dx_fused {v}" for v in VARIANTS), "dx_lora_first"),
}
_OF_GROUPS = {"forward": ("hopper_group", "apart"), "backward": ("dx_hopper_group", "apart")}
_MICRO = 1e6
_LINE = 16  # bytes, on whose multiples a row starts that TMA reads
_TRANSPOSED = "it loads by TMA, which reads rows in one piece, and W is stored (K, N)."


def plans(
    machine: Machine,
    name: str,
    table: Loaded,
    sizes: tuple[int, int, int, int],
    dtype: str,
    dropout: bool,
    transposed: bool = False,
    launching: Launching = PREPARED,
) -> tuple[PassPlan, ...]:
    """Of both passes.

    Args:
        name: what the machine is called.
        sizes: M, K, N, R.
        dtype: one of ``plans.DTYPES``.
        transposed: W is stored (K, N), as ``Conv1D`` does.
        launching: how its kernels are launched outside of graphs.
    """
    found = [
        pass_plan(machine, cell, table, name, reads_by_descriptor(cell, transposed), transposed, launching)
        for cell in cells(sizes, dtype, dropout)
    ]
    bucket = next_power_of_2(sizes[0])
    note = f"Sizes between powers of 2 share a plan: these numbers are for {bucket} tokens."
    return tuple(p if bucket == sizes[0] else replace(p, notes=(*p.notes, note)) for p in found)


def cells(sizes: tuple[int, int, int, int], dtype: str, dropout: bool) -> tuple[Cell, Cell]:
    """What the choice of each pass depends on."""
    m, k, n, r = sizes
    forward, backward = (Cell(d, next_power_of_2(m), k, n, r, dtype, dropout) for d in ("forward", "backward"))
    return forward, backward


def group_notes(machine: Machine, name: str, table: Loaded, sizes: tuple[tuple[int, int], ...], m: int, k: int,
                dtype: str, dropout: bool, launching: Launching = PREPARED) -> tuple[str, ...]:  # fmt: skip
    """A sentence for each pass: how layers of one x run it together, of N and rank ``sizes``."""
    (n, r), *others = sizes
    notes = []
    for direction in _OF_GROUPS:
        cell = Cell(direction, next_power_of_2(m), k, n, r, dtype, dropout, tuple(others))
        told = pass_plan(machine, cell, table, name, launching=launching)
        passed = " ".join(f"{other.plan}: {other.why}" for other in told.passed_over)
        notes.append(
            f"In training it runs {direction} with {len(others)} other layer{'s' if len(others) > 1 else ''} of its x: "
            f"{told.plan}, {told.cost}. {told.why} Else, {passed}"
        )
    return tuple(notes)


def reads_by_descriptor(cell: Cell, transposed: bool = False) -> bool:
    """Whether TMA reads x and W, or dy and W, as PyTorch allocates them: rows in one piece, on 16-byte boundaries."""
    rows = (cell.k, cell.k) if cell.direction == "forward" else (cell.n, cell.k)
    small = max(cell.tokens, cell.n, cell.k) < 2**31
    return not transposed and small and all(row * cell.itemsize % _LINE == 0 for row in rows)


def way_of(plan: Plan) -> str:
    """Its kind and, of a fused product, how it loads: one of ``WAYS``."""
    return f"{plan.kind} {plan.variant}" if isinstance(plan, (Fused, DxFused)) else plan.kind


def pass_plan(
    machine: Machine,
    cell: Cell,
    table: Loaded,
    name: str,
    descriptors: bool = True,
    transposed: bool = False,
    launching: Launching = PREPARED,
) -> PassPlan:
    """Of one pass; ``descriptors`` and ``launching`` as for ``candidates.in_order``."""
    row = table.row(cell)
    measured = None if row is None else of_row(machine, cell, row, launching)
    order = in_order(machine, cell, measured, descriptors, launching)
    chosen = order[0]
    told = launches(cell, chosen)
    if machine.interpreter:
        why = "fixed: in Triton's interpreter the plans come in one order, for what they show, not for their time."
        others = _others(machine, cell, order, None, descriptors, transposed, launching)
        return PassPlan(cell.direction, str(chosen), "fixed", why, None, told, passed_over=others)
    host = _host_notes(machine, cell, table, chosen, descriptors, launching)
    if row is not None and chosen == measured:
        others = _others(machine, cell, order, row, descriptors, transposed, launching)
        return _measured(machine, cell, table, name, row.of(chosen), others, (*_one_stream(row, chosen), *host))
    seconds = predicted_seconds(machine, cell, chosen)
    second = None
    if len(order) > 1:
        second = Other(str(order[1]), *_compared(machine, cell, (order[1], chosen), launching))
    return PassPlan(
        direction=cell.direction,
        plan=str(chosen),
        basis="predicted",
        why=f"predicted: {_us(seconds)} for {_tokens(cell)}, by the model of {name}; no measurement counts.",
        us=seconds * _MICRO,
        launches=told,
        runner_up=second,
        passed_over=_others(machine, cell, order, None, descriptors, transposed, launching),
        notes=(*_notes(machine, cell, table, row), *host),
    )


_LAUNCHED = {PREPARED: "by one call into C++", PYTHON: "with launches by Python"}


def _host_notes(
    machine: Machine, cell: Cell, table: Loaded, chosen: Plan, descriptors: bool, launching: Launching
) -> tuple[str, ...]:
    """What the host takes where that is more than the device, and what a captured graph does otherwise."""
    device, host = predicted_seconds(machine, cell, chosen), host_seconds(machine, cell, chosen, launching)
    notes = []
    if host > device:
        notes.append(f"The host takes longer than the device: {_us(host)} {_LAUNCHED[launching]}, by the model.")
    row = table.row(cell)
    in_graph = in_order(machine, cell, None if row is None else of_row(machine, cell, row, GRAPH), descriptors, GRAPH)
    twin = next((plan for plan in in_graph if on_one_stream(plan) == on_one_stream(chosen)), chosen)
    if twin != chosen:
        more = "with a second stream" if getattr(twin, "beside", False) else "on one stream"
        notes.append(f"In a captured graph, where launching is free, the same kernels run {more}.")
    return tuple(notes)


def _one_stream(row: Row, chosen: Plan) -> tuple[str, ...]:
    """Why a row's plan runs without its second stream; of a row that has no figures of that."""
    if row.timed or chosen == row.plan:
        return ()
    return ("It was measured with a second stream, which costs the host more than the model holds it to save here.",)


def launches(cell: Cell, plan: Plan) -> tuple[Launch, ...]:
    """What ``plan`` launches for the cell, all of backward being due; bytes by the model's formulas, fp32 adapters.

    Dropout's mask comes first where forward draws it in a launch of its own. Backward reads the words; it draws them
    once more where only the seed is kept, which is not told here.
    """
    if isinstance(plan, Apart):
        return _launches_apart(cell)
    if isinstance(plan, GROUP_KERNELS):
        found = _group_launches(cell, plan)
    elif isinstance(plan, GLUON_PLANS):
        found = _gluon_launches(cell, plan)
    elif isinstance(plan, (Ring, FewTokens, Fused, LoraFirst, BaseFirst)):
        found = _forward_launches(cell, plan)
        if cell.dropout:
            found.insert(0, ("dropout's mask, one bit an element", 4.0 * cell.tokens * row_words(cell.k)))
    else:
        found = _backward_launches(cell, plan)
    return tuple(Launch(what, round(moved)) for what, moved in found)


def _forward_launches(cell: Cell, plan: ForwardPlan) -> list[tuple[str, float]]:
    model = Model(_NO_MACHINE, cell)
    if isinstance(plan, Ring):
        return [("one pass over W, which forms h and y", model.base_bytes())]
    if isinstance(plan, FewTokens):
        first = [("one pass over W, which forms h and y", model.base_bytes())]
        if plan.splits == 1:
            return first
        return [*first, (f"the sum of the {plan.splits} parts of K", model.few_tokens_bytes(plan.splits))]
    parts = plan.shrink.splits
    hidden = ("h = x Aᵀ", SkinnyModel(_NO_MACHINE, cell.of_x).shrink_bytes(parts))
    if isinstance(plan, Fused):
        return [hidden, ("y = x Wᵀ, and s h Bᵀ as one more step of K", model.base_bytes())]
    if isinstance(plan, LoraFirst):
        begun = ("y₀ = bias + s h Bᵀ", model.expand_bytes(parts, 1))
        return [hidden, begun, ("x Wᵀ onto it, by the library", model.library_bytes(True))]
    base = ("x Wᵀ, by the library", model.library_bytes(False))
    return [base, hidden, ("bias + s h Bᵀ onto it", model.expand_bytes(parts, 2))]


def _backward_launches(cell: Cell, plan: BackwardPlan | RingGrads) -> list[tuple[str, float]]:
    if isinstance(plan, RingGrads):
        first, last = grads_bytes(cell, plan)
        return [
            ("one pass over W: dy W and dh in parts, and dB", first),
            ("dx and dA of the sums of parts", last),
        ]
    model, way = BackwardModel(_NO_MACHINE, cell), plan.hidden
    turned, of_x, of_dy = model.turned, SkinnyModel(_NO_MACHINE, cell.of_x), model.of_dy
    if way.joint:
        found = [("dh and dB in parts, in one read of dy", of_dy.dh_db_bytes(way.dh_db))]
        found.append(("the sums of their parts", of_dy.dh_db_parts(way.dh_db)))
    else:
        found = [("dh = s dy B", of_dy.shrink_bytes(way.shrink.splits))]
        if way.shrink.splits > 1:
            found.append(("the sum of dh's parts", bytes_of_h(cell, way.shrink.splits)))
    if isinstance(plan, DxFused):
        found.append(("dx = D * (dh A), and dy W onto it in one product", turned.base_bytes()))
    else:
        found += [
            ("D * (dh A)", turned.expand_bytes(1, 1)),
            ("dy W onto it, by the library", turned.library_bytes(True)),
        ]
    outers = [("dA = dhᵀ (D * x)", plan.da, of_x)]
    if not way.joint:
        outers.append(("dB = s dyᵀ h", way.db, of_dy))
    for what, config, skinny in outers:
        found.append((what, skinny.outer_bytes(config)))
        if min(config.splits, -(-cell.tokens // config.block_m)) > 1:
            found.append((f"the sum of {what[:2]}'s parts", skinny.outer_parts(config)))
    return found


def _gluon_launches(cell: Cell, plan: GluonPlan) -> list[tuple[str, float]]:
    model = HopperModel(_H100, cell)
    found = [("A and B as operands", model.pack_bytes())]
    if isinstance(plan, Hopper):
        drawn = ", and the mask's words" if cell.dropout else ""
        found.append((f"h = s x Aᵀ{drawn}", model.shrink_bytes()))
        return [*found, ("y = x Wᵀ, and h Bᵀ as more steps of K", model.product_bytes(plan.product))]
    if isinstance(plan, HopperInside):
        return [*found, ("y = x Wᵀ and h in one pass, and h Bᵀ as more steps of K", model.product_bytes(plan.product))]
    dx = ("dx = dy W, and D * (dh A) as more steps of its sum", model.product_bytes(plan.dx))
    if isinstance(plan, DxHopper):
        found.append(("dh and dB in parts, in one read of dy", model.dh_db_bytes(plan.dh_db)))
        found += [("the sum of dh's parts", model.dh_parts(plan.dh_db)), dx]
    else:
        found += [dx, ("dB = dyᵀ h, in parts", model.outer_bytes(plan.db, cell.n))]
    found.append(("dA = dhᵀ (D * x), in parts", model.outer_bytes(plan.da, cell.k)))
    return [*found, ("the sums of dA's and dB's parts", model.sum_of_grads_bytes(plan))]


def _group_launches(cell: Cell, plan: HopperGroup | DxHopperGroup) -> list[tuple[str, float]]:
    model = HopperGroupModel(_H100, cell)
    found = [("every A and B as operands", model.pack_bytes())]
    if isinstance(plan, HopperGroup):
        drawn = ", and the masks' words" if cell.dropout else ""
        found.append((f"every h = s x Aᵀ in one read of x{drawn}", model.shrink_bytes()))
        return [*found, ("every y = x Wᵀ, and h Bᵀ as more steps of K", model.product_bytes())]
    return [
        *found,
        ("every dh and dB in parts, in one read of each dy", model.dh_db_bytes(plan.dh_db)),
        ("the sums of dh's parts", model.dh_parts(plan.dh_db)),
        ("one dx = Σ dy W, and D * (dh A) as more steps of its sum", model.product_bytes()),
        ("every dA = dhᵀ (D * x) in one read of x, in parts", model.da_bytes(plan.da)),
        ("the sums of dA's and dB's parts", model.sum_of_grads_bytes(plan)),
    ]


def _launches_apart(cell: Cell) -> tuple[Launch, ...]:
    """Each member's, by the plan that should take it least on an H100; in backward the sums of their dx."""
    found = []
    for member in cell.members:
        of = f", of {member.k}->{member.n}"
        found += [replace(launch, what=launch.what + of) for launch in launches(member, candidates(_H100, member)[0])]
    if cell.direction == "backward":
        found.append(Launch("dx is their sum", 3 * cell.tokens * cell.k * cell.itemsize, len(cell.others)))
    return tuple(found)


def _measured(
    machine: Machine,
    cell: Cell,
    table: Loaded,
    name: str,
    row: Row,
    others: tuple[Other, ...],
    notes: tuple[str, ...],
) -> PassPlan:
    own = row.cell == cell
    with_ = ", ".join(f"{name} {row.versions[name]}" for name in ("torch", "triton", "lora_kernels"))
    device = name if table.device is None else table.device.name
    where = "" if own else f"for {_tokens(row.cell)}, the nearest size that was; "
    kinds = {kind: ratio for kind, ratio in row.kinds.items() if kind != row.plan.kind}
    second = _by_kind(min(kinds, key=kinds.__getitem__), row) if kinds else None
    return PassPlan(
        direction=cell.direction,
        plan=str(row.plan),
        basis="measured" if own else "neighbour",
        why=f"measured: {where}{row.us:.4g} µs, {row.ratio:.4g} of the frozen layer's time, on {device}, "
        f"{row.date[:10]} ({with_}).",
        us=row.us if own else predicted_seconds(machine, cell, row.plan) * _MICRO,
        launches=launches(cell, row.plan),
        runner_up=second,
        passed_over=others,
        notes=notes,
    )


def _by_kind(kind: str, row: Row) -> Other:
    """What the row tells of another kind of plan. See ``tuning.search``: the quickest of many is timed once more."""
    slower = row.kinds[kind] / row.ratio - 1.0
    again = ", but not when it was timed again beside the plan" if slower < 0 else ""
    told = f"{row.kinds[kind]:.4g} of the frozen layer's time, {by_how_much(slower)}{again}"
    return Other(kind, f"measured at {told}.", slower)


def _others(
    machine: Machine,
    cell: Cell,
    order: Sequence[Plan],
    row: Row | None,
    descriptors: bool,
    transposed: bool,
    launching: Launching,
) -> tuple[Other, ...]:
    """The best of each other way, and by how much it is slower; or why there is none of it."""
    own = way_of(order[0])
    best: dict[str, Plan] = {}
    for plan in order:
        best.setdefault(way_of(plan), plan)
    found = []
    for way in (_OF_GROUPS if cell.others else WAYS)[cell.direction]:
        kind = way.partition(" ")[0]
        if way == own:
            continue
        if way not in best:
            found.append(Other(way, obstacle(machine, cell, way, descriptors, transposed)))
        elif machine.interpreter:
            found.append(Other(way, "it comes later in that order."))
        elif isinstance(best[way], UNMEASURED) and not (row is not None and kind in row.kinds):
            found.append(Other(way, "no GPU has measured it yet: it runs where `lora-kernels tune` finds it ahead."))
        elif row is not None and kind != row.plan.kind and kind in row.kinds:
            found.append(_by_kind(kind, row))  # of all its variants
        else:
            found.append(_predicted(machine, cell, way, (best[way], order[0]), row is not None, launching))
    return tuple(dict.fromkeys(found))


def _predicted(
    machine: Machine, cell: Cell, way: str, both: tuple[Plan, Plan], unmeasured: bool, launching: Launching
) -> Other:
    """Of ``both``, a plan and the chosen one, how much more the first costs."""
    told, slower = _compared(machine, cell, both, launching)
    return Other(way, f"not measured by itself; {told}" if unmeasured else told, slower)


def _compared(machine: Machine, cell: Cell, both: tuple[Plan, Plan], launching: Launching) -> tuple[str, float]:
    """The sentence, and the part of the second's cost; with the host's part, where the device alone says otherwise."""
    device = predicted_seconds(machine, cell, both[0])
    costs = [cost_of(machine, cell, plan, launching) for plan in both]
    slower = costs[0] / costs[1] - 1.0
    if all(cost == predicted_seconds(machine, cell, plan) for cost, plan in zip(costs, both, strict=True)):
        return f"{_us(device)} predicted, {by_how_much(slower)}.", slower
    host = f"{_us(costs[0])} with the host's part"
    return f"{_us(device)} predicted, and {host}, {by_how_much(slower)}.", slower


def obstacle(machine: Machine, cell: Cell, way: str, descriptors: bool = True, transposed: bool = False) -> str:
    """Why the machine has no plan of this way for the cell, in a sentence."""
    if way in _OF_GROUPS[cell.direction]:
        fault = static_fault(machine, getattr(torch, cell.dtype), cell.k, cell.sizes, cell.dropout)
        return f"The group kernels do not run: {fault or tokens_fault(cell) or 'TMA cannot read x, dy or W'}."
    if way in ("ring", "ring_grads"):
        if fault := ring_fault(machine, cell):
            return fault
        if transposed or not descriptors:
            return "it loads pieces of 16 bytes along rows: x, dy or W is not stored so."
    elif way == "few_tokens":
        if cell.tokens > FEW_TOKENS:
            return f"it serves up to {FEW_TOKENS} tokens."
        if cell.r > FEW_TOKENS_RANK:
            return f"it serves ranks up to {FEW_TOKENS_RANK}: every program would read all of A."
    elif way in _GLUON[cell.direction]:
        return _gluon_obstacle(machine, cell, way, transposed)
    elif not way.endswith("pointer"):
        return _variant_obstacle(machine, cell, descriptors, transposed)
    return _no_room(machine)


def _gluon_obstacle(machine: Machine, cell: Cell, way: str, transposed: bool) -> str:
    if fault := gluon_fault(machine, cell):
        return fault
    if transposed:
        return _TRANSPOSED
    if way.endswith("inside"):
        if cell.dropout:
            return "it draws no mask, and there is dropout."
        if cell.dtype == "float16":
            return "it is for bfloat16, and this is float16."
        return "it needs two tiles of columns of the result, and 256 terms of the sum."
    if cell.dropout and cell.direction == "backward":
        return "its mask needs a longer sum than N."
    return f"it loads by TMA, whose rows are multiples of {_LINE} bytes: x or W is not aligned so."


def _variant_obstacle(machine: Machine, cell: Cell, descriptors: bool, transposed: bool) -> str:
    capability = f"{machine.capability // 10}.{machine.capability % 10}"
    if not machine.interpreter:
        if machine.capability < 90:
            return f"it loads by TMA, which came with compute capability 9.0; this is {capability}."
        if cell.itemsize != 2:
            return f"it is for 16-bit dtypes, and this is {cell.dtype}."
        if machine.capability >= 100 and cell.dtype == "float16":
            return f"over float16 it overflows the tensor memory of capability {capability}."
    if transposed:
        return _TRANSPOSED
    if not descriptors:
        sizes = f"K = {cell.k}" if cell.direction == "forward" else f"K = {cell.k} or N = {cell.n}"
        return f"it loads by TMA, whose rows are multiples of {_LINE} bytes: {sizes} of {cell.itemsize} bytes is not."
    return _no_room(machine)


def _no_room(machine: Machine) -> str:
    return f"no tile of it fits the {machine.shared_memory} bytes of shared memory."


def _notes(machine: Machine, cell: Cell, table: Loaded, row: Row | None) -> tuple[str, ...]:
    """Why what was measured does not decide."""
    notes = [sentence for source in table.sources for sentence in source.passed_over]
    if row is not None:
        reason = "loads by TMA" if fits(machine, cell, row.plan) else "does not fit this machine or so many tokens"
        notes.append(f"The measured plan of {_tokens(row.cell)} ({row.plan}) {reason}, so the model decides.")
    return tuple(notes)


def _tokens(cell: Cell) -> str:
    return f"up to {cell.tokens} tokens" if cell.tokens > 1 else "1 token"


def _us(seconds: float) -> str:
    return f"{seconds * _MICRO:.4g} µs"


# Bytes do not depend on the machine, but those of the parts that the Gluon kernels make for its multiprocessors.
_NO_MACHINE = Machine(capability=0, sm_count=1, shared_memory=0)
_H100 = Machine(capability=90, sm_count=132, shared_memory=232448)
