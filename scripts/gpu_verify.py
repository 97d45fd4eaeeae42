"""``lora-kernels verify`` on a GPU in many processes: most of its time compiles kernels, one core each.

``python scripts/gpu_verify.py --json FILE``: one document, the reports of all parts by name, written anew as each is
done; so a run that is stopped keeps those that were, and the next one goes on with the parts that have not passed. A
part is a dtype, a backend, and, of Triton, every so-manieth case. With ``--quantized`` it is a dtype, Triton, a form of
W, and whose kernels read it; one whose package is missing is left out, and told. Exit status: 0 if all passed, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

SHARES = 4  # of the cases, in which Triton's part of a dtype is cut
PARTS = (
    *(f"{dtype} triton {i}/{SHARES}" for dtype in ("bf16", "fp16", "fp32") for i in range(SHARES)),
    *(f"{dtype} {backend}" for dtype in ("bf16", "fp16", "fp32", "fp64") for backend in ("native", "eager")),
)
FORMS = ("nf4", "nf4-nested", "fp4", "int8", "fp8", "torchao-int8")
QUANTIZED = (
    *(f"bf16 triton {form} own" for form in FORMS),
    *("fp16 triton nf4 own", "fp16 triton fp8 own", "fp32 triton nf4 own"),
    *(f"bf16 triton {form} package" for form in ("nf4", "int8", "fp8")),
)
COMMAND = (sys.executable, str(Path(__file__).resolve()), "--part")
PROCESSES = 16


def verify_part(part: str) -> dict[str, Any]:
    """The report of one part, in this process."""
    from lora_kernels.env import GPU_QUANTIZED_VARIABLE
    from lora_kernels.errors import LoRAKernelsError, MissingExtraError
    from lora_kernels.verify import cases, checks

    dtype, backend, *share = part.split()
    weights = None
    if len(share) == 2:
        weights, os.environ[GPU_QUANTIZED_VARIABLE] = share[:1], share[1]
    elif share:
        i, of = map(int, share[0].split("/"))
        vars(checks)["CASES"] = cases.CASES[i::of]
    try:
        return checks.run([backend], [dtype], weights=weights).to_dict()
    except MissingExtraError as error:
        return {"passed": True, "left_out": str(error)}
    except LoRAKernelsError as error:
        return {"passed": False, "failures": [{"backend": backend, "sentence": str(error)}]}


def report_of(part: str, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """What a process printed of a part; where it printed no report, its exit status."""
    with tempfile.TemporaryFile() as printed:
        status = subprocess.run([*command, part], stdout=printed).returncode
        printed.seek(0)
        try:
            report: dict[str, Any] = json.loads(printed.read())
        except ValueError:
            report = {"passed": False, "failures": [{"sentence": f"it ended with status {status} and no report"}]}
    return report


def passed_before(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    """The reports of ``parts`` that an earlier run left in the file and that passed."""
    try:
        found = json.loads(path.read_text())["reports"]
    except (OSError, ValueError, KeyError):
        return {}
    return {part: report for part, report in found.items() if part in parts and report["passed"]}


def run(path: Path, parts: Sequence[str] = PARTS, command: Sequence[str] = COMMAND) -> int:
    """All parts that have not passed yet, side by side."""
    reports = passed_before(path, parts)

    def write() -> bool:
        passed = all(part in reports and reports[part]["passed"] for part in parts)
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_text(json.dumps({"passed": passed, "planned": list(parts), "reports": reports}) + "\n")
        partial.replace(path)
        return passed

    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(report_of, part, command): part for part in parts if part not in reports}
        for done in as_completed(waiting):
            reports[waiting[done]] = done.result()
            write()
    return 0 if write() else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    what.add_argument("--part", choices=(*PARTS, *QUANTIZED), help="verify that one here, and print its report")
    parser.add_argument("--quantized", action="store_true", help="quantised weights in the place of plain ones")
    args = parser.parse_args()
    if args.part is not None:
        report = verify_part(args.part)
        print(json.dumps(report))
        return 0 if report["passed"] else 1
    return run(args.json, QUANTIZED if args.quantized else PARTS)


if __name__ == "__main__":
    sys.exit(main())
