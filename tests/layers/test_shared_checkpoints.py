"""Common passes and the borders of checkpoints: each layer draws and saves as it would alone, wherever a border is.

A program is a list of layers' names, "noise" (a random number is drawn) and regions: pairs of a kind and a program.
Models are float64, where the same model with its layers unshared is as exact as can be, and has the same masks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import lora_kernels
from common_passes import passes, waiting
from lora_kernels import LoRAConfig, replace_linear, share_inputs, unshare_inputs
from made_models import acting
from numerics import check_all

K, NAMES = 8, ("q", "k", "v")
Program = list[Any]
Run = Callable[[Tensor], tuple[Tensor, ...]]


class Holder(nn.Module):
    """q, k and v of one x, called as ``program`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 6), nn.Linear(K, 4, bias=False), nn.Linear(K, 6)
        self.program: Program = list(NAMES)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return run(self, self.program, x)


def run(holder: nn.Module, program: Program, x: Tensor) -> tuple[Tensor, ...]:
    ys: list[Tensor] = []
    for step in program:
        if step == "noise":
            torch.rand(3)
        elif isinstance(step, str):
            ys.append(getattr(holder, step)(x))
        else:
            ys += REGIONS[step[0]](partial(run, holder, step[1]), x)
    return tuple(ys)


def closing_over(function: Run, x: Tensor) -> tuple[Tensor, ...]:
    """A reentrant region that was not given x: there x is the same tensor in both runs."""
    trigger = torch.zeros(1, dtype=x.dtype, requires_grad=True)
    return checkpoint(lambda _: tuple(y + 0.0 for y in function(x)), trigger, use_reentrant=True)


def to_the_end(function: Run, x: Tensor) -> tuple[Tensor, ...]:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, x, use_reentrant=False)


def offloaded(function: Run, x: Tensor) -> tuple[Tensor, ...]:
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def selective(function: Run, x: Tensor) -> tuple[Tensor, ...]:
    def policy(*arguments: Any, **keywords: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if arguments[1] in (torch.ops.aten.mm.default,) else PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


PREFER_RECOMPUTE = CheckpointPolicy.PREFER_RECOMPUTE
REGIONS: dict[str, Callable[[Run, Tensor], tuple[Tensor, ...]]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "closing over x": closing_over,
    "to the end": to_the_end,
    "selective": selective,
    "offloaded": offloaded,
}
CHECKPOINTS = [kind for kind in REGIONS if kind != "offloaded"]


def own(p: float, **arguments: Any) -> nn.Module:
    """A holder whose layers are ours and run in common."""
    torch.manual_seed(0)
    model = Holder().double()
    config = LoRAConfig(r=2, lora_dropout=p, target_modules=list(NAMES), init_lora_weights=False, **arguments)
    replace_linear(model, config)
    share_inputs(model, [NAMES])
    return model.train()


def pefts(p: float) -> nn.Module:
    """The same of PEFT's layers, fused."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_dropout=p, target_modules=list(NAMES), init_lora_weights=False)
    model = peft.get_peft_model(Holder().double(), config, autocast_adapter_dtype=False)
    lora_kernels.fuse_peft(model)
    share_inputs(model, [NAMES])
    return model.base_model.model.train()


MAKES = {"own": own, "peft": pefts}


def results(model: Any, program: Program, tokens: int = 20, steps: int = 1) -> dict[str, Tensor]:
    """Each y, dx and every gradient of ``steps`` steps, added up."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator, dtype=torch.float64).requires_grad_()
    model.program = program
    torch.manual_seed(2)
    for _ in range(steps):
        ys = model(x)
        dys = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in ys]
        torch.autograd.backward(ys, dys)
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {name: p.grad for name, p in named.items()}
    found |= {"dx": x.grad, "next random number": torch.rand(1, dtype=torch.float64)}
    model.zero_grad()
    return found


def assert_as_alone(model: nn.Module, program: Program, **arguments: Any) -> None:
    """The eager backend has the same masks whatever the dtype, and float64 for all."""
    alone = copy.deepcopy(model)
    assert unshare_inputs(alone) == 1
    with lora_kernels.use_backend("eager"):
        given, actual = results(alone, program, **arguments), results(model, program, **arguments)
    assert actual.keys() == given.keys()
    check_all(actual, given, given, torch.float64)


# Each kind of region


def borders(kind: str) -> dict[str, Program]:
    q, k, v = NAMES
    return {
        "each in its own": [(kind, [q]), (kind, [k]), (kind, [v])],
        "the first alone": [(kind, [q]), k, v],
        "the last alone": [q, k, (kind, [v])],
        "the middle": [q, (kind, [k]), v],
        "backwards": [v, (kind, [k, q])],
        "twice": [(kind, [q, k]), (kind, [k, v])],
        "with noise": [(kind, [q, "noise", k]), "noise", v],
        "nested": [(kind, [q, (kind, [k]), v])],
    }


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", REGIONS)
@pytest.mark.parametrize("make", MAKES)
def test_a_region_that_holds_some_layers_changes_nothing(make: str, kind: str, p: float) -> None:
    model = MAKES[make](p)
    for program in borders(kind).values():
        assert_as_alone(model, program)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("make", MAKES)
def test_a_region_that_holds_all_layers_runs_them_in_common(make: str, kind: str, p: float) -> None:
    """In both runs."""
    model = MAKES[make](p)
    with passes() as counted:
        results(model, [(kind, list(NAMES))])
    assert counted == [3, 3]
    assert not waiting(model)
    assert_as_alone(model, [(kind, list(NAMES))])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_a_region_they_run_in_common_and_draw_as_alone(p: float) -> None:
    model = own(p)
    with passes() as counted:
        results(model, list(NAMES))
    assert counted == [3]
    for program in (list(NAMES), ["v", "q", "k"], ["q", "noise", "k", "v"], ["q", "q", "v"], ["k"]):
        assert_as_alone(model, program)


# Any assignment


def a_program(draw: random.Random, names: list[str], depth: int = 0) -> Program:
    """``names`` in this order, some of them in regions, which may hold regions."""
    program: Program = []
    while names:
        count = draw.randint(1, len(names))
        taken, names = names[:count], names[count:]
        if depth < 3 and draw.random() < 0.6:
            program.append((draw.choice(list(REGIONS)), a_program(draw, taken, depth + 1)))
        else:
            program += taken
        program += ["noise"] if draw.random() < 0.15 else []
    return program


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("make", MAKES)
def test_any_assignment_of_layers_to_regions_is_as_alone(make: str, part: int) -> None:
    models = [MAKES[make](0.0), MAKES[make](0.3)]
    for number in range(part, 120, 4):
        draw = random.Random(number)
        names = list(NAMES) if draw.random() < 0.5 else [draw.choice(NAMES) for _ in range(draw.randint(1, 5))]
        program = a_program(draw, names)
        try:
            assert_as_alone(models[number % 4 > 1], program, tokens=draw.choice([5, 20]), steps=draw.randint(1, 2))
        except Exception as error:
            raise AssertionError(f"{number}: {program}") from error


def test_layers_of_other_probabilities_draw_in_their_places() -> None:
    model = own(0.3)
    for p in (0.0, 0.5):
        model.k.lora_dropout = p
        with passes() as counted:
            results(model, list(NAMES))
        assert counted == [2]
        for program in (list(NAMES), [("reentrant", list(NAMES))], [("not reentrant", ["q", "k"]), "v"]):
            assert_as_alone(model, program)


# What else stands around a call


def test_checkpoint_wrappers_around_each_layer() -> None:
    for kind in CheckpointImpl:
        model = own(0.3)
        single = copy.deepcopy(model)
        unshare_inputs(single)
        for each in (model, single):
            for name in NAMES:
                setattr(each, name, checkpoint_wrapper(getattr(each, name), checkpoint_impl=kind))
        with lora_kernels.use_backend("eager"):
            given = results(single, list(NAMES))
            check_all(results(model, list(NAMES)), given, given, torch.float64)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_compiled_layer_beside_others(kind: str) -> None:
    model = own(0.0)
    model.k.compile(backend="eager", fullgraph=True)
    alone = own(0.0)
    unshare_inputs(alone)
    given = results(alone, [(kind, ["q", "k"]), (kind, ["v"])])
    check_all(results(model, [(kind, ["q", "k"]), (kind, ["v"])]), given, given, torch.float64)


def test_a_backward_between_two_calls_leaves_the_second_its_own_graph() -> None:
    model = own(0.3)
    alone = copy.deepcopy(model)
    unshare_inputs(alone)
    found = []
    for each in (alone, model):
        torch.manual_seed(3)
        x = torch.ones(20, K, dtype=torch.float64, requires_grad=True)
        for name in NAMES:
            getattr(each, name)(x).sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None} | {"dx": x.grad})
    check_all(found[1], found[0], found[0], torch.float64)


def seeded() -> AbstractContextManager[Any]:
    torch.manual_seed(7)
    return nullcontext()


@pytest.mark.parametrize("around", [seeded, torch.random.fork_rng])
def test_a_seed_that_is_set_before_a_call_governs_it(around: Callable[[], AbstractContextManager[Any]]) -> None:
    model = own(0.5)
    alone = copy.deepcopy(model)
    unshare_inputs(alone)
    ys = []
    for each in (alone, model):
        torch.manual_seed(3)
        x = torch.ones(20, K, dtype=torch.float64)
        with lora_kernels.use_backend("eager"):
            each.q(x)
            with around():
                ys.append({"k": each.k(x).detach(), "v": each.v(x).detach(), "rest": torch.rand(2).double()})
    check_all(ys[1], ys[0], ys[0], torch.float64)


def test_an_output_of_inference_mode_is_not_taken_outside_of_it() -> None:
    model, x = own(0.0), torch.ones(20, K, dtype=torch.float64)
    with torch.inference_mode():
        model.q(x)
    with torch.no_grad():
        assert not model.k(x).is_inference()


def test_layers_in_checkpoints_of_their_own_are_told_once() -> None:
    model = own(0.0)
    with pytest.warns(UserWarning, match=r"in different checkpoints.*unshare_inputs") as told:
        results(model, [("not reentrant", [name]) for name in NAMES], steps=3)
    assert len(told) == 1


def test_two_threads_with_dropout_get_on() -> None:
    layer = acting(K, 4, lora_dropout=0.5)
    together = lora_kernels.FusedLoRAGroup([layer, acting(K, 4, lora_dropout=0.5)])
    assert all(torch.isfinite(y).all() for _ in range(3) for y in together(torch.ones(20, K)))
