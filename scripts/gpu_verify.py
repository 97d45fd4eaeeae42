"""``lora-kernels verify`` on a GPU, a process for each dtype: most of its time compiles kernels, one core each.

``python scripts/gpu_verify.py --json FILE``: writes one document, the dtypes' reports by name, anew as each is done; so
a run that is stopped keeps those that were. Exit status: 0 if all passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp16", "fp32", "fp64")
COMMAND = (sys.executable, "-m", "lora_kernels", "verify", "--json", "--dtype")


def report_of(dtype: str, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """What ``verify`` printed for one dtype; where it printed no report, its exit status."""
    with tempfile.TemporaryFile() as printed:
        status = subprocess.run([*command, dtype], stdout=printed).returncode
        printed.seek(0)
        try:
            report: dict[str, Any] = json.loads(printed.read())
        except ValueError:
            report = {"passed": False, "failures": [{"sentence": f"it ended with status {status} and no report"}]}
    return report


def run(path: Path, dtypes: Sequence[str] = DTYPES, command: Sequence[str] = COMMAND) -> int:
    """All dtypes side by side."""
    reports: dict[str, Any] = {}
    with ThreadPoolExecutor(len(dtypes)) as pool:
        waiting = {pool.submit(report_of, dtype, command): dtype for dtype in dtypes}
        for done in as_completed(waiting):
            reports[waiting[done]] = done.result()
            passed = len(reports) == len(dtypes) and all(report["passed"] for report in reports.values())
            partial = path.with_name(f"{path.name}.tmp")
            partial.write_text(json.dumps({"passed": passed, "planned": list(dtypes), "reports": reports}) + "\n")
            partial.replace(path)
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the reports there")
    return run(parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
