"""No materialised history: the peak extra memory of a chunk does not follow the length of what is stored."""

from __future__ import annotations

import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.peak_memory import PeakMemory
from kvquant.prefill_quant import PrefillQuantizedAttention
from kvquant.spec import QuantSpec

H, G, D, CHUNK = 2, 2, 64, 128


def extra_bytes(quantizer: BatchedKVQuantizer, history: int) -> int:
    layout = BlockLayout(quantizer.spec, 1, H, D, torch.float32)
    pool = BlockPool(layout, layout.blocks_for(history + CHUNK), max_sequences=1)
    row = pool.add_sequence()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(history + CHUNK, H, D, generator=generator)
    quantizer.write(x[:history], x[:history], pool.layers[0], pool.reserve([row], [history]))
    pool.commit()
    attend = PrefillQuantizedAttention(quantizer, layout.block_size, D**-0.5)
    query, new = torch.randn(CHUNK, H * G, D, generator=generator), x[history:]
    with PeakMemory() as peak:
        attend(query, new, new, pool.layers[0], pool.reserve([row], [CHUNK]), None)
    pool.commit()
    return peak.extra_bytes


def test_a_chunk_over_32k_tokens_takes_what_it_takes_over_2k() -> None:
    x = torch.randn(512, H, D, generator=torch.Generator().manual_seed(1))
    quantizer = BatchedKVQuantizer.calibrate(QuantSpec(bits=3), x, x)
    short, long = (extra_bytes(quantizer, n) for n in (2048, 32768))
    # The history of this one layer dequantized would be 32 MiB; only block tables and schedules may grow.
    assert long - short < 0.02 * 2 * 32768 * H * D * 4
