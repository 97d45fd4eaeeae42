"""Starts once what is slow the first time on a fresh GPU machine, each in a process of its own, all at once.

NCCL's first start took 105 s on an H100, the compiler's 30 s: most of it reads libraries that no page cache has yet.
Begun while other things are built and tested, it costs next to nothing. ``--json FILE``: seconds of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STARTS = {
    "nccl": """
import tempfile, torch, torch.distributed as dist
from pathlib import Path
with tempfile.TemporaryDirectory() as folder:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(8, device="cuda"))
    torch.cuda.synchronize()
    dist.destroy_process_group()
""",
    "compiler": """
import torch
x = torch.randn(32, 32, device="cuda", requires_grad=True)
torch.compile(lambda x: (x @ x).relu().sum(), fullgraph=True)(x).backward()
torch.cuda.synchronize()
""",
    "imports": """
import importlib.util
import lora_kernels.benchmark.runner, lora_kernels.verify.checks
[__import__(name) for name in ("transformers", "peft", "hypothesis") if importlib.util.find_spec(name)]
""",
}


def started(code: str) -> dict[str, float | int]:
    """Seconds and exit status of a process that runs ``code``."""
    began = time.monotonic()
    status = subprocess.run([sys.executable, "-c", code]).returncode
    return {"seconds": round(time.monotonic() - began, 1), "status": status}


def run(path: Path, starts: dict[str, str] = STARTS) -> int:
    """All of them at once; 0 if each ended well."""
    with ThreadPoolExecutor(len(starts)) as pool:
        found = dict(zip(starts, pool.map(started, starts.values()), strict=True))
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 1 if any(entry["status"] for entry in found.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the seconds there")
    return run(parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
