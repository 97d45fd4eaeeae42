"""``lora-kernels info``: what is installed, which devices there are, and which backends run on them.

It answers also where something is broken, which is when it is needed: nothing is imported at the top but the standard
library, and every section is collected on its own; one that fails is reported in its place.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from . import __version__
from .env import (
    BACKEND_VARIABLE,
    BUILD_VARIABLE,
    CACHE_VARIABLE,
    CPU_CHOICES,
    DROPOUT_KEEPS_VARIABLE,
    EXPLAIN_VARIABLE,
    GPU_QUANTIZED_VARIABLE,
)
from .errors import InvalidArgumentError
from .processor import processor_name

__all__ = ["add_arguments", "collect", "run_command", "versions"]

PACKAGES = ("torch", "triton", "numpy", "peft", "safetensors", "rich", "matplotlib")
VARIABLES = (
    *(BACKEND_VARIABLE, BUILD_VARIABLE, CACHE_VARIABLE, DROPOUT_KEEPS_VARIABLE, EXPLAIN_VARIABLE, *CPU_CHOICES),
    GPU_QUANTIZED_VARIABLE,
    *("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CXX", "CUDACXX", "CUDA_HOME"),
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
GIB = 2**30


def collect() -> dict[str, Any]:
    """Everything that ``info`` reports, as plain data that JSON can hold.

    Returns:
        A dictionary with the keys ``versions``, ``installation``, ``platform``, ``devices``, ``backends``,
        ``native_library``, ``environment`` and ``tuned_table``. Nothing is compiled for it. A section
        that could not be collected is ``{"error": sentence}``.

    Example:
        >>> from lora_kernels.info import collect
        >>> collect()["backends"]["eager"]["available"]
        True
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "installation": _installation,
        "platform": _platform,
        "devices": _devices,
        "backends": _backends,
        "native_library": _native_library,
        "environment": lambda: {name: os.environ.get(name) for name in VARIABLES},
        "tuned_table": _tuned_table,
    }
    return {name: _guarded(section) for name, section in sections.items()}


def versions() -> dict[str, str | None]:
    """Versions of Python, this package, what it builds on, and CUDA; None is not installed.

    They are read from the packages' metadata, so that a package that cannot be imported still tells its version.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "lora_kernels": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cuda = _guarded(lambda: import_module("torch").version.cuda)
    found["cuda"] = f"unknown: {cuda['error']}" if isinstance(cuda, dict) else cuda
    return found


def _guarded(section: Callable[[], Any]) -> Any:
    try:
        return section()
    except Exception as error:  # noqa: BLE001 (a broken installation raises anything; naming it is the purpose here)
        return {"error": f"{type(error).__name__}: {error}"}


def _installation() -> dict[str, Any]:
    package = Path(__file__).resolve().parent
    try:
        distribution = importlib.metadata.distribution("lora-kernels")
    except importlib.metadata.PackageNotFoundError:
        return {"kind": "checkout, imported without installation", "path": str(package)}
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if Path(str(distribution.locate_file("lora_kernels"))).resolve() == package:
        kind = "installed"
    elif origin.get("dir_info", {}).get("editable"):
        kind = "installed, editable"
    else:
        kind = f"checkout, while lora-kernels {distribution.version} is installed elsewhere"
    return {"kind": kind, "path": str(package)}


def _platform() -> dict[str, str]:
    return {"system": platform.platform(), "machine": platform.machine(), "python": sys.executable}


def _devices() -> list[dict[str, Any]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu: dict[str, Any] = {"device": "cpu", "name": processor_name(), "cores": usable}
    threads = _guarded(lambda: import_module("torch").get_num_threads())
    cpu.update({"torch_threads": threads} if isinstance(threads, int) else threads)
    return [cpu, *([] if "error" in cpu else _guarded_list(_gpus))]


def _guarded_list(section: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = _guarded(section)
    return found if isinstance(found, list) else [{"device": "cuda", **found}]


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _backends() -> dict[str, Any]:
    import torch

    from .dispatch import ORDER

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]

    def one(name: str) -> dict[str, Any]:
        on = {device: _guarded(partial(_on_device, name, device)) for device in devices}
        return {"available": any(answer.get("dtypes") for answer in on.values()), "devices": on}

    return {name: one(name) for name in ORDER}


def _on_device(name: str, device: str) -> dict[str, Any]:
    """The dtypes that backend ``name`` takes on ``device``; the reasons why not, in fp32, where it takes none."""
    import torch

    from .dispatch import Problem, backend

    problems = {short: Problem(device, getattr(torch, long)) for short, long in DTYPES.items()}
    reasons = {short: backend(name).why_not(problem) for short, problem in problems.items()}
    dtypes = [short for short in problems if not reasons[short]]
    if not dtypes:
        return {"dtypes": [], "reasons": reasons["fp32"]}
    first = problems[dtypes[0]]
    return {
        "dtypes": dtypes,
        "description": backend(name).describe(first),
        "only_if_named": backend(name).why_not_automatic(first),
    }


def _native_library() -> dict[str, Any]:
    """Where compiled libraries are kept, and for each of the two its state, path and build; what the CPU's goes by."""
    from .backends.native import cache, choice, load
    from .backends.native.build import KINDS

    def one(kind: str) -> dict[str, Any]:
        found = load.status(kind)
        usable = kind == "cpu" and found["path"] and not found["reasons"]
        return {**found, "instruction_set": load.instruction_set(found["path"]) if usable else None}

    found = {kind: _guarded(partial(one, kind)) for kind in KINDS}
    return {"cache": str(cache.folders()[0]), **found, "cpu_product": _guarded(choice.status)}


def _tuned_table() -> dict[str, Any]:
    """Each GPU's tuned tables: their files, how many rows count, and what is passed over and why."""
    from .backends.triton.choose import tuned

    return tuned.status()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--require", metavar="NAME", help="exit with 1 unless this backend is available")


def run_command(args: argparse.Namespace) -> int:
    """Prints the report; 1 if ``--require`` names a backend that is not available.

    Raises:
        InvalidArgumentError: ``--require`` names a backend that does not exist.
    """
    report = collect()
    backends = report["backends"]
    if args.require is not None and "error" not in backends and args.require not in backends:
        raise InvalidArgumentError(
            f"--require {args.require} was given: the backends are {', '.join(backends)}. Name one of them."
        )
    print(json.dumps(report, indent=2) if args.json else _text(report))
    if args.require is None or backends.get(args.require, {}).get("available"):
        return 0
    print(f"lora-kernels: backend {args.require!r}, which --require names, is not available here.", file=sys.stderr)
    return 1


def _text(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for section, content in report.items():
        lines.append(section.replace("_", " "))
        if section == "backends" and "error" not in content:
            lines += [line for name, backend in content.items() for line in _backend_lines(name, backend)]
        elif section == "native_library" and "error" not in content:
            of_libraries = {name: library for name, library in content.items() if name != "cpu_product"}
            lines += [line for name, library in of_libraries.items() for line in _library_lines(name, library)]
            lines += _product_lines(content["cpu_product"])
        elif section == "environment" and "error" not in content:
            lines += _environment_lines(content)
        elif section == "tuned_table" and "error" not in content:
            lines += _table_lines(content)
        elif isinstance(content, dict):
            lines += [f"  {key:<21} {value}" for key, value in _told(content)]
        elif isinstance(content, list):
            lines += [f"  {_device_line(device)}" for device in content]
        else:
            lines.append(f"  {content}")
    return "\n".join(lines)


def _told(content: dict[str, Any]) -> list[tuple[str, Any]]:
    absent = {"cuda": "none: a CPU build of PyTorch"}
    return [(key, absent.get(key, "not installed") if value is None else value) for key, value in content.items()]


def _environment_lines(variables: dict[str, str | None]) -> list[str]:
    """The variables that are set, and the names of the others."""
    width = max(21, *(len(name) for name, value in variables.items() if value is not None), 0)
    lines = [f"  {name:<{width}} {value}" for name, value in variables.items() if value is not None]
    unset = [name for name, value in variables.items() if value is None]
    return [*lines, *([f"  {'not set':<22}{', '.join(unset)}"] if unset else [])]


def _device_line(device: dict[str, Any]) -> str:
    units = {"cores": "cores", "torch_threads": "threads in PyTorch", "memory_gib": "GiB", "multiprocessors": "SMs"}
    parts = [str(device.get("name", "")), f"capability {device['capability']}" if "capability" in device else ""]
    parts += [f"{device[key]} {unit}" for key, unit in units.items() if key in device]
    parts.append(device.get("error", ""))
    return f"{device['device']:<22}{', '.join(part for part in parts if part)}"


def _backend_lines(name: str, backend: dict[str, Any]) -> list[str]:
    lines = []
    for device, answer in backend["devices"].items():
        if answer.get("dtypes"):
            told = f"available: {', '.join(answer['dtypes'])}. {answer['description']}"
            told += "".join(f" Runs only if named: {reason}" for reason in answer["only_if_named"])
        else:
            told = f"not available: {answer.get('error') or ' '.join(answer['reasons'])}"
        lines.append(f"  {f'{name} on {device}':<22}{told}")
    return lines


def _library_lines(name: str, library: Any) -> list[str]:
    if isinstance(library, str) or "error" in library:
        return [f"  {name:<22}{library if isinstance(library, str) else library['error']}"]
    told = [f"{library['state']}{': ' if library['path'] else ''}{library['path'] or ''}"]
    if build := library["build"]:
        told.append(f"compiled {build['date']} by {build['compiler_version']} ({build['compiler']})")
        told.append(f"for {build['platform']}, {build['c_library']}: {', '.join(build['capabilities'])}")
        told.append(f"against torch {build['torch']}; any torch from 2.11 on loads it")
        if runs := library["instruction_set"]:
            obstacle = f"; amx does not: {runs['amx_obstacle']}" if runs["amx_obstacle"] else ""
            told.append(f"{runs['capability']} runs here{obstacle}")
    elif not library["reasons"]:
        told.append(f"by {library['compiler']}; `lora-kernels build {name}` does it beforehand")
    told += [*library["reasons"], *library["passed_over"]]
    return [f"  {name:<22}{told[0]}", *(f"  {'':<22}{line}" for line in told[1:])]


def _product_lines(product: dict[str, Any]) -> list[str]:
    """Who decides whether the CPU library or PyTorch multiplies by W."""
    by = product.get("decided_by")
    told = {
        None: "there is no library yet",
        "environment": "chosen by LORA_KERNELS_CPU_PRODUCT",
        "table": f"chosen by {product.get('used')} of {product.get('rows')} measured rows of {product.get('path')}",
        "model": "chosen by a model of the CPU; `lora-kernels tune --device cpu` measures instead",
    }
    lines = [product.get("error") or f"x W^T by the library's own code or by PyTorch's: {told[by]}"]
    if machine := product.get("machine"):
        lines.append(f"for {', '.join(f'{name} {value}' for name, value in machine.items())}")
    lines += product.get("passed_over", [])
    return [f"  {'cpu product':<22}{lines[0]}", *(f"  {'':<22}{line}" for line in lines[1:])]


def _table_lines(tables: dict[str, Any]) -> list[str]:
    lines = [f"  {'shipped':<22}{', '.join(tables['shipped']) or 'none'}"]
    lines.append(f"  {'folder':<22}{tables['user_folder'] or 'none: there is no home folder'}")
    if not tables["devices"]:
        lines.append(f"  {'in use':<22}none: PyTorch sees no CUDA device")
    alike: dict[tuple[str, ...], list[str]] = {}
    for device in tables["devices"]:
        counts = ", ".join(f"{count} of {direction}" for direction, count in device["directions"].items())
        told = [f"{device['name']}: {device['cells']} cells were measured ({counts}), the model chooses for the others"]
        if not device["cells"]:
            told = [f"none for {device['name']}: a model of the device chooses. `lora-kernels tune` measures"]
        for file in device["files"]:
            told.append(f"{file['origin']}: {file['path']}, {file['used']} of {file['rows']} rows count")
            told += [f"measured with {versions}" for versions in file["measured_with"]]
            told += file["passed_over"]
        alike.setdefault(tuple(told), []).append(device["device"])
    for told_of, names in alike.items():
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        lines += [f"  {label:<22}{told_of[0]}", *(f"  {'':<22}{line}" for line in told_of[1:])]
    return lines
