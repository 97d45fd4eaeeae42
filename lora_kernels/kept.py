"""What a backend's forward pass leaves for its backward pass, by shape and dtype: its fakes and autograd ask here."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["Kept", "no_words", "row_words"]


def row_words(columns: int) -> int:
    """int32 words that a row of ``columns`` elements takes in a packed mask (``packed_mask.py``)."""
    return 4 * -(-columns // 128)


@cache
def no_words(device: torch.device) -> Tensor:
    """What ``forward`` gives where there are no words; one for each device, for making it takes a call's time."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.int32, device=device)


class Kept:
    """h as (M, R) in the hidden dtype, and of dropout's mask the 16-byte seed. A backend that keeps others says so.

    All of it are static facts of a process: it never depends on M, on alignment, or on what is tuned.
    """

    def hidden_dtype(self, compute: torch.dtype) -> torch.dtype:
        """Of h and z, (M, R), where x has the dtype ``compute``."""
        return compute

    def h(self, x: Tensor, n: int, r: int) -> tuple[int, torch.dtype]:
        """Columns and dtype of the h that ``forward`` gives, for N and the rank."""
        return r, self.hidden_dtype(x.dtype)

    def scaled_h(self, h: Tensor, r: int, scaling: float) -> Tensor:
        """s h, (M, R), of that h."""
        return scaling * h

    packs_mask = False  # whether ``forward`` gives the mask's words

    def prefers_words(self, n: int) -> bool:
        """Whether the words are kept rather than the seed, for a layer of N output features."""
        return False

    def group_fault(
        self, device: torch.device, dtype: torch.dtype, k: int, sizes: tuple[tuple[int, int], ...], dropout: bool
    ) -> str | None:
        """Why no group operator takes layers of one x with these N and ranks; None where one does.

        The end of a sentence "The group kernels do not run: ...".
        """
        return "this backend has none"
