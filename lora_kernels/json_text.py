"""JSON that others wrote: whatever is wrong with it is a ``ValueError``."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parsed"]


def parsed(text: str | bytes) -> Any:
    """The value of ``text``.

    Raises:
        ValueError: it is no JSON, no text in a Unicode encoding, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or objects within each other, deeper than is read here") from error
