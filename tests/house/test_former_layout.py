"""What was pickled by the former layout of the package, where modules had other names, loads and computes the same.

``tests/data/former_layout.pickle`` was written by ``python tests/house/test_former_layout.py FILE`` at commit efcadad,
with PyTorch 2.13: for each case the model as ``torch.save`` wrote it, its input and its output.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRAGroup, FusedLoRALinear, LoRAConfig

STORED = Path(__file__).resolve().parents[1] / "data" / "former_layout.pickle"


def layer(**options: Any) -> nn.Module:
    return disturbed(FusedLoRALinear(6, 5, r=2, **options))


def disturbed(model: nn.Module) -> nn.Module:
    """With small integers for parameters, so that every sum is exact on every machine; DoRA's gains are 2."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
        if (magnitude := getattr(model, "lora_magnitude_vector", None)) is not None:
            whole = model.weight + model.scaling * model.lora_B @ model.lora_A
            magnitude.copy_(2 * whole.square().sum(1).sqrt())
    return model


def replaced(**options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    lora_kernels.replace_linear(model, LoRAConfig(r=2, target_modules=["0", "2"], **options))
    return disturbed(model)


def merged() -> nn.Module:
    model = replaced()
    lora_kernels.merge_lora(model)
    return model


def conv1d() -> nn.Module:
    model = nn.Sequential(pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6))
    lora_kernels.replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    return disturbed(model)


def group() -> nn.Module:
    return disturbed(FusedLoRAGroup([FusedLoRALinear(6, 5, r=2), FusedLoRALinear(6, 4, r=4)]))


def shared() -> nn.Module:
    model = nn.Sequential(replaced())
    lora_kernels.share_inputs(model, [["0", "2"]])
    return model


def fused() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    lora_kernels.fuse_peft(model)
    return disturbed(model)


CASES: dict[str, Callable[[], nn.Module]] = {
    "layer": layer,
    "dora": lambda: layer(use_dora=True),
    "pissa": lambda: layer(init_lora_weights="pissa"),
    "lora_bias": lambda: layer(lora_bias=True),
    "activation": lambda: layer(activation="relu"),
    "replaced": lambda: replaced(bias="lora_only", modules_to_save=["1"]),
    "merged": merged,
    "conv1d": conv1d,
    "group": group,
    "shared": shared,
    "fused": fused,
}


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), lora_kernels.use_backend("eager"):
        y = model(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


def main(path: str) -> None:
    stored = {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        model, x, file = make().eval(), torch.randint(-2, 3, (3, 6)).float(), io.BytesIO()
        torch.save(model, file)
        stored[name] = (file.getvalue(), x.tolist(), [y.tolist() for y in outputs(model, x)])
    Path(path).write_bytes(pickle.dumps(stored))


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_former_layout_loads_and_computes_the_same(name: str) -> None:
    for module in {"conv1d": ["transformers"], "fused": ["peft"]}.get(name, []):
        pytest.importorskip(module)
    data, x, expected = pickle.loads(STORED.read_bytes())[name]
    model = torch.load(io.BytesIO(data), weights_only=False)
    found = outputs(model, torch.tensor(x))
    assert [y.tolist() for y in found] == expected


def test_the_former_layout_s_file_has_every_case() -> None:
    assert set(pickle.loads(STORED.read_bytes())) == set(CASES)


if __name__ == "__main__":
    main(sys.argv[1])
