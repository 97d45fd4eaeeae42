"""Runs the worked example over several seeds, compares the fused layer with the reference one, and times both."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Progress, one_thread
from ..dispatch import explain
from ..errors import InvalidArgumentError
from ..info import versions
from ..nn import FusedLoRALinear
from . import training

__all__ = ["PUBLISHED", "SEEDS", "Report", "SeedResult", "Summary", "Timing", "run"]

SEEDS, EPOCHS = 5, 400
PUBLISHED = {"sphere": 98.3, "gaussian": 81.2, "lora": 98.7}
"""The published accuracies, in percent; see :class:`SeedResult` for what each is."""

ACCURACIES = (*PUBLISHED, "adapter")

LOSS_EPS_PER_STEP = 1.0
"""How far two loss curves may part, relative, in fp32's eps for each training step that was made.

Both curves are the same function of the same data, so they differ by rounding alone. If every step moved the loss by
one rounding more, and always to the same side, the gap would grow as the number of steps: 3200 x 1.2e-7 = 3.8e-4 at the
end. Roundings cancel, so that the gap is a few percent of this. Faults that were tried exceed it: a scaling that is off
by one in a thousand, or a lora_A rounded to bf16, within three epochs of a pre-trained start; a stale h, or a permuted
gradient, in the first.
"""

TIMING_ROUNDS, TIMING_STEPS = 40, 10


@dataclass(frozen=True)
class SeedResult:
    """One seed, accuracies in percent on fresh samples.

    Attributes:
        sphere, gaussian: of the pre-trained model, on its own kind of data and on Gaussian data.
        lora, lora_reference: on Gaussian data after the LoRA phase, by the fused layer and by the reference one.
        adapter: likewise, with a ReLU between A and B: a parallel bottleneck adapter in the place of LoRA.
        losses, losses_reference: mean loss of each epoch of the LoRA phase.
        difference: the largest relative difference of the two curves.
        gap: the same in units of what ``LOSS_EPS_PER_STEP`` allows at that epoch.
    """

    seed: int
    sphere: float
    gaussian: float
    lora: float
    lora_reference: float
    adapter: float
    losses: tuple[float, ...]
    losses_reference: tuple[float, ...]
    difference: float
    gap: float


@dataclass(frozen=True)
class Timing:
    """Time of one training step of the LoRA phase; ratios are taken round by round, of blocks that ran in turn.

    Attributes:
        microseconds: median over the rounds.
        ratio, p20, p80: of the reference's time over this one's; above 1 this one is quicker.
    """

    layer: str
    microseconds: float
    ratio: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (of the sample) and range over the seeds, in percent; the published value, if any."""

    published: float | None
    mean: float
    deviation: float
    lowest: float
    highest: float

    @property
    def published_is_within(self) -> bool:
        """Whether the published value lies within the range of the seeds, to the decimal that was published."""
        return self.published is not None and round(self.lowest, 1) <= self.published <= round(self.highest, 1)


@dataclass(frozen=True)
class Report:
    """What :func:`lora_kernels.demo.run` returns."""

    versions: Mapping[str, str | None]
    device: str
    backend: str
    epochs: int
    trainable: int
    replaced: int
    results: tuple[SeedResult, ...]
    timings: tuple[Timing, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the fused layer trained as the reference did, for every seed."""
        return all(result.gap <= 1.0 for result in self.results)

    @property
    def summaries(self) -> dict[str, Summary]:
        """For each of ``ACCURACIES``, what the seeds gave."""
        found = {}
        for name in ACCURACIES:
            values = [getattr(result, name) for result in self.results]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = Summary(PUBLISHED.get(name), statistics.fmean(values), deviation, min(values), max(values))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold, with ``passed`` and ``summaries``."""
        summaries = {name: asdict(summary) for name, summary in self.summaries.items()}
        return {"passed": self.passed, "summaries": summaries, **asdict(self)}


def run(seeds: int = SEEDS, epochs: int = EPOCHS, device: str = "cpu", progress: Progress | None = None) -> Report:
    """Pre-trains, tests, replaces the second layer by LoRA, fine-tunes it, fused and reference, for seeds 0, 1, ….

    A third time it is fine-tuned with a ReLU between A and B. The LoRA phases start from the same state and see the
    same batches. torch's random state is left as it was.

    Args:
        seeds: how many, at least 1.
        epochs: of each phase, at least 1; the published ones are 400.
        device: "cpu", "cuda" or "cuda:N".
        progress: called as ``progress(label, done, total)``.

    Raises:
        InvalidArgumentError: a count below 1, an unknown device.

    Example:
        >>> from lora_kernels import demo
        >>> report = demo.run(seeds=1, epochs=2)
        >>> report.trainable, report.replaced, report.passed
        (160, 1056, True)
    """
    if seeds < 1 or epochs < 1:
        raise InvalidArgumentError(f"seeds={seeds} and epochs={epochs} were given: both must be at least 1.")
    started = time.monotonic()
    place = _device(device)
    results = []
    with one_thread(), torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        for seed in range(seeds):
            phases = partial(_tell, progress, "phases of the seeds", 4 * seeds, 4 * seed)
            result, adapted = _run_seed(seed, epochs, place, phases)
            results.append(result)
        timings = _time_steps(adapted, place, progress)
    layer = adapted.get_submodule("hidden_2")
    assert isinstance(layer, FusedLoRALinear)
    return Report(
        versions=versions(),
        device=device,
        backend=explain(layer).backend,
        epochs=epochs,
        trainable=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        replaced=layer.weight.numel() + layer.out_features,
        results=tuple(results),
        timings=timings,
        seconds=round(time.monotonic() - started, 1),
    )


def _tell(progress: Progress | None, label: str, total: int, before: int, done: int) -> None:
    if progress is not None:
        progress(label, before + done, total)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InvalidArgumentError(f"device {name!r} was given and cannot be used ({error}). Use cpu.") from error
    if device.type == "meta":
        raise InvalidArgumentError("device 'meta' was given, which computes nothing. Use cpu.")
    return device


def _run_seed(
    seed: int, epochs: int, device: torch.device, done: Callable[[int], None]
) -> tuple[SeedResult, nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    train_sphere, train_gaussian = (
        kind(training.TRAIN_SAMPLES, generator).to(device) for kind in (training.sphere, training.gaussian)
    )
    test_sphere, test_gaussian = (
        kind(training.TEST_SAMPLES, generator).to(device) for kind in (training.sphere, training.gaussian)
    )
    pretrained = training.model().to(device)
    done(0)
    training.train(pretrained, train_sphere, training.PRETRAIN_LR, epochs, seed)
    done(1)
    start = training.with_lora(pretrained)
    fused, plain = copy.deepcopy(start), training.with_reference_lora(start)
    losses = training.train(fused, train_gaussian, training.LORA_LR, epochs, seed)
    done(2)
    losses_reference = training.train(plain, train_gaussian, training.LORA_LR, epochs, seed)
    done(3)
    adapter = training.with_lora(pretrained, "relu")
    training.train(adapter, train_gaussian, training.LORA_LR, epochs, seed)
    done(4)
    difference, gap = _compare(losses, losses_reference)
    result = SeedResult(
        seed=seed,
        sphere=training.accuracy(pretrained, test_sphere),
        gaussian=training.accuracy(pretrained, test_gaussian),
        lora=training.accuracy(fused, test_gaussian),
        lora_reference=training.accuracy(plain, test_gaussian),
        adapter=training.accuracy(adapter, test_gaussian),
        losses=tuple(losses.tolist()),
        losses_reference=tuple(losses_reference.tolist()),
        difference=difference,
        gap=gap,
    )
    return result, start


def _compare(losses: Tensor, losses_reference: Tensor) -> tuple[float, float]:
    """The largest relative difference, and the largest in units of the bound; inf where a loss is not finite."""
    if not bool(torch.isfinite(losses).all() and torch.isfinite(losses_reference).all()):
        return float("inf"), float("inf")
    relative = (losses - losses_reference).abs() / losses_reference
    steps = torch.arange(1, len(losses) + 1) * -(-training.TRAIN_SAMPLES // training.BATCH)
    allowed = LOSS_EPS_PER_STEP * torch.finfo(torch.float32).eps * steps
    return float(relative.max()), float((relative / allowed).max())


def _time_steps(start: nn.Module, device: torch.device, progress: Progress | None) -> tuple[Timing, ...]:
    networks = {"reference, plain PyTorch": training.with_reference_lora(start), "FusedLoRALinear": start}
    if find_spec("peft") is not None:
        networks["PEFT's LoRA layer"] = _with_peft(start)
    x = training.gaussian(training.BATCH, torch.Generator().manual_seed(0)).to(device)
    target = training.labels(x)
    contestants = {}
    for name, network in networks.items():
        network = copy.deepcopy(network)
        trained = [p for p in network.parameters() if p.requires_grad]
        contestants[name] = (network, torch.optim.Adam(trained, lr=training.LORA_LR, fused=True))
    times: dict[str, list[float]] = {name: [] for name in networks}
    for done in range(TIMING_ROUNDS + 1):  # the first round warms up
        _tell(progress, "timing", TIMING_ROUNDS + 1, 0, done)
        for name, (network, optimizer) in contestants.items():
            times[name].append(_block(network, optimizer, x, target))
    first = times["reference, plain PyTorch"][1:]
    return tuple(_timing(name, block[1:], first) for name, block in times.items())


def _block(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
    """Microseconds of one step, over ``TIMING_STEPS``."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begun = time.perf_counter()
    for _ in range(TIMING_STEPS):
        training.step(network, optimizer, x, target)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - begun) / TIMING_STEPS * 1e6


def _timing(name: str, block: list[float], first: list[float]) -> Timing:
    ratios = [reference / own for own, reference in zip(block, first, strict=True)]
    p20, *_, p80 = statistics.quantiles(ratios, n=5)
    return Timing(name, statistics.median(block), statistics.median(ratios), p20, p80)


def _with_peft(start: nn.Module) -> nn.Module:
    """The same model with PEFT's layer in the place of ours, made by PEFT; its bias trains too."""
    import peft

    from ..models.model import restore_linear

    network = copy.deepcopy(start)
    restore_linear(network)
    config = peft.LoraConfig(r=training.LORA.r, lora_alpha=int(training.LORA.lora_alpha), target_modules=["hidden_2"])
    peft.inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("hidden_2.") and not name.endswith("base_layer.weight"))
    return network
