"""The C++ library's large results lie in memory that huge pages are asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_kernels.dispatch import backend
from lora_kernels.gate import chosen
from lora_kernels.ops import operators

SMAPS = Path("/proc/self/smaps")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not (SMAPS.exists() and HUGE.exists()), reason="this kernel has no transparent huge pages to ask for"
)
def test_huge_pages_are_asked_for_under_large_results() -> None:
    rows = 34  # of 1 MiB each
    chosen(torch.empty(1), "native")  # loads the library
    state = backend("native").dropout_state(torch.empty(rows, 1), 0.5)
    mask = operators("native").mask(state, rows, 1 << 20, 0.5)
    middle = mask.data_ptr() + mask.nbytes // 2
    assert "hg" in _flags(middle)


def _flags(address: int) -> list[str]:
    """The flags of the mapping that ``address`` is in."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        begin, end = (int(bound, 16) for bound in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return mapping.split("VmFlags:")[1].split()
    raise AssertionError(f"no mapping holds {address:#x}")
