"""Checks that several processes run at once (``distributed_worker.py``): FSDP2 around quantised weights, bit for bit.

The quantised layers are on CPUs, and two processes show what there is to see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_kernels
from lora_kernels import LoRAConfig, replace_linear
from lora_kernels.errors import LoRAStateError
from quantised import OTHERS, quantised

STORED = {"nf4 in fp32": torch.float32, "nf4 in bf16": torch.bfloat16, "nf4 in bytes": torch.uint8}


def _base(kind: str) -> Any:
    torch.manual_seed(0)
    options = {"quant_storage": STORED[kind]} if kind in STORED else {}
    name = "nf4-nested" if kind in STORED else kind
    return nn.Sequential(*(quantised(name, 64, 64, torch.float32, **options) for _ in range(2)))


def _model(kind: str) -> Any:
    model = _base(kind)
    replace_linear(model, LoRAConfig(r=4, target_modules=["0", "1"]))
    return _started(model)


def _started(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
        parameter.requires_grad_("lora_" in name)
    return model


def _sharded(model: Any, layers: Any, **options: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _step(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(x)
    y.sum().backward()
    whole = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in whole.items()}


def _check_same(model: Any, layers: Any) -> None:
    x = torch.randn(8, 64)
    alone = {name: value.clone() for name, value in _step(model, x).items()}
    model.zero_grad()
    _sharded(model, layers)
    for _ in range(2):  # the second pass after the weights were sharded again
        found = _step(model, x)
        model.zero_grad()
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], value) for name, value in alone.items())


def _check_kind(kind: str, folder: Path) -> None:
    model = _model(kind)
    plain = _base(kind)
    x = torch.randn(8, 64)
    expected = model(x).detach()
    _check_same(model, list(model))
    lora_kernels.save_adapter(model, folder / kind)
    dist.barrier()
    lora_kernels.load_adapter(plain, folder / kind)
    assert torch.equal(plain(x), expected)


def check_nf4_in_fp32_under_fsdp2(device: str, folder: Path) -> None:
    _check_kind("nf4 in fp32", folder)


def check_nf4_in_bf16_under_fsdp2(device: str, folder: Path) -> None:
    _check_kind("nf4 in bf16", folder)


def check_nf4_in_bytes_under_fsdp2(device: str, folder: Path) -> None:
    _check_kind("nf4 in bytes", folder)


def check_int8_under_fsdp2(device: str, folder: Path) -> None:
    _check_kind("int8", folder)


def check_fp8_under_fsdp2(device: str, folder: Path) -> None:
    if "fp8" in OTHERS:  # else this transformers has none
        _check_kind("fp8", folder)


class _Attention(nn.Module):
    """q and k read one x, and FSDP2 gathers them together."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj = _base(kind)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_proj(hidden_states) * self.k_proj(hidden_states)


def check_quantised_layers_of_one_x_run_together_under_fsdp2(device: str, folder: Path) -> None:
    for kind in ("nf4 in bf16", "int8"):
        model: Any = _Attention(kind)
        replace_linear(model, LoRAConfig(r=4, target_modules=["q_proj", "k_proj"]))
        _check_same(_started(model), [])
        assert not model.q_proj._shared[0]._pending  # each output was taken: one left over would end the group


def check_peft_over_quantised_weights_under_fsdp2(device: str, folder: Path) -> None:
    peft = pytest.importorskip("peft")

    model: Any = peft.get_peft_model(_base("nf4 in fp32"), peft.LoraConfig(r=4, target_modules=["0", "1"]))
    _started(model)
    lora_kernels.fuse_peft(model)
    _check_same(model, list(model.base_model.model))
    assert lora_kernels.peft.calls(model).own == {}


def check_quantised_weights_are_not_merged_under_fsdp2(device: str, folder: Path) -> None:
    model = _model("nf4 in fp32")
    _sharded(model, list(model))
    for quantize in (False, True):
        with pytest.raises(LoRAStateError, match="quantize=True" if not quantize else "merge it on the plain model"):
            lora_kernels.merge_lora(model, quantize=quantize)


def check_mixed_precision_of_quantised_weights_is_refused(device: str, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for stored, cast in (("nf4 in fp32", torch.bfloat16), ("nf4 in bf16", torch.float16)):
        model = _model(stored)
        _sharded(model, list(model), mp_policy=MixedPrecisionPolicy(param_dtype=cast))
        with pytest.raises(LoRAStateError, match="bnb_4bit_quant_storage"):
            model(torch.randn(8, 64))


def check_torchaos_tensors_are_whole_under_fsdp2(device: str, folder: Path) -> None:
    """They cannot be split, and say so; as ``ignored_params``, kept whole in each process, they work."""
    for kind in ("ao-int8", "ao-float8"):
        if kind not in OTHERS:  # this torchao has others
            continue
        with pytest.raises(NotImplementedError, match="attempting to run unimplemented operator"):
            _sharded(_model(kind), [])
        model, x = _model(kind), torch.randn(8, 64)
        alone = {name: value.clone() for name, value in _step(model, x).items()}
        model.zero_grad()
        _sharded(model, [], ignored_params={layer.weight for layer in model})
        found = _step(model, x)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], value) for name, value in alone.items())
