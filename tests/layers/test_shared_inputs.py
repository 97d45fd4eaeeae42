"""Layers that read one x: what runs in common, and that nothing else of the model notices."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import architectures
import lora_kernels
from common_passes import passes, waiting
from lora_kernels import FusedLoRAGroup, FusedLoRALinear, LoRAConfig, replace_linear, unshare_inputs
from lora_kernels import shared_input as module
from made_models import acting
from numerics import check, check_all, same_bits

K, SIZES = 24, {"q": (16, 4), "k": (8, 4), "v": (8, 3)}


def group(**arguments: Any) -> FusedLoRAGroup:
    """Three layers of one x, whose adapters act."""
    dtype = arguments.pop("dtype", torch.float32)
    return FusedLoRAGroup({name: acting(K, n, r=r, dtype=dtype, **arguments) for name, (n, r) in SIZES.items()})


def apart(together: FusedLoRAGroup) -> FusedLoRAGroup:
    """A copy whose layers run by themselves."""
    single = copy.deepcopy(together)
    assert unshare_inputs(single) == 1
    return single


def draw(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    x = torch.randn(*(shape or (5, 7)), K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor, seed: int = 2) -> dict[str, Tensor]:
    """Each y, dx and each parameter's gradient; the dys are random and always the same."""
    torch.manual_seed(seed)
    ys = model(x)
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in ys]
    named = {"dx": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.autograd.backward(ys, dys)
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    for tensor in named.values():
        tensor.grad = None
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | gradients


def assert_right(y: Tensor, layer: FusedLoRALinear, x: Tensor) -> None:
    """y passes the policy as the layer's output, a layer of its own being the yardstick."""
    single = copy.deepcopy(layer)
    exact = partial(copy.deepcopy(layer).double(), x.detach().double())
    check("y", y.detach(), exact, single(x).detach(), x.dtype)


# Values


@pytest.mark.parametrize("names", [[1], ["q"], [None]], ids=str)
def test_a_group_that_is_no_list_of_names_is_told(names: Any) -> None:
    with pytest.raises(lora_kernels.LoRAKernelsError, match="given to share_inputs as a group: each must be a list"):
        lora_kernels.share_inputs(apart(group()), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": False, "use_rslora": True}, {"activation": "gelu"}],
    ids=str,
)
def test_a_group_is_as_exact_as_its_layers(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    together = group(**arguments, dtype=dtype)
    single, x = apart(together), draw(dtype)
    exact = partial(results, copy.deepcopy(single).double(), draw(dtype).detach().double().requires_grad_())
    with passes() as counted:
        actual = results(together, x)
    assert counted == [3]
    check_all(actual, exact, results(single, x), dtype)
    assert not waiting(together)


def test_with_dropout_each_layer_has_a_mask_of_its_own_and_draws_as_it_would_alone() -> None:
    """With W = 0 and A = B = 1 an output is the number of kept elements: the layers' differ, and are those of alone."""
    together = group(lora_dropout=0.5, bias=False)
    for layer in together.children():
        layer.weight.data.zero_(), layer.lora_A.data.fill_(1.0), layer.lora_B.data.fill_(1.0)
        layer.scaling = 1.0
    x = torch.ones(40, K)
    torch.manual_seed(1)
    kept = [y[:, 0] for y in together(x)]
    torch.manual_seed(1)
    alone = [y[:, 0] for y in apart(together)(x)]
    assert not torch.equal(kept[1], kept[0])
    assert all(torch.equal(left, right) for left, right in zip(kept, alone, strict=True))


def test_with_dropout_the_gradients_are_those_of_alone() -> None:
    together = group(lora_dropout=0.3)
    single, x = apart(together), draw()
    exact = copy.deepcopy(single).double()
    with lora_kernels.use_backend("eager"):  # its mask is the same in every dtype
        given = partial(results, exact, x.detach().double().requires_grad_())
        check_all(results(together, x), given, results(single, x), torch.float32)


def test_dora_with_dropout_runs_alone() -> None:
    together = group(use_dora=True, lora_dropout=0.3)
    with passes() as counted:
        together(draw())
    assert not counted


# When a layer runs by itself


def written_to(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    with torch.no_grad():
        return x.add_(1.0)


def new_values(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    with torch.no_grad():
        model.v.lora_B.mul_(2.0)
    return x


def scaled(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.scaling = 0.25
    return x


def merged(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.merge()
    return x


def switched_off(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.enable_lora(False)
    return x


def evaluating(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.eval()
    return x


def with_another_weight(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.lora_A = nn.Parameter(torch.ones_like(model.v.lora_A))
    return x


def with_an_activation(x: Tensor, model: FusedLoRAGroup) -> Tensor:
    model.v.activation = "relu"
    return x


CHANGES = [written_to, new_values, scaled, merged, switched_off, evaluating, with_another_weight, with_an_activation]


@pytest.mark.parametrize("change", CHANGES)
def test_what_waits_is_not_taken_after_a_change(change: Callable[[Tensor, FusedLoRAGroup], Tensor]) -> None:
    together = group()
    with torch.no_grad():
        x = draw().detach()
    together.q(x)
    x = change(x, together)
    y = together.v(x)
    assert same_bits(y, apart(together).v(x))


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "weight", "bias", "x"])
def test_what_begins_to_train_between_the_calls_has_its_gradient(name: str) -> None:
    together, x = group(), draw().detach()
    begins: Tensor = x if name == "x" else getattr(together.v, name).requires_grad_(False)
    together.q(x)
    begins.requires_grad_()
    together.v(x).sum().backward()
    given, begins.grad = begins.grad, None
    single = apart(together)
    single.v(x).sum().backward()
    alone = x.grad if name == "x" else getattr(single.v, name).grad
    assert given is not None
    assert alone is not None
    assert same_bits(given, alone)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2.0


def test_what_waits_is_not_taken_after_a_change_of_a_parametrization() -> None:
    together, x = group(), draw()
    parametrize.register_parametrization(together.v, "lora_A", Doubled())
    with torch.no_grad():
        together.q(x)
        together.v.parametrizations.lora_A.original.mul_(3.0)
        assert same_bits(together.v(x), apart(together).v(x))


def test_under_autocast_or_another_backend_or_without_gradients_what_waits_is_not_taken() -> None:
    together, x = group(), draw()
    together.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert together.k(x).dtype == torch.bfloat16
    together.q(x)
    with lora_kernels.use_backend("eager"):
        y = together.k(x)
    with lora_kernels.use_backend("eager"):
        assert same_bits(y, apart(together).k(x))
    together.q(x)
    with torch.no_grad():
        assert not together.k(x).requires_grad


@pytest.mark.parametrize("how", ["evaluation", "merged", "off", "inference"])
def test_only_layers_that_train_run_in_common(how: str) -> None:
    together, x = group(), draw()
    with passes() as counted, torch.inference_mode(how == "inference"):
        if how == "evaluation":
            together.eval()
        for layer in together.children() if how in ("merged", "off") else ():
            layer.merge() if how == "merged" else layer.enable_lora(False)
        together(x + 0.0)
    assert not counted


def test_those_that_can_run_in_common_do() -> None:
    together, x = group(), draw()
    together.k.merge()
    with passes() as counted:
        ys = together(x)
    assert counted == [2]
    assert same_bits(ys[1], apart(together).k(x))


def test_on_a_cpu_a_small_x_is_for_each_layer_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROM_ON_CPUS", 8 * 32)
    group = FusedLoRAGroup([acting(8, 4), acting(8, 6)])
    for tokens, expected in ((31, []), (32, [2])):
        with passes() as counted:
            group(torch.randn(tokens, 8))
        assert counted == expected
    assert "with an x of at least 256 numbers" in str(lora_kernels.explain(group.get_submodule("0"), 32))


def test_a_layer_called_twice_computes_twice_and_all_is_right() -> None:
    together, x = group(), draw()
    for layer in (together.k, together.k, together.q, together.v, together.v):
        assert_right(layer(x), layer, x)


def test_another_tensor_begins_a_pass_of_its_own() -> None:
    together, x = group(), draw()
    together.q(x)
    other = x.detach() + 1.0
    with passes() as counted:
        for layer in (together.v, together.k, together.q):
            assert_right(layer(other), layer, other)
    assert counted == [3]


def test_outputs_that_nobody_takes_are_told_once() -> None:
    together = group()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(9):
            together.q(draw())
    assert [str(warning.message) for warning in told if "unshare_inputs" in str(warning.message)] != []
    assert len(told) == 1
    assert len(waiting(together)) == 1


class Attention(nn.Module):
    """It looks like self-attention, and q and k read something else than v where positions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, 8) for _ in range(3))

    def forward(self, x: Tensor, positions: Any = 0.0) -> tuple[Tensor, ...]:
        moved = x if isinstance(positions, float) else x + positions
        return self.q_proj(moved), self.k_proj(moved), self.v_proj(x)


def guessed() -> tuple[Any, Any]:
    torch.manual_seed(4)
    model = Attention()
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert report.groups == (("q_proj", "k_proj", "v_proj"),)
    return model, report


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("copied", [False, True])
def test_a_wrong_guess_ends_at_its_first_step(copied: bool, no_warnings: None) -> None:
    model, report = guessed()
    single = copy.deepcopy(model)
    unshare_inputs(single)
    ran = copy.deepcopy(model) if copied else model
    positions = torch.ones(K)
    with passes() as counted:
        for _ in range(6):
            x = draw()
            ys = ran(x, positions)
            assert all(same_bits(y, alone) for y, alone in zip(ys, single(x, positions), strict=True))
            sum(y.sum() for y in ys).backward()
    assert counted == [3]
    assert not any(module.is_shared(layer) for layer in ran.children())
    assert not module.shared_inputs(ran)
    assert unshare_inputs(ran) == 0
    assert ("of which none runs together now" in str(report)) != copied


def test_a_right_guess_outlives_a_step_that_was_cut_short(no_warnings: None) -> None:
    model, _ = guessed()
    with passes() as counted:
        for x in (draw(), draw(), draw()):
            model(x)
            model.q_proj(draw())  # as where an error comes in between
            model(x)
    assert counted == [3] * 9
    assert unshare_inputs(model) == 1


def test_a_guess_that_goes_wrong_later_ends_too(no_warnings: None) -> None:
    model, _ = guessed()
    model(draw())
    with passes() as counted:
        for _ in range(6):
            model(draw(), torch.ones(K))
    assert counted == [3, 3, 3]
    assert unshare_inputs(model) == 0


def test_a_group_that_was_named_is_warned_of_and_stays() -> None:
    model, _ = guessed()
    unshare_inputs(model)
    lora_kernels.share_inputs(model, [["q_proj", "k_proj", "v_proj"]])
    model(draw(), torch.ones(K))
    with pytest.warns(UserWarning, match="unshare_inputs"):
        model(draw(), torch.ones(K))
    assert unshare_inputs(model) == 1


def test_a_fused_group_within_a_model_is_named() -> None:
    model = nn.Sequential(FusedLoRAGroup([nn.Linear(K, 8), nn.Linear(K, 4)]))
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    layer = model[0].get_submodule("0")
    for _ in range(3):
        layer(draw())
    with pytest.warns(UserWarning, match="unshare_inputs"):
        layer(draw())
    assert unshare_inputs(model) == 1


def test_hooks_run_and_what_acts_before_a_call_keeps_the_layer_alone() -> None:
    together, x, seen = group(), draw(), []
    together.v.register_forward_hook(lambda layer, args, y: y + 100.0)
    hook = together.k.register_forward_pre_hook(lambda layer, args: seen.append(layer))
    with passes() as counted:
        ys = together(x)
        hook.remove()
        together(x)
    assert counted == [2, 3]
    assert seen == [together.k]
    assert ys[2].min() > 50.0


def _one_by_one(ys: tuple[Tensor, ...], due: list[Any], **arguments: Any) -> list[Any]:
    return [g for y in ys for g in torch.autograd.grad(y.square().sum(), due, allow_unused=True, **arguments)]


def test_outputs_go_backward_one_by_one_as_those_of_layers_alone() -> None:
    together, x = group(dtype=torch.float64), draw(torch.float64)
    single = apart(together)
    of = [[x, *(p for p in model.parameters() if p.requires_grad)] for model in (together, single)]
    for arguments in ({}, {"create_graph": True, "retain_graph": False}):
        found, alone = (_one_by_one(m(x), due, **arguments) for m, due in zip((together, single), of, strict=True))
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)
    ys = together(x)
    for y in ys[:2]:
        torch.autograd.grad(y, of[0], torch.stack([y, y]), is_grads_batched=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="second time"):  # as of any graph
        torch.autograd.grad(ys[0].sum(), x)


@pytest.mark.parametrize("name", ["x", "A"])
def test_what_is_written_to_between_two_backwards_is_told(name: str) -> None:
    together, leaf = group(), draw()
    x = leaf * 1.0
    ys = together(x)
    ys[0].sum().backward(retain_graph=True)
    with torch.no_grad():
        (x if name == "x" else together.k.lora_A).mul_(2.0)
    with pytest.raises(lora_kernels.LoRAKernelsError, match="between the backward passes of two outputs"):
        ys[1].sum().backward()


# The model around


def test_a_copy_runs_in_common_a_layer_alone_is_alone_and_nothing_is_held() -> None:
    together, x = group(), draw()
    for copied in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert {id(part) for part in copied.modules()}.isdisjoint({id(part) for part in together.modules()})
        with passes() as counted:
            assert all(same_bits(left, right) for left, right in zip(copied(x), together(x), strict=True))
        assert counted == [3, 3]
    layer = copy.deepcopy(together.q)
    assert "_shared" not in vars(layer)
    gone = weakref.ref(together.q)
    gc.disable()
    try:
        del together, counted, copied
        assert gone() is None
    finally:
        gc.enable()


def test_threads_draw_no_mask_twice() -> None:
    """With W = 0 and A = B = 1 an output is the number of kept elements of its row."""
    together = group(lora_dropout=0.5, bias=False)
    for layer in together.children():
        layer.weight.data.zero_(), layer.lora_A.data.fill_(1.0), layer.lora_B.data.fill_(1.0)
    x, ways = torch.ones(40, K), []
    other = acting(K, 4, lora_dropout=0.5)

    def work() -> None:
        for _ in range(40):
            ways.extend(tuple((y[:, 0] / y[:, 0].max()).tolist()) for y in together(x))
            other(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ways)) == len(ways)


def test_threads_do_not_mix() -> None:
    together = group()
    xs = [torch.randn(9, K) for _ in range(4)]
    alone = [together(x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        rounds = (zip(together(xs[i]), alone[i], strict=True) for _ in range(30))
        wrong.extend(i for pairs in rounds if not all(same_bits(y, given) for y, given in pairs))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not waiting(together)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    together, x = group(lora_dropout=0.3), draw()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.group = together

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.group, x, use_reentrant=reentrant)

    plain = {f"group.{name}" if "." in name else name: value for name, value in results(together, x).items()}
    again = results(Checkpointed(), x)
    assert all(same_bits(again[name], value) for name, value in plain.items())
    assert not waiting(together)


def test_saving_and_restoring_see_plain_layers(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    model = architectures.llama()
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert report.groups[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert "4 groups of layers with one input: model.layers.0.self_attn.q_proj + " in report.details()
    lora_kernels.save_adapter(model, tmp_path)
    other = architectures.llama()
    lora_kernels.load_adapter(other, tmp_path)
    assert sum(len(module.shared_inputs(holder)) for holder in other.modules()) == 4
    lora_kernels.restore_linear(model)
    assert not any("_shared_inputs" in vars(holder) for holder in model.modules())


# Under a compiler


def test_a_llama_compiles_in_one_graph_and_once() -> None:
    model = architectures.llama()
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        loss = compiled(input_ids=architectures.TOKENS, labels=architectures.TOKENS).loss
    assert counter.frame_count == 1
    assert not waiting(model)
    unshare_inputs(model)  # a compiler has found layers run by themselves
    assert torch.equal(loss, model(input_ids=architectures.TOKENS, labels=architectures.TOKENS).loss)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_group_compiles_in_one_graph_and_runs_in_common(checkpointed: bool) -> None:
    together, x = group(), draw()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def step(x: Tensor) -> Any:
        return checkpoint(together, x, use_reentrant=False) if checkpointed else together(x)

    ys = torch.compile(step, backend=counter, fullgraph=True)(x)
    assert counter.frame_count == 1
    assert all(same_bits(y, given) for y, given in zip(ys, together(x), strict=True))
    assert all(y.grad_fn is ys[0].grad_fn for y in ys)


class _Plus100(FusedLoRALinear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 100.0


def _by_hook(layer: Any) -> Any:
    return layer.register_forward_hook(lambda layer, args, y: y + 100.0)


def _by_hook_on_all(layer: Any) -> Any:
    return torch_module.register_module_forward_hook(lambda of, args, y: y + 100.0 if of is layer else None)


def _by_instance(layer: Any) -> Any:
    layer.forward = lambda x: FusedLoRALinear.forward(layer, x) + 100.0


def _by_class(layer: Any) -> Any:
    layer.__class__ = _Plus100


@pytest.mark.parametrize("change", [_by_hook, _by_hook_on_all, _by_instance, _by_class])
def test_a_member_whose_call_does_more_compiles_with_that(change: Callable[[Any], Any]) -> None:
    together, x = group(), draw()
    handle = change(together.v)
    try:
        assert module.why_called(together.v)
        if change in (_by_hook, _by_class):  # the others would take as long again
            ys = torch.compile(lambda x: together(x), backend="eager", fullgraph=True)(x)
            assert ys[2].min() > 50.0
    finally:
        if handle is not None:
            handle.remove()
