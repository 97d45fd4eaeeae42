"""Programs that ``torch.export`` has saved, loaded by another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from documents import ROOT
from lora_kernels import FusedLoRALinear, LoRAConfig, register_operators, replace_linear, use_backend

RUN = """
import sys, torch, lora_kernels
with lora_kernels.use_backend(sys.argv[1] or None):
    print(*lora_kernels.register_operators())
for path in sys.argv[2:]:
    x, y = torch.load(path.replace(".pt2", ".pt"))
    assert torch.equal(torch.export.load(path).module()(x), y), path
"""


def of_codes() -> list[nn.Module]:
    """Some whose values the packages make, which the other process has not imported either."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lora-kernels[quant]'")
    from quantised import KINDS, quantised

    kinds = [kind for kind in ("nf4", "ao-int8", "ao-nvfp4") if kind in KINDS]
    models = [nn.Sequential(quantised(kind, 64, 32, torch.float32)) for kind in kinds]
    for model in models:
        replace_linear(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights=False))
    return models


@pytest.mark.parametrize("backend", ["", "eager"])
def test_another_process_loads_a_program(backend: str, tmp_path: Path) -> None:
    """It names operators and imports nothing; they were registered at a layer's first call alone."""
    options: dict[str, Any] = {"r": 4, "init_lora_weights": False}
    models = [FusedLoRALinear(64, 32, **options), FusedLoRALinear(64, 32, use_dora=True, **options)]
    for i, model in enumerate([*models, *of_codes()]):
        x = torch.randn(5, 64)
        with use_backend(backend or None), torch.no_grad():
            program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
            torch.export.save(program, tmp_path / f"{i}.pt2")
            x = torch.randn(9, 64)
            # Loaded here too: memory that lies otherwise may give PyTorch's products other bits.
            torch.save((x, torch.export.load(tmp_path / f"{i}.pt2").module()(x)), tmp_path / f"{i}.pt")
    files = sorted(map(str, tmp_path.glob("*.pt2")))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, backend, *files], capture_output=True, text=True, env=env, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "eager"


def test_a_device_without_backends_of_its_own_has_the_operators_of_eager() -> None:
    assert register_operators(torch.device("meta")) == ("eager",)
