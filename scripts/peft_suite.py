"""PEFT's own test suite with every LoRA linear fused, beside the same suite on stock PEFT.

Usage: ``python scripts/peft_suite.py ARCHIVE [FILE ...] [--json FILE] [--resume] [--hub FOLDER]``. ARCHIVE is the
source distribution of the installed PEFT, which holds its tests: ``pip download --no-deps --no-binary :all:
--no-build-isolation peft==VERSION``. FILE is one of its test files, by default ``test_custom_models.py``; further
arguments after ``--`` go to pytest. Nothing of PEFT is edited: its official hook for custom layers is called on each
``LoraConfig`` that a test makes, so that PEFT builds fused layers wherever it would build its ``lora.Linear``
(``with_fused_layers``).

The result holds, for each file, the outcomes of both runs, the tests that pass on stock PEFT alone (there must be none:
the exit status says so), and how many calls were fused, with the reasons for the others. Tests that load models from
the network fail in both runs where there is none; with ``--hub`` they find models of our own in that folder, which is
filled where it has to be (``peft_hub.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import peft_hub  # noqa: E402  (after the path)

WORK = ROOT / "out" / "peft-suite"  # git ignores it
KIND, OUTCOMES = "LORA_KERNELS_PEFT_SUITE", "LORA_KERNELS_PEFT_OUTCOMES"
HUB = "LORA_KERNELS_PEFT_HUB"
STOCK, FUSED = "stock", "fused"

_outcomes: dict[str, str] = {}
_calls: Counter[str] = Counter()


def main(arguments: list[str]) -> int:
    """Runs each file in both ways and writes what is known after each; 1 if fusing lost a test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archive", type=Path, help="peft-VERSION.tar.gz")
    parser.add_argument("files", nargs="*", default=["test_custom_models.py"], metavar="FILE")
    parser.add_argument("--json", type=Path, default=WORK / "result.json", metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON has, and run what it has not")
    parser.add_argument("--hub", type=Path, metavar="FOLDER", help="a cache of small models in place of the network")
    own, theirs = (
        (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        if "--" in arguments
        else (arguments, [])
    )
    chosen = parser.parse_args(own)
    suite = unpack(chosen.archive)
    if chosen.hub:
        peft_hub.fill(chosen.hub)
    result = json.loads(chosen.json.read_text()) if chosen.resume and chosen.json.exists() else {"files": {}}
    result |= described()
    for name in chosen.files:
        if name in result["files"]:
            continue
        stock, fused = (run(suite, name, kind, theirs, chosen.hub) for kind in (STOCK, FUSED))
        if stock is None or fused is None:
            print(f"{name} did not run: see its logs in {WORK}.", flush=True)
            continue
        result["files"][name] = {"arguments": theirs, "hub": bool(chosen.hub)} | compared(stock, fused)
        result["total"] = added(list(result["files"].values()))
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(result['files'][name])}", flush=True)
    if not result["files"]:
        return 1
    print(json.dumps(result["total"]))
    return 1 if result["total"]["lost"] else 0


def unpack(archive: Path) -> Path:
    """The unpacked source distribution, its tests importable."""
    with tarfile.open(archive) as tar:
        tar.extractall(WORK, filter="data")
    suite = WORK / archive.name.removesuffix(".tar.gz")
    (suite / "tests" / "__init__.py").touch()
    installed = metadata.version("peft")
    if suite.name != f"peft-{installed}":
        sys.exit(f"{archive.name} was given and peft {installed} is installed: take the archive of that release.")
    return suite


def described() -> dict[str, Any]:
    """Versions and commit."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    versions = {name: metadata.version(name) for name in ("peft", "transformers", "torch")}
    return {"versions": versions | {"python": platform.python_version()}, "commit": head.stdout.strip()}


def run(suite: Path, name: str, kind: str, arguments: list[str], hub: Path | None) -> dict[str, Any] | None:
    """One file in a process of its own: outcomes by test, calls by path, seconds; None where it could not start."""
    outcomes = WORK / f"{kind}.json"
    outcomes.unlink(missing_ok=True)
    paths = [str(ROOT / "scripts"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, KIND: kind, OUTCOMES: str(outcomes), "PYTHONPATH": os.pathsep.join(paths)}
    if hub:
        environment |= {HUB: "1", **peft_hub.environment(hub)}
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite", "-p", "no:cacheprovider", "-o", "addopts=", "-q"]
    command += ["--tb=short", f"tests/{name}", *arguments]
    began = time.monotonic()
    with (WORK / f"{kind}-{name}.log").open("w") as log:
        subprocess.run(command, cwd=suite, env=environment, stdout=log, stderr=subprocess.STDOUT)
    found = json.loads(outcomes.read_text()) if outcomes.exists() else {"outcomes": {}}
    if not found["outcomes"]:
        return None
    return {**found, "seconds": round(time.monotonic() - began)}


def compared(stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
    """Both runs' numbers, and the tests whose outcome differs."""

    def passing(run: dict[str, Any]) -> set[str]:
        return {test for test, outcome in run["outcomes"].items() if outcome == "passed"}

    def summary(run: dict[str, Any]) -> dict[str, int]:
        return {**dict(sorted(Counter(run["outcomes"].values()).items())), "seconds": run["seconds"]}

    return {
        STOCK: summary(stock),
        FUSED: summary(fused),
        "lost": sorted(passing(stock) - passing(fused)),
        "gained": sorted(passing(fused) - passing(stock)),
        "calls": fused["calls"],
    }


def added(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all files, and the share of the calls with an acting adapter that were fused."""
    calls = sum((Counter(file["calls"]) for file in files), Counter())
    acted = sum(calls.values()) - calls["base"]
    return {
        **{kind: dict(sum((Counter(file[kind]) for file in files), Counter())) for kind in (STOCK, FUSED)},
        "lost": sum(len(file["lost"]) for file in files),
        "gained": sum(len(file["gained"]) for file in files),
        "calls": dict(calls.most_common()),
        "share_fused": round(calls["fused"] / acted, 4) if acted else None,
    }


def pytest_configure(config: Any) -> None:
    """As pytest's plugin: fuses what PEFT builds from now on, and counts all calls in one place."""
    if os.environ.get(KIND) != FUSED:
        return
    import peft

    from lora_kernels.peft import layer, with_fused_layers

    prepare = peft.LoraConfig.__post_init__

    def prepare_fused(self: Any) -> None:
        prepare(self)
        with_fused_layers(self)

    peft.LoraConfig.__post_init__ = prepare_fused
    setattr(layer, "counter", lambda module: _calls)  # noqa: B010


def pytest_collection_finish(session: Any) -> None:
    """As pytest's plugin, with a hub of our own: no test of PEFT looks for another one."""
    if HUB in os.environ and (theirs := sys.modules.get("tests.testing_utils")):
        setattr(theirs, "_HUB_MODEL_ACCESSES", peft_hub.Visited())  # noqa: B010


def pytest_runtest_logreport(report: Any) -> None:
    """A test has the worst outcome of its parts."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.outcome == "skipped" else report.outcome
        if _outcomes.get(report.nodeid) != "failed":
            _outcomes[report.nodeid] = outcome


def pytest_sessionfinish(session: Any) -> None:
    """Leaves the outcomes where the other process looks for them."""
    if path := os.environ.get(OUTCOMES):
        Path(path).write_text(json.dumps({"outcomes": _outcomes, "calls": dict(_calls)}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
