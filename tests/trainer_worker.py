"""One of several processes of ``test_trainer_distributed.py``: transformers' ``Trainer`` with ``SaveAdapterCallback``.

    python trainer_worker.py FOLDER HOW…

HOW is "ddp", "fsdp1" or "fsdp2"; "ddp" goes first. It trains, resumes from the first checkpoint, and compares; each
process writes what it found to FOLDER/HOW/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lora_kernels
from architectures import made
from lora_kernels import LoRAConfig, load_adapter, replace_linear
from lora_kernels.checkpoint import files
from lora_kernels.trainer import SaveAdapterCallback
from numerics import same_bits

DATA = [{"input_ids": (row := (torch.arange(8) + start) % 16), "labels": row} for start in range(32)]
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def as_gpus() -> None:
    """accelerate shards on GPUs alone, and says nothing: told that these are GPUs, it does so on the CPU."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # what it has found out before

    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)  # type: ignore


def trainer_of(how: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = made("llama")
    replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    lora_kernels.mark_only_lora_as_trainable(model)
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps"}
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    if how != "ddp":
        options |= {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP | {"fsdp_version": int(how[-1])}}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=how == "ddp", seed=0, per_device_train_batch_size=2, ddp_backend="gloo", **options, **quiet
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=DATA, callbacks=[SaveAdapterCallback()])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def adapters(path: Path) -> dict[str, Tensor]:
    """Those of a checkpoint, by way of the plain model."""
    plain = made("llama")
    load_adapter(plain, path)
    return {name: value for name, value in plain.state_dict().items() if "lora_" in name}


def main(how: str, folder: Path) -> None:
    rank, writes = int(os.environ["RANK"]), []
    original = files.write_pair
    files.write_pair = lambda path, *rest: (writes.append(str(path)), original(path, *rest))[1]  # type: ignore
    folder.mkdir(exist_ok=True)
    if how != "ddp":
        as_gpus()
    trainer_of(how, folder / "whole").train()
    found: dict[str, Any] = {"writes": [Path(path).name for path in writes]}
    torch.distributed.barrier()
    again = trainer_of(how, folder / "resumed")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    torch.distributed.barrier()
    first, last, resumed = (
        adapters(folder / place) for place in ("whole/checkpoint-2", "whole/checkpoint-4", "resumed/checkpoint-4")
    )
    found["adapters"] = len(last)
    found["trained"] = any(not same_bits(first[name], value) for name, value in last.items())
    found["resumed to the same bits"] = all(same_bits(resumed[name], value) for name, value in last.items())
    checkpoint = folder / "whole" / "checkpoint-4"
    found["files"] = sorted(path.name for path in checkpoint.iterdir())
    if how == "ddp":
        found["held"] = sorted(load_file(checkpoint / "model.safetensors"))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    files.write_pair = original  # type: ignore


if __name__ == "__main__":
    for how in sys.argv[2:]:
        main(how, Path(sys.argv[1]) / how)
