"""LoRAFusion's split into kernels, rebuilt from its description: a rival of ``lora-kernels bench``, in no wheel.

``lora_kernels.benchmark.rebuilt`` finds this folder beside the package and loads it from there.

============ ===========================================================
``layer``    the layer, forward and backward, and where it cannot run
``kernels``  device code of forward; ``backward``: that of backward
============ ===========================================================
"""

from .layer import build, why_not

__all__ = ["build", "why_not"]
