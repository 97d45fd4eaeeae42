"""What several processes do together, and one of them for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import LoRAStateError
from ..sharded import is_sharded

__all__ = ["once"]


def once(tensors: Iterable[Any], action: Callable[[], None]) -> None:
    """Does ``action`` in one of the processes that hold parts of ``tensors``; where it raises there, all raise.

    That is the first process of the largest mesh. Where nothing is sharded, each process that calls this acts.
    """
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
    if not meshes:
        action()
        return
    mesh = max(meshes, key=lambda mesh: mesh.size())
    if any(mesh.get_coordinate()):
        failure = _told(mesh, None)
        if failure is not None:
            raise LoRAStateError(f"the first process of the mesh, which acts for all, has failed: {failure}")
        return
    try:
        action()
    except BaseException as error:
        _told(mesh, str(error) or type(error).__name__)
        raise
    _told(mesh, None)


def _told(mesh: Any, message: str | None) -> str | None:
    """The first process's ``message``, in all processes of the mesh, passed on along one dimension after the other."""
    told = [message]
    for i in range(mesh.ndim):
        torch.distributed.broadcast_object_list(told, group=mesh.get_group(i), group_src=0)
    return told[0]
