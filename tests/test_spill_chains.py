"""Chains of spill chunks against plain lists: what is read from them, and that no chunk is lost or held twice."""

from __future__ import annotations

import random

import pytest
import torch

from kvquant import spill_chains
from kvquant.kernels import SPILL_ENTRIES

LAYERS, BLOCKS, HEADS, BASE, CHUNKS, HEAD_DIM, SLOTS = 3, 5, 2, 6, 40, 1024, 64


class Chains:
    """Outliers of a few blocks in chunks, and the same as lists of (number, value)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        place = (LAYERS, BLOCKS, HEADS)
        self.tensors = {
            "key_outlier_count": torch.zeros(place, dtype=torch.int32),
            "key_outlier_index": torch.zeros(*place, BASE, dtype=torch.int16),
            "key_outlier_value": torch.zeros(*place, BASE),
            # Heads and links nobody follows name some chunk, as they do once chunks have been in use.
            "spill_head": torch.randint(CHUNKS, place, dtype=torch.int32),
            "spill_next": torch.randint(CHUNKS, (LAYERS, CHUNKS), dtype=torch.int32),
            "spill_index": torch.zeros(LAYERS, CHUNKS, SPILL_ENTRIES, dtype=torch.int16),
            "spill_value": torch.zeros(LAYERS, CHUNKS, SPILL_ENTRIES),
            "spill_free": torch.stack([torch.randperm(CHUNKS) for _ in range(LAYERS)]).to(torch.int32),
        }
        self.top = torch.full((LAYERS, 1), CHUNKS, dtype=torch.int32)
        self.lists = {
            (layer, b, h): [] for layer in range(LAYERS) for b in range(BLOCKS) for h in range(HEADS)
        }

    def fill(self, block: int) -> None:
        """Give every head of a block some outliers, of none to three chunks."""
        for layer in range(LAYERS):
            for head in range(HEADS):
                many = self.random.choice((0, 3, BASE, BASE + 1, BASE + 40, BASE + 96))
                numbers = sorted(self.random.sample(range(SLOTS * HEAD_DIM), many))
                entries = [(n, self.random.random()) for n in numbers]
                self.lists[layer, block, head] = entries
                self._write(layer, block, head, entries)

    def _write(self, layer: int, block: int, head: int, entries: list[tuple[int, float]]) -> None:
        t = self.tensors
        t["key_outlier_count"][layer, block, head] = len(entries)
        links = t["spill_head"][layer, block], head
        for first in range(0, len(entries), SPILL_ENTRIES) if len(entries) > BASE else ():
            part = entries[BASE:][first : first + SPILL_ENTRIES]
            if not part:
                break
            self.top[layer] -= 1
            chunk = int(t["spill_free"][layer, int(self.top[layer])])
            links[0][links[1]] = chunk
            links = t["spill_next"][layer], chunk
            for side, field in enumerate(("spill_index", "spill_value")):
                t[field][layer, chunk, : len(part)] = torch.tensor([e[side] for e in part]).to(t[field].dtype)
        for side, field in enumerate(("key_outlier_index", "key_outlier_value")):
            own = torch.tensor([e[side] for e in entries[:BASE]])
            t[field][layer, block, head, : len(own)] = own.to(t[field].dtype)

    def chunks(self, layer: int, block: int, head: int) -> list[int]:
        """The chain of a head, by its count."""
        t, found = self.tensors, []
        chunk = int(t["spill_head"][layer, block, head])
        for _ in range(-(-max(0, int(t["key_outlier_count"][layer, block, head]) - BASE) // SPILL_ENTRIES)):
            found.append(chunk)
            chunk = int(t["spill_next"][layer, chunk])
        return found

    def check(self) -> None:
        """What is stored is what the lists say, and every chunk is either free or in one chain."""
        t = self.tensors
        used: list[set[int]] = [set() for _ in range(LAYERS)]
        for (layer, block, head), entries in self.lists.items():
            count, chain = int(t["key_outlier_count"][layer, block, head]), self.chunks(layer, block, head)
            rows = [(t["key_outlier_index"][layer, block, head], t["key_outlier_value"][layer, block, head])]
            rows += [(t["spill_index"][layer, c], t["spill_value"][layer, c]) for c in chain]
            index, value = (torch.cat(side)[:count].tolist() for side in zip(*rows, strict=True))
            assert [n & 0xFFFF for n in index] == [n for n, _ in entries]
            assert value == pytest.approx([v for _, v in entries])
            assert used[layer].isdisjoint(chain) and len(set(chain)) == len(chain)
            used[layer].update(chain)
        for layer in range(LAYERS):
            free = t["spill_free"][layer, : int(self.top[layer])].tolist()
            assert sorted([*free, *used[layer]]) == list(range(CHUNKS))


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_are_filled_copied_cut_and_given_back(seed: int) -> None:
    torch.manual_seed(seed)
    chains = Chains(seed)
    for block in range(2):
        chains.fill(block)
    chains.check()
    held = spill_chains.count(chains.tensors, [0, 1, 1]).tolist()
    assert held == [
        sum(len(chains.chunks(layer, b, h)) for b in (0, 1, 1) for h in range(HEADS))
        for layer in range(LAYERS)
    ]

    t = chains.tensors
    for name in ("key_outlier_count", "key_outlier_index", "key_outlier_value", "spill_head"):
        t[name][:, 2] = t[name][:, 0]  # what copying a block does first
    assert spill_chains.copy(t, chains.top, 0, 2)
    for layer in range(LAYERS):
        for head in range(HEADS):
            chains.lists[layer, 2, head] = list(chains.lists[layer, 0, head])
    chains.check()

    for block, tokens in ((0, 17), (2, 40), (0, 17), (1, 1)):
        spill_chains.crop(t, chains.top, block, tokens, HEAD_DIM)
        for layer in range(LAYERS):
            for head in range(HEADS):
                kept = [e for e in chains.lists[layer, block, head] if e[0] < tokens * HEAD_DIM]
                chains.lists[layer, block, head] = kept
        chains.check()

    spill_chains.release(t, chains.top, [2, 0])
    for layer, block, head in chains.lists:
        if block != 1:
            chains.lists[layer, block, head] = []
    chains.check()


def test_a_copy_takes_nothing_where_one_layer_has_too_few_chunks() -> None:
    torch.manual_seed(0)
    chains = Chains(0)
    entries = [(n, 1.0) for n in range(BASE + 40)]  # two chunks of each head
    for layer in range(LAYERS):
        for head in range(HEADS):
            chains.lists[layer, 0, head] = entries
            chains._write(layer, 0, head, entries)
    before = chains.top.clone()
    short = before.clone()
    short[1] = 2 * HEADS - 1
    chains.top.copy_(short)
    assert not spill_chains.copy(chains.tensors, chains.top, 0, 1)
    assert torch.equal(chains.top, short)
    chains.top.copy_(before)
    chains.check()

    chains.top.fill_(2 * HEADS)  # just enough
    for name in ("key_outlier_count", "key_outlier_index", "key_outlier_value", "spill_head"):
        chains.tensors[name][:, 1] = chains.tensors[name][:, 0]
    assert spill_chains.copy(chains.tensors, chains.top, 0, 1)
    assert not chains.top.any()
    assert all(len(chains.chunks(layer, 1, head)) == 2 for layer in range(LAYERS) for head in range(HEADS))
    assert spill_chains.count(chains.tensors, []).tolist() == [0] * LAYERS
