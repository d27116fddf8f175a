"""How keys and values can be stored: one file per method, each a class ``Method`` that `method_class` finds by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvquant.spec import METHODS

if TYPE_CHECKING:
    from kvquant.batched_quant import BatchedKVQuantizer

__all__ = ["method_class"]


def method_class(name: str) -> type[BatchedKVQuantizer]:
    """Return the class of a method: ``Method`` in ``kvquant/methods/<name>.py``.

    Raises:
        ValueError: there is no such file; names those there are.
    """
    if name not in METHODS:
        raise ValueError(f"quant.method must be one of {', '.join(METHODS)}, got {name!r}; try nuq")
    found: type[BatchedKVQuantizer] = importlib.import_module(f"kvquant.methods.{name}").Method
    return found
