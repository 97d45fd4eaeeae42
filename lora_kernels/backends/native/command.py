"""``lora-kernels build``: compiles the native library for this machine into the user's cache."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from ...console import json_text
from ...errors import BackendUnavailableError
from .build import KINDS, LOG_NAME
from .load import compile_into_cache
from .toolchain import BuildError, find_compiler

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels build``."""
    parser.add_argument(
        "library",
        nargs="?",
        choices=[*KINDS, "all"],
        help="which one; by default cpu, and where PyTorch is a CUDA build launch, and cuda where nvcc is there",
    )
    parser.add_argument("--force", action="store_true", help="compile even if the cache has it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(args: argparse.Namespace) -> int:
    """Compiles, and prints each library's path, log and time.

    Raises:
        BackendUnavailableError: at least one could not be compiled; the others are in the cache.
    """
    kinds = KINDS if args.library == "all" else (args.library,) if args.library else _default_kinds()
    report: dict[str, Any] = {}
    failures: list[BackendUnavailableError] = []
    for kind in kinds:
        try:
            report[kind] = _build(kind, args.force)
        except BackendUnavailableError as error:
            failures.append(error)
            continue
        if not args.json:
            print(_text(kind, report[kind]))
    if args.json:
        print(json_text(report))
    if failures:
        raise BackendUnavailableError(" ".join(str(error) for error in failures)) from failures[0]
    return 0


def _default_kinds() -> tuple[str, ...]:
    if torch.version.cuda is None:
        return ("cpu",)
    try:
        find_compiler("cuda")
    except BuildError as error:
        print(f"build: cuda is left out: {error}", file=sys.stderr)
        return ("cpu", "launch")
    return KINDS


def _build(kind: str, force: bool) -> dict[str, Any]:
    start = time.monotonic()
    library = compile_into_cache(kind, force)
    return {
        "path": str(library.path),
        "log": str(library.path.parent / LOG_NAME),
        "seconds": round(time.monotonic() - start, 1),
        "compiled": library.origin == "compiled just now",
        "build": library.info,
    }


def _text(kind: str, built: dict[str, Any]) -> str:
    how = f"compiled in {built['seconds']} s" if built["compiled"] else "was in the cache (--force compiles it again)"
    by = f"by {built['build']['compiler_version']} for {', '.join(built['build']['capabilities'])}"
    return f"{kind}: {built['path']}\n  {how}, {by}\n  log: {built['log']}"
