"""``FusedLoRAMLP``: its gradients against float64, what it keeps, and when its layers run one by one."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import lora_kernels
from cases import BACKENDS
from lora_kernels import FusedLoRALinear, FusedLoRAMLP, LoRAConfig, replace_linear, share_inputs, unshare_inputs
from lora_kernels.activations import GATES
from lora_kernels.benchmark.memory import storages_kept
from lora_kernels.kept import row_words
from lora_kernels.models import gated as module
from made_models import acting
from numerics import check, check_all, same_bits

ON_CPU = [name for name, device in BACKENDS if device == "cpu"]
M, K, FEATURES, N, R = 40, 24, 20, 16, 3


class Joined(nn.Module):
    """As Phi-3's."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = gate_up, down, nn.SiLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        up_states = self.gate_up_proj(hidden_states)

        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)

        return self.down_proj(up_states)


def layers(*sizes: tuple[int, int], **arguments: Any) -> list[FusedLoRALinear]:
    return [acting(k, n, **{"r": R, **arguments}) for k, n in sizes]


def mlp(activation: str = "silu", **arguments: Any) -> FusedLoRAMLP:
    """One whose adapters act."""
    torch.manual_seed(5)
    return FusedLoRAMLP(*layers((K, FEATURES), (K, FEATURES), (FEATURES, N), **arguments), activation=activation)


def joined(**arguments: Any) -> Any:
    torch.manual_seed(5)
    model = Joined(*layers((K, 2 * FEATURES), (FEATURES, N), **arguments))
    assert share_inputs(model).mlps == ("",)
    return model


def apart(model: nn.Module) -> Any:
    """A copy whose layers run one by one."""
    single = copy.deepcopy(model)
    unshare_inputs(single)
    return single


def draw(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, M // 4, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor, seed: int = 2) -> dict[str, Tensor]:
    """y, dx and each parameter's gradient; dy is random and always the same."""
    torch.manual_seed(seed)
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    named = {"dx": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.autograd.backward(y, dy)
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    for tensor in named.values():
        tensor.grad = None
    return {"y": y.detach(), **gradients}


@contextlib.contextmanager
def passes() -> Iterator[list[int]]:
    """How many branches read x in each pass."""
    counted: list[int] = []
    run, module.run_mlp = (
        module.run_mlp,
        lambda x, heads, *rest, **named: (
            counted.append(len(heads)),
            run(x, heads, *rest, **named),
        )[1],
    )
    try:
        yield counted
    finally:
        module.run_mlp = run


# Values

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "use_rslora": True},
    {"lora_bias": True},
    {"use_dora": True},
    {"activation": "gelu"},
    {"lora_dropout": 0.3},
    {"lora_dropout": 0.3, "activation": "relu", "lora_bias": True},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def made(kind: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    if kind == "joined":
        return joined(**options, dtype=dtype)
    model = mlp(**{k: v for k, v in options.items() if k != "activation"}, dtype=dtype)
    between = options.get("activation", "identity")
    for layer in (model.gate_proj, model.up_proj, model.down_proj):
        layer.activation = between
    model.act_fn = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}[kind]
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [*GATES, "joined"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_against_float64(backend: str, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("triton takes no fp64")
    model, x = made(kind, options, dtype), draw(dtype)
    masks = "eager" if backend == "eager" else "native"  # whose masks are bit for bit triton's
    wide = apart(model).double()

    def exact() -> dict[str, Tensor]:
        with lora_kernels.use_backend(masks):
            return results(wide, draw(dtype).detach().double().requires_grad_())

    with lora_kernels.use_backend(masks):
        yardstick = results(apart(model), x)
    with passes() as counted, lora_kernels.use_backend(backend):
        actual = results(model, x)
    assert counted == [1 if kind == "joined" else 2]
    assert actual.keys() == yardstick.keys()
    check_all(actual, exact, yardstick, dtype)
    if backend != "triton" or dtype is torch.float32:  # Triton's interpreter is slow
        model.recompute = True
        with lora_kernels.use_backend(backend):
            again = results(model, x)
        assert all(same_bits(again[name], value) for name, value in actual.items())


FROZEN: list[tuple[str, ...]] = [
    ("gate_proj.lora_A", "up_proj.lora_A", "down_proj.lora_A"),
    ("gate_proj", "up_proj"),
    ("down_proj",),
    ("gate_proj.lora_B", "up_proj.lora_B", "down_proj.lora_B"),
    ("gate_proj.lora_A", "up_proj"),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_what_is_frozen_changes_no_other_gradient(
    backend: str, frozen: tuple[str, ...], need_x: bool, options: dict[str, Any], recompute: bool
) -> None:
    model = mlp(**options)
    model.recompute = recompute
    with lora_kernels.use_backend(backend):
        whole = results(model, draw())
        for name, parameter in model.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
        partial = results(model, draw().detach().requires_grad_(need_x))
    due = {name for name, p in model.named_parameters() if p.requires_grad} | ({"dx"} if need_x else set()) | {"y"}
    assert partial.keys() == due
    assert all(same_bits(partial[name], whole[name]) for name in due)


@pytest.mark.parametrize("kind", [*GATES, "joined"])
def test_second_derivatives_are_those_of_one_by_one(kind: str) -> None:
    """Against the reference's formulas by PyTorch itself."""
    model = made(kind, {"lora_bias": True, "lora_dropout": 0.2}, torch.float64)

    def penalty(of: nn.Module) -> list[Tensor]:
        x = draw(torch.float64)
        torch.manual_seed(4)
        (dx,) = torch.autograd.grad(of(x).sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [p for p in of.parameters() if p.requires_grad]))

    exact = dict(enumerate(penalty(apart(model))))
    check_all(dict(enumerate(penalty(model))), exact, exact, torch.float64)


def test_a_second_derivative_without_what_it_takes_is_refused() -> None:
    model = mlp()
    y = model(draw().detach()).sum()
    with pytest.raises(lora_kernels.LoRAKernelsError, match="unshare_inputs"):
        torch.autograd.grad(y, model.down_proj.lora_A, create_graph=True)


def test_under_autocast() -> None:
    model, x = mlp(), draw()
    with torch.autocast("cpu", torch.bfloat16), passes() as counted:
        y = model(x)
        y.float().sum().backward()
    assert counted == [2]
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    single = apart(model)
    with torch.autocast("cpu", torch.bfloat16):
        alone = single(draw()).detach()
    exact = partial(copy.deepcopy(single).double(), draw().detach().double())
    check("y", y.detach(), exact, alone, torch.bfloat16)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "eager"])  # PyTorch's own are NaN there
@pytest.mark.parametrize("value", [60.0, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("activation", range(3))
def test_a_large_gate_gives_the_limit(activation: int, value: float, backend: str) -> None:
    gate = torch.tensor([[value, -value, 0.0]])
    lora_kernels.dispatch.select("cpu", torch.float32, backend)
    ops, ones = lora_kernels.ops._registered[backend], torch.ones(1, 3)
    found = *ops.gated_grad(ones, gate, ones, activation, False), ops.gated(gate, ones, activation)
    dgate, dup, a = (t.where(t.abs() > 1e-20, torch.zeros(())) for t in found)
    assert torch.equal(dup, a)
    assert torch.equal(dup, torch.tensor([[value, 0.0, 0.0]]))
    assert torch.equal(dgate, torch.tensor([[1.0, 0.0, 0.5]]))


def test_no_tokens_and_few_tokens() -> None:
    for tokens in (0, 1, 3):
        model, x = mlp(), torch.randn(tokens, K, requires_grad=True)
        exact = partial(results, apart(model).double(), x.detach().double().requires_grad_())
        check_all(results(model, x), exact, results(apart(model), x), torch.float32)


# What is kept


def kept(function: Any, *, but: Any = ()) -> list[Tensor]:
    own = {tensor.untyped_storage().data_ptr() for tensor in but}
    return [tensor for address, tensor in storages_kept(function).items() if address not in own]


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", ON_CPU)
def test_gate_up_and_h_are_kept_and_no_product(backend: str, p: float, recompute: bool) -> None:
    model, x = mlp(lora_dropout=p, dtype=torch.bfloat16), draw(torch.bfloat16)
    model.recompute = recompute
    with lora_kernels.use_backend(backend):
        found = kept(lambda: model(x), but=[x, *model.parameters()])
    hidden = 3 if p else 2  # without dropout gate's and up's h are one matrix
    expected = Counter({(M, R): hidden} | ({} if recompute else {(M, FEATURES): 2}))
    if p:
        expected += Counter({(2,): 2}) + Counter([(M, row_words(FEATURES)) if backend == "triton" else (2,)])
    assert Counter(tuple(t.shape) for t in found) == expected


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_block_keeps_little_more_than_half_of_pefts(p: float) -> None:
    """A bf16 base with Llama-3-8B's proportions: at most 0.55 of PEFT's, and less than three layers keep."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, use_cache=False, num_key_value_heads=1, **sizes)
    embedded = torch.randn(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)

    def plain() -> Any:
        return transformers.LlamaModel(config).to(torch.bfloat16).requires_grad_(False).train()

    def of_model(model: Any) -> int:
        return bytes_of(kept(lambda: model(inputs_embeds=embedded)[0], but=[embedded, *model.parameters()]))

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = of_model(peft.get_peft_model(plain(), peft.LoraConfig(r=8, lora_dropout=p, target_modules=names)))
    model = plain()
    replace_linear(model, LoRAConfig(r=8, lora_dropout=p, target_modules=names))
    one_pass = of_model(model)
    unshare_inputs(model)
    assert one_pass <= 0.55 * theirs
    assert one_pass < 0.85 * of_model(model)


# When the layers run one by one


def hook(model: Any) -> None:
    model.up_proj.register_forward_hook(lambda layer, args, y: y + 1.0)


def pre_hook(model: Any) -> None:
    model.gate_proj.register_forward_pre_hook(lambda layer, args: (args[0] + 1.0,))


def hook_on_the_activation(model: Any) -> None:
    model.act_fn.register_forward_hook(lambda layer, args, y: y + 1.0)


def another_activation(model: Any) -> None:
    model.act_fn = nn.Tanh()


def merged(model: Any) -> None:
    model.down_proj.merge()


def off(model: Any) -> None:
    model.gate_proj.enable_lora(False)


def training_weight(model: Any) -> None:
    model.up_proj.weight.requires_grad_(True)


def other_dropout(model: Any) -> None:
    model.up_proj.lora_dropout = 0.5


def dora_with_dropout(model: Any) -> None:
    model.up_proj = acting(K, FEATURES, use_dora=True, lora_dropout=0.1)


def bare(model: Any) -> None:
    model.down_proj = nn.Linear(FEATURES, N)


def own_forward(model: Any) -> None:
    model.down_proj.forward = lambda x: F.linear(x, model.down_proj.weight)


class Doubled(FusedLoRALinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def derived(model: Any) -> None:
    model.up_proj.__class__ = Doubled


def within_evaluation(model: Any) -> None:
    model.gate_proj.eval()


def asked_to_be(model: Any) -> None:
    unshare_inputs(model)


REASONS: list[tuple[Callable[[Any], None], str]] = [
    (hook, "up_proj: it has hooks"),
    (pre_hook, "gate_proj: it has hooks"),
    (hook_on_the_activation, "activation"),
    (another_activation, "activation"),
    (merged, "down_proj: its adapter is merged"),
    (off, "gate_proj: its adapter is off"),
    (training_weight, "a base weight trains"),
    (other_dropout, "different dropout"),
    (dora_with_dropout, "up_proj: DoRA with dropout"),
    (bare, "down_proj: it has no adapter"),
    (own_forward, "down_proj: it has a forward of its own"),
    (derived, "up_proj: Doubled has a forward of its own"),
    (within_evaluation, "gate_proj: it is in evaluation"),
    (asked_to_be, "unshare_inputs"),
]


@pytest.mark.parametrize(("change", "reason"), REASONS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_layers_run_one_by_one_where_a_pass_would_leave_something_out(
    change: Callable[[Any], None], reason: str
) -> None:
    model, x = mlp(), draw()
    change(model)
    with passes() as counted:
        torch.manual_seed(6)
        y = model(x)
        torch.manual_seed(6)
        product = model.act_fn(model.gate_proj(x)) * model.up_proj(x)
        alone = model.down_proj(product)
    assert counted == []
    assert same_bits(y, alone)
    assert reason in model.why_plain()
    assert reason in (model.why_plain(x) or "")


def test_compiled_too_a_hook_on_all_modules_is_not_left_out() -> None:
    model, x = mlp(), draw()
    handle = torch_module.register_module_forward_hook(
        lambda layer, args, y: 1.5 * y if layer is model.up_proj else None
    )
    try:
        assert "hooks on all modules" in (model.why_plain() or "")
        y = torch.compile(lambda x: model(x), backend="eager")(x)
        assert same_bits(y, model(x))
    finally:
        handle.remove()
    assert not same_bits(y, model(x))


def test_layers_of_several_dtypes_run_one_by_one_outside_of_autocast() -> None:
    model, x = mlp(), draw()
    model.down_proj.to(torch.bfloat16)
    assert "several dtypes" in (model.why_plain(x) or "")
    with pytest.raises(lora_kernels.LoRAKernelsError, match="dtypes"):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.why_plain(x) is None
        model(x).sum().backward()


def test_on_several_devices() -> None:
    model = mlp()
    model.to("meta").gate_proj.to_empty(device="cpu")
    assert module._why_mixed(None, [layer.branch() for layer in (model.gate_proj, model.down_proj)])
    assert model.why_plain() is not None


def test_in_evaluation_it_is_the_plain_composition() -> None:
    model, x = mlp(lora_dropout=0.5).eval(), draw()
    with passes() as counted:
        assert same_bits(model(x), apart(model)(x))
    assert counted == []
    assert "evaluation" in (model.why_plain() or "")


def test_function_transforms_are_refused_in_a_sentence() -> None:
    model = mlp()
    with pytest.raises(lora_kernels.LoRAKernelsError, match=r"torch\.func"):
        torch.func.vmap(model)(draw())
    compiled = torch.compile(torch.func.grad(lambda x: model(x).sum()), backend="aot_eager")
    with pytest.raises(lora_kernels.LoRAKernelsError, match=r"torch\.func"):
        compiled(draw())


def test_an_inner_layer_is_still_a_layer() -> None:
    model, x = mlp(), draw()
    model(x)
    y = model.gate_proj(x)
    assert same_bits(y, apart(model).gate_proj(x))


def test_sizes_and_activations_that_do_not_fit_are_refused() -> None:
    for given, words in (
        (((K, 4), (K, 5), (4, N)), "different sizes"),
        (((K, 4), (K, 4), (5, N)), "down reads 5"),
    ):
        with pytest.raises(lora_kernels.LoRAKernelsError, match=words):
            FusedLoRAMLP(*layers(*given))
    with pytest.raises(lora_kernels.LoRAKernelsError, match="'relu' was given for a gated MLP"):
        mlp("relu")
    with pytest.raises(lora_kernels.LoRAKernelsError, match="must be a linear layer"):
        FusedLoRAMLP(nn.ReLU(), nn.ReLU(), nn.ReLU())


# Around it


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool, recompute: bool) -> None:
    model = mlp(lora_dropout=0.3)
    model.recompute = recompute
    plain = results(model, draw())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    again = {name.removeprefix("inner."): value for name, value in results(Checkpointed(), draw()).items()}
    assert all(same_bits(again[name], value) for name, value in plain.items())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("kind", ["gelu_tanh", "joined"])
@pytest.mark.parametrize("recompute", [False, True])
def test_it_compiles_in_one_graph_as_one_pass(kind: str, options: dict[str, Any], recompute: bool) -> None:
    model = made(kind, options, torch.float32)
    model.recompute = recompute
    names: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for g in graph.modules() if hasattr(g, "graph") for node in g.graph.nodes)
        return graph

    torch._dynamo.reset()
    with passes() as counted:
        eager = results(model, draw())
    assert counted
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(
        same_bits(value, eager[name.removeprefix("_orig_mod.")]) for name, value in results(compiled, draw()).items()
    )
    torch._dynamo.reset()
    torch.compile(model, backend=look, fullgraph=True)(draw())
    assert any("gated" in name for name in names), names


def test_copies_and_pickles_run_in_one_pass_too() -> None:
    for model in (mlp(), joined()):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied) is type(model)
            with passes() as counted:
                assert same_bits(copied(draw()), model(draw()))
            assert len(counted) == 2


def test_a_layer_in_a_pass_counts_as_called() -> None:
    model = mlp()
    model(draw())
    assert all(layer._called and layer._trained for layer in (model.gate_proj, model.up_proj, model.down_proj))


def test_the_word_of_an_argument_may_be_its_name() -> None:
    model = joined()
    with passes() as counted:
        model(hidden_states=draw())
    assert counted == [1]
    with pytest.raises(TypeError):
        model()
