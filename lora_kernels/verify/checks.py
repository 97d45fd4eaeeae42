"""Runs the cases on every backend through the public ``lora_linear`` and judges them by ``lora_kernels.accuracy``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..accuracy import OUTPUTS, Accuracy, expected_errors, judge, run_reference, tf32_allowed
from ..console import Progress, one_thread
from ..errors import BackendUnavailableError, InvalidArgumentError
from ..functional import lora_linear
from ..info import versions
from ..weights import samples
from . import branches
from .cases import CASES, SCALING, Case, Inputs, make
from .draws import drawn_mask, seeded
from .interpreted import InterpretedTriton
from .report import Check, Failure, NotRun, Report, Rounding, Row

__all__ = ["DTYPES", "outputs", "run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

KEEP_SIGMAS = 6.0
"""How far the share of kept elements may be from 1 - p, in standard deviations: a false alarm in 5e8 draws."""

_REPEATED = Case("repeated", 333, 1001, 700, 17, p=0.1, large=True)
_REPEATED_INTERPRETED = Case("repeated", 37, 48, 40, 8, p=0.1)
_GRADCHECK = Case("gradcheck", 3, 5, 4, 2, p=0.25)
_MASK = Case("mask", 256, 256, 1, 1, p=0.1)
_ROUNDING = Case("rounding", 64, 192, 64, 16)


def run(
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    weights: Sequence[str] | None = None,
) -> Report:
    """Runs forward and every gradient of the backends, in every dtype they take, on every case of ``CASES``.

    *Exact* is the reference in float64 on the same rounded inputs and the very mask that the backend drew; a result
    passes by the rules of ``lora_kernels.accuracy``. In fp16 some cases are beyond its range, for fp32 adapters: there
    the yardstick's products are fp32's. Beside that: gradcheck in float64 where a backend takes it, the
    same bits from two runs, the share of elements that dropout keeps, and the error of y in bf16 beside PEFT's
    composition. On a CPU, Triton's kernels run in a process of their own under Triton's interpreter. torch's random
    state is left as it was.

    Args:
        backends: names; None is every one that is available.
        dtypes: of "fp32", "bf16", "fp16", "fp64"; None is all.
        device: "cpu", "cuda" or "cuda:N"; None is the GPU where there is one.
        seed: of the tensors and of dropout.
        progress: called as ``progress(label, done, total)``.
        weights: forms of a quantised W, such as "nf4": these are verified, and plain weights are not. Everything is
            then measured beside the same layer over the dequantised W. Sizes are rounded up to the form's blocks.

    Returns:
        A report; ``report.passed`` is the verdict.

    Raises:
        InvalidArgumentError: an unknown backend, dtype, device or form of W.
        MissingExtraError: a form of W whose package is not installed.
        BackendUnavailableError: a backend was named that takes none of the dtypes here.

    Example:
        >>> from lora_kernels import verify
        >>> verify.run(backends=["eager"], dtypes=["fp32"], device="cpu").passed
        True
    """
    started = time.monotonic()
    place = _device(device)
    names, shorts = tuple(dict.fromkeys(backends or dispatch.ORDER)), tuple(dict.fromkeys(dtypes or DTYPES))
    for name in names:
        dispatch.backend(name)
    if unknown := [short for short in shorts if short not in DTYPES]:
        raise InvalidArgumentError(f"dtype {unknown[0]!r} was given: it must be one of {', '.join(DTYPES)}.")
    report = Report(versions=versions(), device=str(place), seed=seed)
    explicit = backends is not None
    if weights:
        samples.check_kinds(tuple(weights))
        for name in names:
            report = _verify_weights(report, name, shorts, tuple(dict.fromkeys(weights)), explicit, progress)
    else:
        report = _verify_plain(report, names, shorts, explicit, progress)
    if not report.rows and not report.failures:
        raise BackendUnavailableError(
            f"nothing was verified: {' '.join(item.reasons for item in report.not_run)} Name another backend or dtype."
        )
    return replace(report, seconds=round(time.monotonic() - started, 1))


def _verify_plain(
    report: Report, names: tuple[str, ...], shorts: tuple[str, ...], explicit: bool, progress: Progress | None
) -> Report:
    place = torch.device(report.device)
    with InterpretedTriton(names, shorts, place, report.seed, progress) as child:
        for name in names:
            if name != child.backend:
                report = _verify_backend(report, name, shorts, explicit, progress)
        if report.rows:
            report = replace(report, rounding=_rounding(report))
        return child.add_to(report, explicit)


def _verify_weights(
    report: Report,
    name: str,
    shorts: tuple[str, ...],
    weights: tuple[str, ...],
    explicit: bool,
    progress: Progress | None,
) -> Report:
    """``report`` with what ``name`` gave over each quantised form of W, in each dtype that it takes."""
    if name == "triton" and torch.device(report.device).type == "cpu":
        reason = "Triton's interpreter multiplies the same values as over a plain W; verify without weights runs it."
        return replace(report, not_run=(*report.not_run, NotRun(name, shorts, reason)))
    report, taken = _taken(report, name, shorts, explicit)
    for kind in weights:
        for short in taken:
            report = _verify_dtype(report, name, short, progress, kind)
    return report


def _taken(report: Report, name: str, shorts: Sequence[str], explicit: bool) -> tuple[Report, list[str]]:
    """The dtypes that ``name`` takes here; ``report`` has the reasons for the others."""
    device = torch.device(report.device)
    reasons = {s: " ".join(dispatch.backend(name).why_not(dispatch.Problem(device.type, DTYPES[s]))) for s in shorts}
    taken = [short for short in shorts if not reasons[short]]
    if explicit and not taken:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reasons[shorts[0]]}")
    for text in dict.fromkeys(filter(None, reasons.values())):
        refused = tuple(short for short in shorts if reasons[short] == text)
        report = replace(report, not_run=(*report.not_run, NotRun(name, refused, text)))
    return report, taken


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise InvalidArgumentError(f"device {name!r} was given: it must be cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InvalidArgumentError(f"device {name!r} was given: it must be cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if available else 0):
        raise InvalidArgumentError(
            f"device {name!r} was given, and PyTorch sees {torch.cuda.device_count()} CUDA devices (torch.version.cuda "
            f"is {torch.version.cuda}). Use cpu, or install a CUDA build of PyTorch on a machine with a GPU."
        )
    return device


def _verify_backend(
    report: Report, name: str, shorts: Sequence[str], explicit: bool, progress: Progress | None
) -> Report:
    """``report`` with what ``name`` gave in each dtype that it takes, or with the reasons why it takes none."""
    report, taken = _taken(report, name, shorts, explicit)
    for short in taken:
        report = _verify_dtype(report, name, short, progress)
    if taken:
        device = torch.device(report.device)
        check = _guarded_check(name, taken[0], "dropout keeps 1 - p", lambda: _keep_share(name, device, report.seed))
        report = replace(report, checks=(*report.checks, check))
    return report


def _verify_dtype(report: Report, name: str, short: str, progress: Progress | None, weights: str = "") -> Report:
    dtype, device, seed = DTYPES[short], torch.device(report.device), report.seed
    interpreted = name == "triton" and device.type == "cpu"
    cases = [case for case in CASES if case.applies(dtype) and not (case.large and interpreted)]
    if weights:
        cases = [_fitting(case, samples.multiple(weights)) for case in cases if case.zero != "weight"]
    label = f"{name} {short}{f' over {weights}' if weights else ''}"
    judged: list[tuple[str, Accuracy]] = []
    failures: list[Failure] = []
    raised = 0
    for done, case in enumerate(cases):
        if progress is not None:
            progress(label, done, len(cases))
        try:
            with nullcontext() if case.large else one_thread():
                verdicts = _judge_case(name, case, dtype, device, seed, weights=weights)
        except Exception as error:  # noqa: BLE001 (a kernel that raises, in whatever way, is a failed case, not the end)
            raised += 1
            sentence = f"raised {type(error).__name__}: {error}"
            failures.append(Failure(name, short, _named(case.name, weights), sentence))
            continue
        judged += [(case.name, verdict) for verdict in verdicts]
        told = _named(case.name, weights)
        failures += [Failure(name, short, told, str(verdict)) for verdict in verdicts if not verdict.passed]
    checks = [] if weights else _checks_of(name, short, device, seed)
    if progress is not None:
        progress(label, len(cases), len(cases))
    rows = [replace(_row(name, report.device, short, each, judged, raised), weights=weights) for each in OUTPUTS]
    return replace(
        report,
        rows=(*report.rows, *rows),
        failures=(*report.failures, *failures),
        checks=(*report.checks, *checks),
    )


def _named(case: str, weights: str) -> str:
    return f"{case}, over {weights}" if weights else case


def _fitting(case: Case, multiple: int) -> Case:
    """``case`` with K and N rounded up to what a form's blocks take."""
    up = [-(-size // multiple) * multiple for size in (case.k, case.n, *(n for n, _ in case.beside))]
    beside = tuple(zip(up[2:], (r for _, r in case.beside), strict=True))
    return replace(case, k=up[0], n=up[1], beside=beside)


def _checks_of(name: str, short: str, device: torch.device, seed: int) -> list[Check]:
    dtype, interpreted = DTYPES[short], name == "triton" and device.type == "cpu"
    repeated = _REPEATED_INTERPRETED if interpreted else _REPEATED
    checks = [
        _guarded_check(name, short, "the same bits twice", lambda: _same_twice(name, repeated, dtype, device, seed))
    ]
    if dtype == torch.float64:
        checks.append(_guarded_check(name, short, "gradcheck", lambda: _gradcheck(name, device, seed)))
        checks.append(_guarded_check(name, short, "gradgradcheck", lambda: _gradgradcheck(name, device, seed)))
    return checks


def _row(name: str, device: str, short: str, output: str, judged: Sequence[tuple[str, Accuracy]], raised: int) -> Row:
    own = [(case, verdict) for case, verdict in judged if verdict.name == output]
    failed = raised + len({case for case, verdict in own if not verdict.passed})
    if not own:
        return Row(name, device, short, output, None, float("inf"), 0.0, "none ran", raised, failed)
    worst_case, worst = max(own, key=lambda item: _pressure(item[1]))
    ran = raised + len({case for case, _ in own})
    beyond = {case.name for case in CASES if case.factors}  # whose yardstick is another dtype's
    ratios = [] if short == "fp64" else [verdict.ratio for case, verdict in own if case not in beyond]
    ratio = max(ratios, default=None)
    return Row(name, device, short, output, ratio, worst.error, worst.limit, worst_case, ran, failed)


def _pressure(verdict: Accuracy) -> float:
    """How close a result came to its limit; a failed one comes before all that passed."""
    share = max(verdict.error / verdict.limit, verdict.row_error / verdict.row_limit)
    return share if verdict.passed else float("inf")


def _judge_case(
    name: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    create_graph: bool = False,
    weights: str = "",
) -> list[Accuracy]:
    """The verdicts on all outputs of one case; dbias and dgain only where there is a bias, a gain."""
    tf32 = dtype == torch.float32 and device.type == "cuda" and tf32_allowed()
    if case.branched or weights:
        return branches.judge_case(name, case, dtype, device, seed, tf32, weights)
    inputs = make(case, dtype, device, seed)
    actual = outputs(name, inputs, case.p, seed, create_graph)
    mask = drawn_mask(name, inputs.x, case.p, seed) if case.p > 0.0 else None
    arguments = (*vars(inputs).values(), SCALING, mask, case.p)
    exact, yardstick = (run_reference(wide, *arguments) for wide in (torch.float64, case.yardstick(dtype)))
    errors = expected_errors(dtype, *arguments, tf32=tf32)
    return [
        judge(output, value, exact[output], yardstick[output].to(value.dtype), dtype, tf32, expected=errors[output])
        for output, value in actual.items()
    ]


def outputs(name: str, inputs: Inputs, p: float, seed: int, create_graph: bool = False) -> dict[str, Tensor]:
    """y and every gradient by backend ``name``, through ``lora_linear`` and autograd, dropout drawn from ``seed``."""
    leaves = {"dx": inputs.x, "da": inputs.lora_a, "db": inputs.lora_b, "dbias": inputs.bias}
    due = {output: leaf.detach().requires_grad_() for output, leaf in leaves.items() if leaf is not None}
    with seeded(seed, inputs.x.device):
        y = lora_linear(
            due["dx"], inputs.weight, due["da"], due["db"], due.get("dbias"), SCALING, p, training=True, backend=name
        )
    gradients = torch.autograd.grad(y, tuple(due.values()), inputs.dy, create_graph=create_graph)
    for output, gradient in zip(due, gradients, strict=True):
        if gradient.dtype != due[output].dtype:
            raise TypeError(f"{output} is {gradient.dtype}, and should be {due[output].dtype}")
    return {"y": y.detach(), **dict(zip(due, gradients, strict=True))}


def _guarded_check(name: str, short: str, title: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        passed, detail = check()
    except Exception as error:  # noqa: BLE001 (as for the cases: what a kernel raises is a finding)
        passed, detail = False, f"raised {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return Check(name, short, title, passed, detail)


def _same_twice(name: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[bool, str]:
    inputs = make(case, dtype, device, seed)
    first, second = (outputs(name, inputs, case.p, seed) for _ in range(2))
    differing = [output for output in first if not torch.equal(first[output], second[output])]
    return not differing, f"{', '.join(differing)} differ between two runs" if differing else "all outputs, bit for bit"


def _gradcheck(name: str, device: torch.device, seed: int) -> tuple[bool, str]:
    """torch's comparison with finite differences, in x, lora_a, lora_b and bias; dropout always by the same seed."""
    function, leaves = _gradcheck_problem(name, device, seed)
    return torch.autograd.gradcheck(function, leaves), "against finite differences, with dropout"


def _gradgradcheck(name: str, device: torch.device, seed: int) -> tuple[bool, str]:
    """The same of the gradients, and first that ``create_graph=True`` does not change them: torch does not look."""
    for verdict in _judge_case(name, _GRADCHECK, torch.float64, device, seed, create_graph=True):
        if not verdict.passed:
            return False, f"with create_graph=True {verdict}"
    function, leaves = _gradcheck_problem(name, device, seed)
    return torch.autograd.gradgradcheck(function, leaves), "second derivatives against finite differences"


def _gradcheck_problem(name: str, device: torch.device, seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    inputs = make(_GRADCHECK, torch.float64, device, seed)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias) if t is not None]

    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
        with seeded(seed, device):
            return lora_linear(x, inputs.weight, lora_a, lora_b, bias, SCALING, _GRADCHECK.p, True, name)

    return function, leaves


def _keep_share(name: str, device: torch.device, seed: int) -> tuple[bool, str]:
    x = torch.empty((_MASK.m, _MASK.k), device=device)
    kept, p = float(drawn_mask(name, x, _MASK.p, seed).double().mean()), _MASK.p
    sigma = (p * (1.0 - p) / x.numel()) ** 0.5
    passed = abs(kept - (1.0 - p)) <= KEEP_SIGMAS * sigma
    return passed, f"kept {kept:.4f} at p = {p} ({(kept - 1.0 + p) / sigma:+.1f} standard deviations)"


def _rounding(report: Report) -> tuple[Rounding, ...]:
    """Errors of y in bf16 with adapters in bf16: PEFT's sum of two rounded products, ``addmm_``, and each backend."""
    device = torch.device(report.device)
    inputs = make(_ROUNDING, torch.bfloat16, device, report.seed)
    x, weight, lora_a, lora_b, bias, dy = vars(inputs).values()
    exact = run_reference(torch.float64, x, weight, lora_a, lora_b, bias, dy, SCALING, None, 0.0)["y"]
    base, h = F.linear(x, weight, bias), F.linear(x, lora_a)
    peft = base + F.linear(h, lora_b) * SCALING
    compositions = {"PEFT's composition": peft, "base, then addmm_": base.addmm(h, lora_b.t(), alpha=SCALING)}
    taken = dict.fromkeys(row.backend for row in report.rows if row.dtype == "bf16" and row.passed)
    for name in taken:
        compositions[f"lora_kernels, {name}"] = lora_linear(x, weight, lora_a, lora_b, bias, SCALING, backend=name)
    errors = {n: judge("y", y, exact, peft, torch.bfloat16).error for n, y in compositions.items()}
    return tuple(Rounding(n, error, error / errors["PEFT's composition"]) for n, error in errors.items())
