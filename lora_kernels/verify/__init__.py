"""``lora-kernels verify``: proof, on this machine, that every backend computes what it says.

``cases.py`` holds what is tried, ``checks.py`` runs and judges it, ``interpreted.py`` does so for Triton on a CPU,
``report.py`` is what comes out, ``command.py`` prints it. How wrong a result may be is decided in
``lora_kernels.accuracy`` alone.
"""

from .checks import run
from .report import Report

__all__ = ["Report", "run"]
