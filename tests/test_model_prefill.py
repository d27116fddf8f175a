"""Prompts of a whole model on a GPU: FlashAttention reads them, and sees what tiles in fp32 see."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant.models import quantized_kv_cache
from kvquant.prefill_quant import PrefillQuantizedAttention
from small_models import exact, prompts_of, quantized, small_model

CALLS = [(3, 150, 64), (40, 1, 70)]  # in the second one a sequence decodes beside prompts


def first_layer_outputs(
    stored: Callable[..., Any], reads: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[torch.dtype]]:
    """What the first layer's attention gives in each call, [T, Hq, D], and the dtypes of its queries."""
    model = small_model("llama-gqa-llama3")
    quantizers = stored(model)  # calibrated where its text is
    model = model.to("cuda", torch.bfloat16)
    outputs: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    attend = PrefillQuantizedAttention.attend

    def noting(self: PrefillQuantizedAttention, query: Tensor, *args: Any) -> Tensor:
        outputs.append(attend(self, query, *args))
        dtypes.append(query.dtype)
        return outputs[-1]

    with monkeypatch.context() as patch, quantized_kv_cache(model, quantizers) as kv:
        patch.setattr(PrefillQuantizedAttention, "attend", noting)
        cache = kv.new_cache(num_blocks=20, max_sequences=3, prefill_reads=reads)
        for call, lengths in enumerate(CALLS):
            cache.append(prompts_of(list(lengths), seed=call))
    layers = len(quantizers)
    return [x.float() for x in outputs[::layers]], dtypes[::layers]


@pytest.mark.gpu
@pytest.mark.parametrize("reads", ["quantized", "exact"])
@pytest.mark.parametrize("stored", [exact, quantized])
def test_flash_attention_reads_the_prompts_of_a_bf16_model(stored, reads, monkeypatch) -> None:
    ways = importlib.import_module("kvquant.kernels.triton_kernels.attention")
    with monkeypatch.context() as patch:
        patch.setattr(ways, "attend_tiled", lambda *_, **__: pytest.fail("a prompt went tile by tile"))
        ours, dtypes = first_layer_outputs(stored, reads, monkeypatch)
    assert dtypes == [torch.bfloat16] * len(CALLS)
    with monkeypatch.context() as patch:
        patch.setattr(PrefillQuantizedAttention, "query_dtype", lambda *_: torch.float32)
        patch.setattr(ways, "attend_prefill", lambda *_, **__: pytest.fail("tiles were asked for"))
        tiled, dtypes = first_layer_outputs(stored, reads, monkeypatch)
    assert dtypes == [torch.float32] * len(CALLS)
    for a, b in zip(ours, tiled, strict=True):
        # Queries, rotated keys, weights and outputs are rounded to 8 bits once each.
        assert float((a - b).norm() / b.norm()) < 3e-2
