"""Which runs may share a line of a figure or a block of a table: those that differ in what the axis shows, alone."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvquant.report.collect import Run, flat
from kvquant.results import HASH_EXCLUDES

# Never mixed, whatever the axis: what was measured, on which model and text, by which code, on which device.
IDENTITY = ("task", "model", "data", "device", "code")
# Seeds are repeats of one measurement: their median is shown, and how many there were.
REPEATS = ("seed",)
# Settings that the identity's hashes and the device's name say better: the same model may lie in two places.
SAID_BY_IDENTITY = ("model.name", "model.path", "data.name", "data.path", "device", "task.name")
Pairs = list[tuple[float, float]]
# Of a run that holds several lines: each one's points by what it is called.
NamedPairs = dict[str, Pairs]


@dataclasses.dataclass(frozen=True)
class Point:
    """One place on a line: the median of the runs there, the least and the most of them."""

    x: float
    y: float
    low: float
    high: float
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: what it is called, and its points by rising x."""

    label: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One quantity of a run.

    Attributes:
        name: what the line is called, before what sets it apart from others; may be empty.
        pairs: the points a run contributes, empty where it did not measure this; several lines of points by name.
        ignores: settings that do not change this quantity, beside those of the axis (an exact cache and ``quant``).
    """

    name: str
    pairs: Callable[[Run], Pairs | NamedPairs]
    ignores: tuple[str, ...] = ()


def short_hash(value: Any) -> str:
    """The first 8 digits of a hash, ``-`` where there is none."""
    return str(value)[:8] if value else "-"


def identity(run: Run) -> dict[str, str]:
    """What a run can never share a line across, as text."""
    return _identity(_ById(run))


@functools.cache
def _identity(by_id: _ById) -> dict[str, str]:
    run = by_id.run
    provenance = run.result["provenance"]
    dirty = f"+{short_hash(provenance['git_diff_sha256'])}" if provenance.get("git_diff_sha256") else ""

    def named(key: str, digest: str) -> str:
        # A task that loads no model has a model's name in its configuration all the same.
        return f"{run.config(key)} ({short_hash(provenance[digest])})" if provenance.get(digest) else "-"

    return {
        "task": str(run.result["task"]),
        "model": named("model.name", "model_hash"),
        "data": named("data.name", "data_hash"),
        "device": str(provenance.get("device") or "-"),
        "code": f"{short_hash(provenance.get('git_sha'))}{dirty}",
    }


@functools.cache
def _settings(run_key: _ById) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat(run_key.run.result["config"], "")
        if not _covered(key, (*HASH_EXCLUDES, *REPEATS, *SAID_BY_IDENTITY))
    }


class _ById:
    """A run as a key of the cache: results are dicts, which cannot be hashed."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __hash__(self) -> int:
        return hash(self.run.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.run.result is self.run.result


def settings(run: Run) -> dict[str, Any]:
    """Every setting that can change a result, by dotted key, seeds left out."""
    return _settings(_ById(run))


@functools.cache
def _covered(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys in which some of the mappings differ, in the order they first appear."""
    if not trees:
        return []
    keys = dict.fromkeys(key for tree in trees for key in tree)
    absent = object()
    return [key for key in keys if len({repr(tree.get(key, absent)) for tree in trees}) > 1]


def label(tree: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return ``bits=3, block_size=64``: the values of these keys; the whole key where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    names = [key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)]
    return ", ".join(f"{name}={tree[key]}" for name, key in zip(names, keys, strict=True) if key in tree)


def lines(runs: Sequence[Run], variants: Sequence[Variant], axis: Sequence[str]) -> list[Series]:
    """Group runs into lines.

    Args:
        runs: those that ended well.
        variants: the quantities to draw.
        axis: settings that change along a line.

    Returns:
        Lines named by everything that tells them apart; runs that differ in anything but ``axis``, a variant's
        ``ignores`` and seeds are never on one line.
    """
    grouped: dict[tuple[str, Any], tuple[dict[str, Any], dict[float, list[tuple[float, Run]]]]] = {}
    for variant in variants:
        hidden = (*axis, *variant.ignores)
        for run in runs:
            found = variant.pairs(run)
            if not found:
                continue
            by_name = found if isinstance(found, dict) else {"": found}
            tree = {**identity(run), **settings(run)}
            for key in _hidden(tuple(tree), hidden):
                del tree[key]
            # As a set, because two runs may list their settings in different orders; 1 and 1.0 are one value.
            for inner, pairs in by_name.items():
                name = ", ".join(part for part in (variant.name, inner) if part)
                entry = grouped.setdefault((name, frozenset(tree.items())), (tree, {}))
                for x, y in pairs:
                    entry[1].setdefault(x, []).append((y, run))
    out = []
    for (name, _), (tree, at) in grouped.items():
        apart = differing([other for (same, _), (other, _) in grouped.items() if same == name])
        text = label(tree, apart)
        points = tuple(
            Point(
                x,
                statistics.median(y for y, _ in found),
                min(y for y, _ in found),
                max(y for y, _ in found),
                tuple(run for _, run in found),
            )
            for x, found in sorted(at.items())
        )
        out.append(Series(", ".join(part for part in (name, text) if part) or "all runs", points))
    return sorted(out, key=lambda s: s.label)


@functools.cache
def _hidden(keys: tuple[str, ...], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if _covered(key, prefixes))


def blocks(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[Run]]]:
    """Group runs that may stand in one table: the same task, model, text, device and code."""
    found: dict[tuple[str, ...], tuple[dict[str, str], list[Run]]] = {}
    for run in runs:
        origin = identity(run)
        found.setdefault(tuple(origin.values()), (origin, []))[1].append(run)
    return [found[key] for key in sorted(found)]
