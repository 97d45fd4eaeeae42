"""Layers that read one x: which are found, what runs in common, and that nothing else of the model notices."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import architectures
import lora_kernels
from lora_kernels import FusedLoRAGroup, FusedLoRALinear, LoRAConfig, replace_linear, share_inputs, unshare_inputs
from lora_kernels import shared_input as module
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from models import acting, layer_state, refused
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
    check("y", y.detach(), copy.deepcopy(layer).double()(x.detach().double()).detach(), single(x).detach(), x.dtype)


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many branches each common pass had."""
    counted: list[int] = []
    run = module.apply_branches

    def counting(x: Tensor, branches: Any, p: float) -> list[Tensor]:
        counted.append(len(branches))
        return run(x, branches, p)

    module.apply_branches = counting
    try:
        yield counted
    finally:
        module.apply_branches = run


def waiting(model: nn.Module) -> list[Any]:
    """What still waits for its layer's call."""
    return [held for holder in model.modules() for shared in module.shared_inputs(holder) for held in shared._pending]


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": False, "use_rslora": True}, {"activation": "gelu"}],
    ids=str,
)
def test_a_group_is_as_exact_as_its_layers(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    together = group(**arguments, dtype=dtype)
    single, x = apart(together), draw(dtype)
    exact = results(copy.deepcopy(single).double(), draw(dtype).detach().double().requires_grad_())
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
        given = results(exact, x.detach().double().requires_grad_())
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


CHANGES = [written_to, new_values, scaled, merged, switched_off, evaluating, with_another_weight]


@pytest.mark.parametrize("change", CHANGES)
def test_what_waits_is_not_taken_after_a_change(change: Callable[[Tensor, FusedLoRAGroup], Tensor]) -> None:
    together = group()
    with torch.no_grad():
        x = draw().detach()
    together.q(x)
    x = change(x, together)
    y = together.v(x)
    assert same_bits(y, apart(together).v(x))


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
    assert "4 groups of layers with one input: model.layers.0.self_attn.q_proj + " in str(report)
    lora_kernels.save_adapter(model, tmp_path)
    other = architectures.llama()
    lora_kernels.load_adapter(other, tmp_path)
    assert sum(len(module.shared_inputs(holder)) for holder in other.modules()) == 4
    lora_kernels.restore_linear(model)
    assert not any("_shared_inputs" in vars(holder) for holder in model.modules())


# Which are found


def bart() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(vocab_size=24, max_position_embeddings=16, **sizes, **heads))


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.T5Model(
        transformers.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


def other(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {**architectures.SIZES, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(vocab_size=24, pad_token_id=0, **sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES: dict[str, tuple[Callable[[], nn.Module], set[tuple[str, ...]]]] = {
    "llama": (architectures.llama, {QKV, GATED}),
    "qwen2": (architectures.qwen2, {QKV, GATED}),
    "qwen3": (lambda: other("Qwen3"), {QKV, GATED}),
    "mistral": (lambda: other("Mistral"), {QKV, GATED}),
    "gemma": (lambda: other("Gemma"), {QKV, GATED}),
    "bert": (architectures.bert, {("query", "key", "value")}),
    "bart": (bart, set()),
    "t5": (t5, set()),
    "gpt2": (architectures.gpt2, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_self_attention_and_gated_mlps_are_found_and_cross_attention_is_not(family: str) -> None:
    make, names = FAMILIES[family]
    report = replace_linear(make(), LoRAConfig(r=2, target_modules="all-linear"))
    assert {tuple(name.rpartition(".")[2] for name in found) for found in report.groups} == names


def test_a_model_of_each_family_trains_with_every_pass_taken_whole() -> None:
    for family in ("llama", "qwen3", "mistral"):
        model = FAMILIES[family][0]()
        replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"]))
        with passes() as counted:
            model(input_ids=architectures.TOKENS, labels=architectures.TOKENS).loss.backward()
        assert counted == [2] * 4
        assert not waiting(model)


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


def test_a_member_with_a_hook_compiles_with_it() -> None:
    together, x = group(), draw()
    together.v.register_forward_hook(lambda layer, args, y: y + 100.0)
    ys = torch.compile(together, backend="eager", fullgraph=True)(x)
    assert ys[2].min() > 50.0


def test_one_can_name_them_oneself() -> None:
    model = nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.Linear(8, 4), "narrow": nn.Linear(4, 4)})
    assert not replace_linear(model, LoRAConfig(r=2, target_modules=["left", "right", "narrow"])).groups
    refused(model, lambda m: share_inputs(m, [["left", "narrow"]]), InvalidArgumentError, "left 8, narrow 4")
    refused(model, lambda m: share_inputs(m, [["left", "middle"]]), InvalidArgumentError, "'middle'", "no module")
    assert str(share_inputs(model, [["left", "right"]])) == "1 group of layers with one input:\n  left, right"
    refused(model, lambda m: share_inputs(m, [["left", "right"]]), InvalidArgumentError, "run by themselves")
    x = torch.ones(3, 8)
    with passes() as counted:
        model["right"](x), model["left"](x)
    assert counted == [2]
    assert str(share_inputs(model)) == "no group of layers with one input"


def test_bad_groups_are_refused() -> None:
    layer, single = acting(8, 4), acting(8, 4)
    together = FusedLoRAGroup([layer, acting(8, 6)])
    before = layer_state(together)
    for given, error, word in (
        ([single], InvalidArgumentError, "1 layer"),
        ([single, acting(6, 4)], InvalidArgumentError, "0 8, 1 6"),
        ([single, nn.ReLU()], InvalidTypeError, "ReLU"),
        ([single, layer], LoRAStateError, "'1' runs in common"),
    ):
        with pytest.raises(error, match=word):
            FusedLoRAGroup(given)
    assert layer_state(together).keys() == before.keys()
    assert "_shared" not in vars(single)
    for function in (share_inputs, unshare_inputs):
        with pytest.raises(InvalidTypeError, match="a str"):
            function("model")


def test_a_group_of_plain_layers_is_joined_when_they_are_replaced() -> None:
    together = FusedLoRAGroup([nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(8, 2)])
    x = torch.randn(3, 8)
    assert [y.shape[-1] for y in together(x)] == [4, 6, 2]
    assert replace_linear(together, LoRAConfig(r=2, target_modules=["0", "2"])).groups == (("0", "2"),)
    with passes() as counted:
        together(x)
    assert counted == [2]
    assert isinstance(together.get_submodule("0"), FusedLoRALinear)
