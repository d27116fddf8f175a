"""How much attention each token draws from those behind it, by the model's own weights, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvquant.models.attention_hook import causal_attention, replaced_attention, rotate

# Tokens just before a query draw attention whatever they are; only queries further behind are counted.
NEAR = 32
# Queries whose weights exist at a time: at 32 heads and 4,096 tokens 32 MiB.
_QUERIES = 64


@torch.no_grad()
def attention_mass(model: PreTrainedModel, sequences: Iterable[Tensor]) -> list[Tensor]:
    """Attention that every token of some sequences draws in every layer, in even shares.

    1 is what a token would draw if each query spread its attention evenly over what it sees; a sink draws hundreds.
    The mean is over heads and over the queries that lie `NEAR` tokens behind or more.

    Args:
        model: a supported model.
        sequences: token ids, [S] each.

    Returns:
        One fp32 tensor a layer, [tokens of all sequences]; NaN where fewer than `NEAR` queries lie that far behind.
    """
    parts: dict[int, list[Tensor]] = {}

    def attend(
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        rope: tuple[Tensor, Tensor],
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cos, sin = (table[:, None] for table in rope)
        query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        parts.setdefault(layer, []).append(_drawn(query[0], keys[0], scaling, sliding_window, softcap).cpu())
        return causal_attention(query, keys, values, scaling, sliding_window, softcap).transpose(1, 2)

    device = next(model.parameters()).device
    with replaced_attention(model, attend):
        for ids in sequences:
            model(ids[None].to(device), use_cache=False)
    return [torch.cat(parts[layer]) for layer in sorted(parts)]


def _drawn(query: Tensor, keys: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    """Mean even shares that each key draws, [S]; query [Hq, S, D] and keys [H, S, D] are rotated."""
    Hq, S, _ = query.shape
    keys = keys.repeat_interleave(Hq // keys.shape[0], 0)
    at = torch.arange(S, device=keys.device)
    drawn = torch.zeros(S, device=keys.device)
    for rows in at.split(_QUERIES):
        scores = (query[:, rows] @ keys.transpose(-1, -2)).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        behind = rows[:, None] - at  # tokens that a query lies behind a key, [queries, S]
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        shares = scores.masked_fill_(~visible, -torch.inf).softmax(-1).mean(0) * visible.sum(1, keepdim=True)
        drawn += shares.masked_fill_(behind < NEAR, 0.0).sum(0)
    queries = S - NEAR - at
    return (drawn / queries).masked_fill_(queries < NEAR, torch.nan)
