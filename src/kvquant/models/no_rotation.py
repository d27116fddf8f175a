"""Leave a model's own rotation out where its attention is ours, which rotates on its own.

Multiplying by 1 and adding the half-turned 0 changes nothing, but costs a GPU some ten passes over queries and keys a
layer. So the function that the modeling file of every supported family calls by this name hands
on what comes with our tables, and does as before for everything else. Where tables are copied on their way (to another
device) or the model is traced, it multiplies, which gives the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROTATION = "apply_rotary_pos_emb"
_MARK = "_kvquant_identity"


@functools.lru_cache(maxsize=32)
def _one_and_zero(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # calibration multiplies them with what has gradients
        return torch.ones((), dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)


def identity_tables(cos: Tensor) -> tuple[Tensor, Tensor]:
    """Tables shaped like ``cos`` that rotate by nothing, and are known to."""
    one, zero = (number.expand_as(cos) for number in _one_and_zero(cos.dtype, cos.device))
    setattr(one, _MARK, True)
    return one, zero


class _UnlessIdentity:
    """A modeling file's rotation, for ``users`` contexts."""

    def __init__(self, rotation: Callable[..., Any]) -> None:
        self.rotation, self.users = rotation, 0

    # Others may call it in any form; with our tables a modeling file calls it as (query, keys, cos, ...).
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) > 2 and hasattr(args[2], _MARK):
            return args[0], args[1]
        return self.rotation(*args, **kwargs)


@contextlib.contextmanager
def identity_left_out(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let attention modules hand on queries and keys that come with :func:`identity_tables`.

    Other models of the same files are as they were; files without a function of that name multiply.
    """
    files = {id(names): names for names in (inspect.unwrap(type(m).forward).__globals__ for m in modules)}
    held = []
    for names in files.values():
        if _ROTATION in names:
            if not isinstance(names[_ROTATION], _UnlessIdentity):
                names[_ROTATION] = _UnlessIdentity(names[_ROTATION])
            names[_ROTATION].users += 1
            held.append((names, names[_ROTATION]))
    try:
        yield
    finally:
        for names, ours in held:
            ours.users -= 1
            if ours.users == 0 and names[_ROTATION] is ours:  # unless somebody has put theirs over it
                names[_ROTATION] = ours.rotation
