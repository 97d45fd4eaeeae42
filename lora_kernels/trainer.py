"""transformers' ``Trainer`` with replaced layers: checkpoints without the base."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import pissa
from .checkpoint import save_adapter
from .errors import LoRAKernelsWarning, MissingExtraError
from .models.model import lora_layers

__all__ = ["SaveAdapterCallback"]

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        f"lora_kernels.trainer is for transformers' Trainer, and transformers cannot be imported ({error}). Run: pip "
        'install "lora-kernels[examples]".'
    ) from error

_WEIGHTS = "model.safetensors"
_OF_A_WHOLE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model*")


class SaveAdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Gives each checkpoint of a ``Trainer`` the adapter's two files, and takes the frozen base out of it.

    For a model whose layers :func:`lora_kernels.replace_linear` replaced. ``Trainer`` writes the whole model at each
    save. This then calls :func:`lora_kernels.save_adapter` into the checkpoint's folder. ``model.safetensors`` is
    written again with what training changes alone: Parameters that train, buffers, and residuals of PiSSA and OLoRA.
    ``config.json`` goes, so that nothing takes the folder for a whole model.

    **Resuming.** Make the model as before, replace its layers as before, and call
    ``trainer.train(resume_from_checkpoint=...)``. ``load_best_model_at_end`` works too. ``Trainer`` logs the names of
    the missing base weights both times; they are the ones that the model has already.

    **Limits.** While ``Trainer`` saves, the disk needs room for one whole model. Under FSDP and DeepSpeed the base
    stays in ``Trainer``'s own files, and the adapter is added where :func:`lora_kernels.save_adapter` can gather it.
    ``trainer.save_model`` outside of a checkpoint writes the whole model as ever. Hub uploads hold it too.

    Example:
        >>> from lora_kernels.trainer import SaveAdapterCallback
        >>> trainer = Trainer(model, arguments, callbacks=[SaveAdapterCallback()])  # doctest: +SKIP
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by ``Trainer`` after each checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not any(lora_layers(model)):
            self._warn(f"{type(model).__name__} holds no FusedLoRALinear: call replace_linear before the Trainer.")
            return
        if args.should_save and not folder.is_dir():
            self._warn(f"{folder} is not there (a hyperparameter search has folders of its own).")
            return
        save_adapter(model, folder)
        sharded = bool(getattr(args, "fsdp", None)) or bool(getattr(args, "deepspeed", None))
        if args.should_save and not sharded:
            _keep_what_changes(model, folder)

    @staticmethod
    def _warn(why: str) -> None:
        warnings.warn(f"SaveAdapterCallback leaves a checkpoint as it is: {why}", LoRAKernelsWarning, stacklevel=3)


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
