"""What a ``with`` block has set, for what a checkpoint runs again when that block is over.

Backward runs a checkpointed region again, in whatever block it was called, and on the engine's threads, which have seen
none. So a block in which autograd recorded is remembered by the numbers of its nodes: what runs again asks whose it is.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

__all__ = ["Block", "Blocks"]

T = TypeVar("T")
_KEPT = 64  # blocks that are over; more are not between a forward and its backward


@dataclass(slots=True, eq=False)
class Block(Generic[T]):
    """A ``with`` block: what it set, in which graph task, and its thread's nodes, from first to below last."""

    value: T
    task: int
    thread: int
    first: int
    last: float = float("inf")

    @property
    def holds(self) -> bool:
        return self.last == float("inf")


class Blocks(list[Block[T]]):
    """The blocks of one kind as they began: those that hold, in any thread, and those in which autograd recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._over: deque[Block[T]] = deque()  # as they ended: the one that was over first is forgotten first

    def begin(self, value: T) -> Block[T]:
        task, number = torch._C._current_graph_task_id(), torch._C._autograd._get_sequence_nr()
        block = Block(value, task, threading.get_ident(), number)
        self.append(block)
        return block

    def end(self, block: Block[T]) -> bool:
        """Whether autograd recorded in it, so that something of it can run again."""
        block.last = torch._C._autograd._get_sequence_nr()
        if recorded := block.last != block.first:
            self._over.append(block)
        else:
            self.remove(block)
        if len(self._over) > _KEPT:
            self.remove(self._over.popleft())
        return recorded

    def of_forward(self, task: int | None) -> list[T] | None:
        """What was set around the forward of what backward runs again here, the innermost block's first.

        None: nothing runs again, or the innermost block that holds began in this very graph ``task``. What holds now
        is what counts then.
        """
        node = torch._C._current_autograd_node()
        if node is None or task == torch._C._current_graph_task_id():
            return None
        number, thread = node._sequence_nr(), threading.get_ident()
        # Numbers are each thread's own. The engine's threads for devices, which Python did not start, have no forward.
        engine_s = isinstance(threading.current_thread(), threading._DummyThread)
        return [
            block.value
            for block in reversed(list(self))
            if block.first <= number < block.last and (engine_s or block.thread == thread)
        ]
