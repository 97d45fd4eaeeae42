"""The command line: ``lora-kernels COMMAND …``, the same as ``python -m lora_kernels COMMAND …``.

A command is a module with ``add_arguments(parser)`` and ``run_command(args) -> exit status``. Only the module of the
command that was given is imported, so ``lora-kernels info`` works where PyTorch does not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper

from . import __version__
from .errors import LoRAKernelsError

__all__ = ["main"]

ERROR, INTERRUPTED, CLOSED = 2, 130, 141


@dataclass(frozen=True)
class Command:
    """Where a command lives: ``module`` below ``lora_kernels`` has ``add_arguments`` and the function ``runner``."""

    help: str
    module: str
    runner: str = "run_command"


COMMANDS = {
    "info": Command("versions, devices, and each backend: available, or why not and what to do", "info"),
    "verify": Command("the output and every gradient of every backend, against float64", "verify.command"),
    "bench": Command(
        "side by side with PEFT, addmm_, torch.compile and the frozen nn.Linear", "benchmark.command", "run"
    ),
    "explain": Command(
        "how a layer of some size runs, measured or predicted, and why not otherwise", "explaining.command"
    ),
    "tune": Command("measure the ways to run your shapes on this device, and store the fastest", "tuning.command"),
    "demo": Command("the worked example: pre-train a small model, fine-tune one layer by LoRA", "demo.command"),
    "build": Command("compile the native library for this machine into the user's cache", "backends.native.command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes ``sys.argv``.

    Returns:
        0 if all is well; 1 if a check failed (``verify``, ``demo``, ``info --require``); 2 for a bad argument, with one
        sentence on stderr; 130 if interrupted; 141 if nobody reads the output any more.

    Example:
        >>> from lora_kernels.cli import main
        >>> main(["--version"])
        lora-kernels 0.1.0
        0
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return CLOSED
    return status


def _run(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow that the terminal's encoding lacks ends no run
    try:
        parser = _parser(arguments)
        if not arguments:
            parser.print_help()
            return 0
        args = parser.parse_args(arguments)
        command = COMMANDS[args.command]
        status: int = getattr(import_module(f"{__package__}.{command.module}"), command.runner)(args)
        return status
    except SystemExit as stop:  # argparse has printed the help or the error
        return stop.code if isinstance(stop.code, int) else ERROR
    except LoRAKernelsError as error:
        print(f"lora-kernels: {error}", file=sys.stderr)
        return ERROR
    except ImportError as error:
        if (error.name or "").startswith("lora_kernels"):
            raise
        print(f"lora-kernels: an import failed ({error}). `lora-kernels info` tells what is there.", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("lora-kernels: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-kernels",
        description="LoRA layers at nearly the cost of the frozen nn.Linear: look at the installation, check the "
        "gradients, measure and tune the speed, see an example.",
        epilog="lora-kernels COMMAND --help tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=f"{name}: {command.help}.")
        if list(arguments[:1]) == [name]:
            import_module(f"{__package__}.{command.module}").add_arguments(subparser)
    return parser
