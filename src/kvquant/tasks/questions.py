"""Questions answered by greedy decoding from an exact and from a quantized cache, item by item, paired."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.errors import ConfigError, DataError
from kvquant.items import ItemStore, short_hash
from kvquant.methods import method_class
from kvquant.models import quantized_kv_cache
from kvquant.statistics import holm, mean_interval, share_interval, sign_test
from kvquant.tasks.setup import Workbench, progress


@dataclasses.dataclass(frozen=True)
class Item:
    """One question as the model gets it.

    Attributes:
        category: what results are grouped by.
        token_ids: of the prompt, int64 [n].
        answer_tokens: decoded at most.
        score: of the decoded text, in [0, 1].
    """

    category: str
    token_ids: Tensor
    answer_tokens: int
    score: Callable[[str], float]

    @property
    def name(self) -> str:
        """The hash of the prompt."""
        return short_hash([self.category, self.token_ids.tolist(), self.answer_tokens])


def encode_prompt(bench: Workbench, text: str, answer_tokens: int, what: str, *, cut: bool = False) -> Tensor:
    """Tokens of a prompt that leaves room for its answer.

    Args:
        bench: model and tokenizer.
        text: the prompt.
        answer_tokens: to leave room for.
        what: the file and row, for errors.
        cut: whether a prompt that is too long loses its middle, as LongBench does, or is refused.

    Raises:
        DataError: it tokenises to nothing, or is longer than the model's context.
    """
    ids = torch.tensor(bench.tokenizer.encode(text, verbose=False), dtype=torch.int64)
    if len(ids) == 0:
        raise DataError(f"{what}: the prompt must tokenise to at least 1 token, got none; drop the row")
    room = bench.context - answer_tokens
    if len(ids) > room and cut and room >= 2:
        ids = torch.cat([ids[: room // 2], ids[-(room - room // 2) :]])
    if len(ids) > room:
        raise DataError(
            f"{what}: prompt and answer must fit the model's context of {bench.context} tokens, got {len(ids)} + "
            f"{answer_tokens}; use a shorter length or a model with rope scaling set"
        )
    return ids


def greedy(
    bench: Workbench, calibration: Calibration, prompts: list[Tensor], new_tokens: int
) -> list[list[int]]:
    """Greedy continuations of a ragged batch, without the end-of-text token.

    Raises:
        ConfigError: the method keeps no blocks (``hf_quantized``).
    """
    if method_class(calibration.spec.method).outside:
        raise ConfigError(
            f"quant={calibration.spec.method} answers no questions here (it keeps no blocks); try task=perplexity"
        )
    eos = bench.model.generation_config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}
    settings = bench.quality_settings([len(p) + new_tokens for p in prompts])
    out: list[list[int]] = [[] for _ in prompts]
    with quantized_kv_cache(bench.model, calibration) as kv:
        cache = kv.new_cache(max_sequences=len(prompts), **settings)
        logits = cache.append(prompts)
        active = dict(enumerate(cache.rows))
        for _ in range(new_tokens):
            chosen = dict(zip(list(active), logits.argmax(-1).tolist(), strict=True))
            for index, token in chosen.items():
                if token in ends:
                    del active[index]
                else:
                    out[index].append(token)
            active = {i: row for i, row in active.items() if len(out[i]) < new_tokens}
            if not active:
                break
            logits = cache.append([[chosen[i]] for i in active], rows=list(active.values()))
    return out


def answer(cfg: Any, context: Any, bench: Workbench, items: Sequence[Item], title: str) -> None:
    """Ask every question with both caches, score the answers, and fill the run's record.

    Args:
        cfg: the composed configuration; ``task.items_dir`` and ``task.batch_size`` are read.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
        bench: model and text.
        items: the questions.
        title: of the table.
    """
    calibrations = {"exact": exact_calibration(bench.shape), "quantized": bench.calibration()}
    scores: dict[str, list[float]] = {name: [] for name in calibrations}
    texts: dict[str, list[str]] = {name: [] for name in calibrations}
    stores = {
        name: ItemStore(cfg.task.items_dir, item_key(bench, calibration))
        for name, calibration in calibrations.items()
    }
    size = cfg.task.batch_size
    batches = [list(items[i : i + size]) for i in range(0, len(items), size)]
    for batch in progress(context.console)(batches, "questions", len(batches)):
        for name, calibration in calibrations.items():
            compute = functools.partial(_texts, bench, calibration, batch)
            found = stores[name].batch([item.name for item in batch], compute)
            for item, entry in zip(batch, found, strict=True):
                texts[name].append(entry["text"])
                scores[name].append(item.score(entry["text"]))
    _report(context, items, scores, texts, title)
    context.record.metrics.update(
        items_found=sum(s.found for s in stores.values()),
        items_computed=sum(s.computed for s in stores.values()),
    )


def _texts(bench: Workbench, calibration: Calibration, batch: list[Item]) -> list[dict[str, Any]]:
    longest = max(item.answer_tokens for item in batch)
    answers = greedy(bench, calibration, [item.token_ids for item in batch], longest)
    return [
        {"text": bench.tokenizer.decode(tokens[: item.answer_tokens])}
        for item, tokens in zip(batch, answers, strict=True)
    ]


def item_key(bench: Workbench, calibration: Calibration) -> dict[str, Any]:
    """Everything an answer depends on beside the question."""
    settings = bench.cache_settings()
    return {
        "model": bench.model_hash,
        "dtype": str(bench.model.dtype),
        "device": bench.model.device.type,
        "spec": dataclasses.asdict(calibration.spec),
        "calibration": calibration.fingerprint,
        # The size of the pool changes what runs out, never a number.
        "cache": {name: settings[name] for name in ("block_size", "prefill_reads", "backend")},
    }


def _report(
    context: Any,
    items: Sequence[Item],
    scores: dict[str, list[float]],
    texts: dict[str, list[str]],
    title: str,
) -> None:
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, item in enumerate(items):
        groups[item.category].append(index)
    metrics: dict[str, dict[str, Any]] = {}
    lines, p_values = [], []
    for category, members in groups.items():
        exact, quantized = ([scores[name][i] for i in members] for name in ("exact", "quantized"))
        difference = mean_interval([q - e for e, q in zip(exact, quantized, strict=True)], [1] * len(members))
        # Scores need not be 0 or 1: the sign of each pair's difference is what is tested.
        p_values.append(
            sign_test(
                [e > q for e, q in zip(exact, quantized, strict=True)],
                [q > e for e, q in zip(exact, quantized, strict=True)],
            )
        )
        metrics[category] = {
            "n": len(members),
            "score_exact": sum(exact) / len(members),
            "score_quantized": sum(quantized) / len(members),
            "difference": dataclasses.asdict(difference),
        }
        if set(exact) | set(quantized) <= {0.0, 1.0}:
            metrics[category]["share_quantized"] = dataclasses.asdict(
                share_interval(round(sum(quantized)), len(members))
            )
    for (category, entry), p in zip(metrics.items(), holm(p_values), strict=True):
        entry["p_holm"] = p
        ends = [f"{100 * entry['difference'][k]:+.1f}" for k in ("estimate", "low", "high")]
        lines.append(
            [
                category,
                str(entry["n"]),
                f"{100 * entry['score_exact']:.1f}",
                f"{100 * entry['score_quantized']:.1f}",
                f"{ends[0]} [{ends[1]}, {ends[2]}]",
                f"{p:.3f}",
            ]
        )
    context.record.metrics["categories"] = metrics
    context.record.set_table(
        title, ["", "n", "exact cache", "quantized cache", "difference [95%]", "p (sign test, Holm)"], lines
    )
    rows = [
        {
            "category": item.category,
            "tokens": len(item.token_ids),
            **{f"score_{name}": scores[name][i] for name in scores},
            **{f"text_{name}": texts[name][i] for name in texts},
        }
        for i, item in enumerate(items)
    ]
    save_json(context.run_dir / "items.json", rows)


def save_json(path: Any, value: Any) -> None:
    """Write a JSON file whole."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, default=str), encoding="utf-8")
    os.replace(temporary, path)
