"""DeepSpeed ZeRO-3's placeholders, made after its documentation: what one process of several sees of its Parameters.

A partitioned Parameter is the same object with empty ``data``; its attributes are ``ds_id``, ``ds_shape``,
``ds_status`` and ``ds_tensor`` (this process's part). ``GatheredParameters`` puts the values there for a block; on
leaving it changes are given up with ``modifier_rank=None``, and kept, as they are in that process, otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from types import TracebackType
from typing import Any

import torch
from torch import nn


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(model: nn.Module) -> nn.Module:
    """Has all Parameters of ``model`` partitioned, the whole of each being this process's part."""
    for number, parameter in enumerate(model.parameters()):
        held: Any = parameter
        held.ds_id, held.ds_shape, held.ds_numel = number, parameter.shape, parameter.numel()
        _give_up(held, parameter.data.flatten().clone())
    return model


def _give_up(parameter: Any, part: torch.Tensor) -> None:
    parameter.ds_tensor, parameter.ds_status = part, ZeroParamStatus.NOT_AVAILABLE
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


class GatheredParameters:
    def __init__(
        self, params: Iterable[nn.Parameter] | nn.Parameter, modifier_rank: int | None = None, enabled: bool = True
    ) -> None:
        self.enabled = enabled
        given = [params] if isinstance(params, nn.Parameter) else list(params)
        self.params: list[Any] = [parameter for parameter in dict.fromkeys(given) if hasattr(parameter, "ds_id")]
        self.src_rank = modifier_rank

    def __enter__(self) -> None:
        for parameter in self.params if self.enabled else ():
            parameter.data = parameter.ds_tensor.clone().view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self.params if self.enabled else ():
            kept = parameter.ds_tensor if self.src_rank is None else parameter.data.flatten().clone()
            _give_up(parameter, kept)
