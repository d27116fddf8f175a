"""Calls that write: the small cases, which Triton's interpreter can run, and those for a GPU alone."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Case:
    """Calls that append to the sequences of one pool, each the tokens of every sequence."""

    bits: int = 3
    head_dim: int = 64
    heads: int = 2
    fraction: float = 0.01
    dtype: str = "fp16"
    calls: tuple[tuple[int, ...], ...] = ((63, 64, 65),)
    groups: int = 1
    sinks: int = 0
    block_size: int = 64
    spread: float = 1.5
    ties: bool = False
    chains: int = 0  # links that the longest chain must have

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return " ".join(changed).replace("=", "-") or "plain"


SMALL = [
    *(
        Case(
            bits=bits,
            head_dim=head_dim,
            dtype=dtype,
            calls=((1,), (9,)),
            block_size=8,
            sinks=sinks,
            groups=groups,
        )
        for (bits, head_dim), dtype, sinks, groups in zip(
            itertools.product((2, 3, 4, 8), (64, 80, 128)),
            itertools.cycle(("fp16", "fp32")),
            itertools.cycle((0, 3, 0, 0, 2)),
            itertools.cycle((1, 4, 2)),
            strict=False,
        )
    ),
    *(Case(bits=bits, calls=((3,),), block_size=8, heads=3, head_dim=16 * bits) for bits in (1, 5, 6, 7)),
    Case(heads=1, calls=((31, 32, 33),), block_size=32, chains=1, sinks=5, spread=3.0),
    Case(bits=4, calls=((1,), (1,), (34,)), block_size=32, heads=1, dtype="fp32", chains=1, spread=4.0),
    Case(calls=((1, 0, 3), (1, 2, 0), (1, 20, 1), (9, 1, 20)), block_size=16, spread=6.0, chains=3),
    Case(
        bits=2, calls=((20, 16),), block_size=16, spread=6.0, fraction=0.05, head_dim=128, chains=3, sinks=2
    ),
    Case(bits=4, fraction=0.0, calls=((9, 40),), groups=2),
    Case(bits=4, fraction=0.3, calls=((9,),), groups=4),
    Case(bits=2, fraction=0.05, calls=((20,),), ties=True, groups=2),
    Case(bits=2, fraction=0.0, calls=((20,),), ties=True, dtype="fp32"),
    Case(bits=4, fraction=0.1, calls=((20,),), ties=True, dtype="fp32"),
    # A warp for a token of values, four repetitions of eight channels a thread. Where bf16 rounds, the interpreter cuts
    # off: only few and round numbers have exact means.
    Case(bits=3, head_dim=128, heads=8, dtype="bf16", calls=((11,),), block_size=8, ties=True, sinks=2),
    *(
        Case(bits=bits, head_dim=128, heads=8, calls=((3,), (1,)), block_size=8, sinks=sinks)
        for bits, sinks in ((2, 2), (3, 0), (4, 1))
    ),
    # More outliers at an end than threads.
    Case(bits=4, head_dim=128, heads=8, calls=((9,),), block_size=8, ties=True, fraction=0.15),
    Case(bits=2, head_dim=128, heads=8, calls=((2,),), block_size=8, fraction=0.15),
]
LARGE = [
    Case(heads=1, chains=1, sinks=5),
    Case(bits=4, calls=((1,), (1,), (70,)), heads=1, dtype="fp32", chains=1, spread=3.0),
    *(
        Case(
            bits=bits,
            head_dim=128,
            heads=heads,
            dtype=dtype,
            calls=((700, 1, 64), (1, 1, 1), (300, 0, 129)),
            groups=groups,
            sinks=sinks,
            chains=1,
        )
        for bits, heads, dtype, groups, sinks in (
            (2, 8, "bf16", 1, 4),
            (3, 32, "fp16", 1, 0),
            (3, 8, "bf16", 8, 4),
            (4, 32, "bf16", 1, 0),
            (4, 8, "fp16", 3 + 1, 5),
            (8, 8, "fp32", 1, 1),
        )
    ),
    Case(bits=3, head_dim=128, heads=8, dtype="bf16", calls=((64, 64), (1, 1)), ties=True, fraction=0.05),
    Case(bits=3, head_dim=128, heads=8, dtype="bf16", calls=((400,), (30,)), spread=8.0, chains=10),
    Case(bits=2, head_dim=80, heads=5, dtype="bf16", calls=((300,), (3,))),
    Case(bits=4, head_dim=128, heads=1, dtype="fp16", calls=((600,),), block_size=512, fraction=0.002),
    Case(bits=4, head_dim=128, heads=260, dtype="fp16", calls=((9,),), block_size=8),
    *(
        Case(
            bits=bits,
            head_dim=128,
            heads=heads,
            dtype=dtype,
            calls=calls,
            sinks=sinks,
            groups=groups,
            chains=1,
        )
        for (bits, dtype, (heads, calls)), sinks, groups in zip(
            itertools.product(
                (2, 3, 4),
                ("bf16", "fp16"),
                ((8, ((2500, 3), (1, 700))), (32, ((2000,), (40,)))),
            ),
            itertools.cycle((0, 0, 5)),
            itertools.cycle((1, 1, 1, 1, 8)),
            strict=False,
        )
    ),
    *(
        Case(
            bits=bits, head_dim=128, heads=heads, dtype=dtype, calls=((2000,),), ties=True, fraction=fraction
        )
        for bits, heads, dtype, fraction in (
            (2, 8, "fp16", 0.01),
            (3, 32, "bf16", 0.01),
            (4, 8, "bf16", 0.05),
            (4, 32, "fp16", 0.02),
            (3, 8, "bf16", 0.15),
        )
    ),
]
