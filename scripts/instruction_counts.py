"""Instructions that a LoRA layer takes beyond its base product: the native library's beside PyTorch's.

Usage: ``python scripts/instruction_counts.py [--json FILE]``. Needs valgrind. One thread, fp32, in a process of its own
under callgrind, which counts instructions rather than seconds: a busy machine gives the same numbers. For each case it
counts ``F.linear`` (the base), the plain composition (``F.linear``, then ``addmm_`` in place) and the native forward,
each with warm caches, and takes the first from the other two. At 512 tokens the native forward takes PyTorch's own base
product; few tokens are multiplied by its own kernel, so there the difference may be negative.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = [*((m, 1024, 1024, 16) for m in (1, 16, 512)), (512, 1024, 1024, 8), (512, 1024, 1024, 64)]  # M, K, N, R


def main() -> int:
    """Runs the counted process and prints the table; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.counted:
        run_cases()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts = _count(Path(folder))
    rows = []
    for (m, k, n, r), base, plain, native in zip(CASES, counts[0::3], counts[1::3], counts[2::3], strict=True):
        floor = 2 * m * r * (k + n) // 16  # one fused multiply-add on eight lanes is one instruction of 16 flops
        row = {"M": m, "K": k, "N": n, "r": r, "base": base, "addmm_": plain - base, "native": native - base}
        rows.append(row | {"floor": floor})
        beyond = ", ".join(f"{name} {row[name] / 1e6:.2f} M" for name in ("addmm_", "native"))
        print(f"M={m} {k}->{n} r={r}: base {base / 1e6:.1f} M; beyond it {beyond}, floor {floor / 1e6:.2f} M")
    if options.json:
        result = {"tool": "callgrind", "threads": 1, "dtype": "float32", "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run_cases() -> None:
    """What is counted: between two calls of ``_mark`` callgrind writes one profile."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.nn.functional as F

    from lora_kernels import dispatch, ops

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dispatch.select("cpu", torch.float32, "native")
    native = ops.operators("native").forward
    for m, k, n, r in CASES:
        x, weight, lora_a, lora_b = torch.randn(m, k), torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)
        calls = (
            lambda x=x, w=weight: F.linear(x, w),
            lambda x=x, w=weight, a=lora_a, b=lora_b: F.linear(x, w).addmm_(x @ a.t(), b.t()),
            lambda x=x, w=weight, a=lora_a, b=lora_b: native(x, w, a, b, None, 1.0, 0.0, None),
        )
        for call in calls:
            call()
            _control("--instr=on", "--zero")
            call()
            _control("--dump", "--instr=off")


def _control(*arguments: str) -> None:
    for argument in arguments:
        subprocess.run(["callgrind_control", argument, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def _count(folder: Path) -> list[int]:
    """The totals of the profiles that the counted process dumps, in order."""
    environment = os.environ | {"LORA_KERNELS_CPU_PRODUCT": "library", "OMP_NUM_THREADS": "1"}
    environment.pop("LD_PRELOAD", None)
    tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'profile'}"]
    subprocess.run([*tool, sys.executable, __file__, "--counted"], env=environment, cwd=ROOT, check=True)
    profiles = sorted(folder.glob("profile.*"), key=lambda path: int(path.suffix[1:]))
    totals = [re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE) for path in profiles]
    return [int(found[1]) for found in totals if found is not None and int(found[1]) > 0]


if __name__ == "__main__":
    sys.exit(main())
