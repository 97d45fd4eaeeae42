"""``lora-kernels explain``: how a layer of some size runs, here or on a machine that is not here, and why so."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..console import count_of, json_text
from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from ..dispatch import Explanation, Problem

__all__ = ["add_arguments", "run_command"]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32", "fp64": "float64"}
_EXAMPLE = "lora-kernels explain --shape 4096x4096 --tokens 8192 --rank 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels explain``."""
    parser.add_argument("--shape", required=True, metavar="KxN", help="in_features x out_features, such as 4096x4096")
    parser.add_argument("--tokens", required=True, type=int, metavar="M", help="the product of x's batch dimensions")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapter (16)")
    parser.add_argument("--dtype", default="bf16", help=f"one of {', '.join(_DTYPES)}; fp32 with TF32 products is tf32")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="probability (0)")
    parser.add_argument(
        "--machine", metavar="NAME", help="a GPU that need not be here, such as h100; by default this one"
    )
    parser.add_argument("--backend", metavar="NAME", help="by default the one that would run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(args: argparse.Namespace) -> int:
    """Prints the plan of each pass.

    Raises:
        InvalidArgumentError: an option is not what it must be.
        BackendUnavailableError: the named backend cannot run that here.
    """
    import torch

    from .. import dispatch
    from ..accuracy import fp32_products

    problem = _problem(args, "cuda" if args.machine or torch.cuda.is_available() else "cpu")
    dispatch.check_sizes(problem, args.tokens)
    with fp32_products(args.dtype == "tf32") if problem.dtype is torch.float32 else nullcontext():
        if args.machine:
            found = _described(args, problem)
        else:
            with dispatch.use_backend(args.backend) if args.backend else nullcontext():
                found = dispatch.explain(problem, args.tokens)
    here = (
        ""
        if problem.device_type == "cuda"
        else "PyTorch sees no CUDA device: the CPU is explained. For a GPU: --machine"
    )
    if args.json:
        document: dict[str, Any] = {"machine": args.machine, "device": problem.device_type, **found.to_json()}
        print(json_text(document))
    else:
        print("\n".join(filter(None, [here and f"{here} {next(iter(_machines()))}.", str(found)])))
    return 0


def _problem(args: argparse.Namespace, device_type: str) -> Problem:
    import torch

    from ..dispatch import Problem
    from ..gate import check_dropout_p

    if args.dtype not in _DTYPES:
        raise InvalidArgumentError(f"--dtype {args.dtype} was given: it must be one of {', '.join(_DTYPES)}.")
    sides = [count_of(side) for side in args.shape.split("x")]
    if len(sides) != 2 or not all(sides):
        raise InvalidArgumentError(
            f"--shape {args.shape} was given: it must be in_features x out_features, both positive integers below 2^31."
            f" Example: {_EXAMPLE}."
        )
    check_dropout_p(args.dropout)
    dtype, (k, n) = getattr(torch, _DTYPES[args.dtype]), sides
    return Problem(device_type, dtype, k, n, args.rank, args.dropout)


def _machines() -> dict[str, Any]:
    from ..benchmark.roofline import MACHINES

    return MACHINES


def _described(args: argparse.Namespace, problem: Problem) -> Explanation:
    """On a machine of ``roofline.MACHINES``; of the Triton backend with the tuned table that ships for it."""
    import torch

    from ..dispatch import Explanation, backend

    machines = _machines()
    if args.machine not in machines:
        raise InvalidArgumentError(f"--machine {args.machine} was given: it must be one of {', '.join(machines)}.")
    machine, name = machines[args.machine], args.backend or "triton"
    described = f"As {machine.name} is described; nothing is asked of a GPU."
    if name != "triton":
        plans = backend(name, f"--backend {name}").plan(problem, args.tokens)
    else:
        from ..backends.triton import plans_on
        from ..backends.triton.choose import tuned

        if problem.dtype is torch.float64:
            raise InvalidArgumentError(
                "--dtype fp64 was given: the kernels of backend 'triton' accumulate in fp32. Name another dtype, or "
                "--backend native or eager."
            )
        gpu = machine.gpu
        device = tuned.shipped_for(args.machine, gpu.capability, gpu.sm_count)
        table = tuned.Loaded() if device is None else tuned.load(device)
        described += f" Tuned table: {'none ships for it' if device is None else device.name}."
        plans = plans_on(gpu, machine.name, table, problem, args.tokens)
    return Explanation(problem, name, f"--machine {args.machine}", described, {}, args.tokens, plans)
