"""transformers' ``Trainer``, and those that derive from it: fused layers, and checkpoints without the base."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pissa, storage
from .checkpoint import save_adapter
from .errors import LoRAKernelsWarning, MissingExtraError
from .models.layers import adapter_parameters, expert_layers, lora_layers
from .peft import FuseReport, fuse_peft
from .sharded import is_sharded

__all__ = ["FusePeftCallback", "SaveAdapterCallback"]

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        f"lora_kernels.trainer is for transformers' Trainer, and transformers cannot be imported ({error}). Run: pip "
        'install "lora-kernels[examples]".'
    ) from error

_WEIGHTS = "model.safetensors"
_DTENSOR = "DTensor"  # FSDP2, tensor parallelism
_OF_A_WHOLE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model*")


class FusePeftCallback(TrainerCallback):  # type: ignore[misc]
    """Calls :func:`lora_kernels.fuse_peft` on the model that a ``Trainer``, or one of TRL's, trains.

    For trainers that make the PEFT model themselves, and for programs that take callbacks and show no model. It acts
    when the trainer is made, or where it was added later, when training begins. ``report`` then says what was fused.

    Args:
        unused: what ms-swift gives its callbacks.

    Raises:
        InvalidArgumentError: the model holds none of PEFT's LoRA layers.

    Example:
        >>> from lora_kernels.trainer import FusePeftCallback
        >>> trainer = SFTTrainer(model, peft_config=config, callbacks=[FusePeftCallback()])  # doctest: +SKIP
    """

    def __init__(self, *unused: Any) -> None:
        self.report: FuseReport | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by ``Trainer`` when it is made."""
        self._fuse(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by ``Trainer`` before the first step."""
        self._fuse(model)

    def _fuse(self, model: Any) -> None:
        if self.report is None and model is not None:
            self.report = fuse_peft(model)


class SaveAdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Gives each checkpoint of a ``Trainer`` the adapter's two files, and takes the frozen base out of it.

    For a model whose layers :func:`lora_kernels.replace_linear` replaced. ``Trainer`` writes the whole model at each
    save. This then calls :func:`lora_kernels.save_adapter` into the checkpoint's folder. ``model.safetensors`` is
    written again with what training changes alone: Parameters that train, buffers, and residuals of PiSSA and OLoRA.
    ``config.json`` goes, so that nothing takes the folder for a whole model.

    **Resuming.** Make the model as before, replace its layers as before, and call
    ``trainer.train(resume_from_checkpoint=...)``. ``load_best_model_at_end`` works too. ``Trainer`` logs the names of
    the missing base weights both times; they are the ones that the model has already.

    **Several processes.** One process writes. Under FSDP and DeepSpeed ZeRO-3 all of them gather the adapter first. The
    base stays in ``Trainer``'s own files there, and ``Trainer`` resumes from those.

    **Limits.** While ``Trainer`` saves, the disk needs room for one whole model. The checkpoints of a PEFT model stay
    as they are, with a warning. ``trainer.save_model`` outside of a checkpoint writes the whole model as ever. Hub
    uploads hold it too.

    Example:
        >>> from lora_kernels.trainer import SaveAdapterCallback
        >>> trainer = Trainer(model, arguments, callbacks=[SaveAdapterCallback()])  # doctest: +SKIP
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by ``Trainer`` after each checkpoint, in every process."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        held = _held(model)
        if why := _why_left(model, folder, held):
            if args.should_save:
                self._warn(why)
            return
        with _gathered(model, held) as writes:
            if writes or (held is None and args.should_save):
                save_adapter(model, folder)
        if args.should_save and not (held or getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)):
            _keep_what_changes(model, folder)

    @staticmethod
    def _warn(why: str) -> None:
        warnings.warn(f"SaveAdapterCallback leaves a checkpoint as it is: {why}", LoRAKernelsWarning, stacklevel=3)


def _held(model: nn.Module) -> str | None:
    """Who holds the values of Parameters in parts; None where each process has them whole. All processes agree."""
    owners = {storage.owner(module) for module in model.modules()}
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return _DTENSOR
    return next((holder for holder in (storage.FSDP1, storage.ZERO3) if holder in owners), None)


def _why_left(model: nn.Module, folder: Path, held: str | None) -> str | None:
    """Why the checkpoint stays as ``Trainer`` wrote it, the same in all processes where ``held`` is not None."""
    if not any(lora_layers(model)) and not any(expert_layers(model)):  # of FSDP1's flat Parameters they have none
        return f"{type(model).__name__} holds no FusedLoRALinear: call replace_linear before the Trainer."
    if isinstance(model, getattr(sys.modules.get("peft"), "PeftModel", ())):
        return (
            f"Trainer writes the adapter of {type(model).__name__} to files of the same names. Call save_adapter "
            "with a folder of its own."
        )
    if held is None and not folder.is_dir():
        return f"{folder} is not there (a hyperparameter search has folders of its own)."
    return None


@contextmanager
def _gathered(model: nn.Module, held: str | None) -> Iterator[bool]:
    """The context in which the adapter's values can be read; every process enters it. Whether this one is to save.

    DTensors are gathered by ``save_adapter`` itself, in all processes, and the first one writes.
    """
    if held == storage.FSDP1:
        kind = import_module("torch.distributed.fsdp").FullyShardedDataParallel
        units = [module for module in model.modules() if isinstance(module, kind)]
        offload = all(  # FSDP1 cannot where nothing is sharded, and frees on a CPU what it offloads to it
            unit.sharding_strategy.name != "NO_SHARD" and unit.compute_device.type != "cpu" for unit in units
        )
        with kind.summon_full_params(model, writeback=False, rank0_only=True, offload_to_cpu=offload):
            yield torch.distributed.get_rank() == 0
    elif held == storage.ZERO3:
        adapters = adapter_parameters(model)
        needed = [each for each in model.parameters() if each.requires_grad or each in adapters]
        with import_module("deepspeed").zero.GatheredParameters(needed):
            yield torch.distributed.get_rank() == 0
    else:
        yield held == _DTENSOR


def _keep_what_changes(model: nn.Module, folder: Path) -> None:
    """Puts a ``model.safetensors`` of what training changes in the place of the whole model's files."""
    written = folder / f".{_WEIGHTS}.saving"
    import_module("safetensors.torch").save_file(_changing(model), written, metadata={"format": "pt"})
    os.replace(written, folder / _WEIGHTS)
    for pattern in (*_OF_A_WHOLE_MODEL, "model-*-of-*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that training changes, each in memory of its own."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    residual = {name for name, layer in lora_layers(model) if pissa.is_residual(layer)}
    frozen -= {f"{name}.weight" for name in residual}
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name not in frozen
    }
