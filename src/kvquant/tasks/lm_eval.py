"""``task=lm_eval``: any task of the lm-evaluation-harness over an exact and a quantized cache (extra ``[eval]``).

The harness pads on the right and passes neither mask nor cache to a model; ours takes its requests as token lists and
reads them as a ragged batch, so that no padding is ever stored. Every request that is answered is an item.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.errors import ConfigError, DataError
from kvquant.items import ItemStore, short_hash
from kvquant.statistics import holm, mean_interval, sign_test
from kvquant.tasks.quality import run_cache
from kvquant.tasks.questions import greedy, save_json
from kvquant.tasks.setup import Workbench, open_workbench


def run(cfg: Any, context: Any) -> None:
    """Evaluate ``task.tasks`` twice and compare document by document.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
        DataError: a task's data are not on this machine.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "task=lm_eval needs the lm-evaluation-harness, which is missing; pip install 'kvquant[eval]'"
        ) from error
    task = cfg.task
    manager = TaskManager(
        include_path=None if task.include_path is None else str(Path(task.include_path).expanduser())
    )
    unknown = [name for name in task.tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"task.tasks must be tasks of the harness, got {unknown[0]}; list them with `lm_eval ls tasks`, or set "
            "task.include_path to the folder of your own"
        )
    bench = open_workbench(cfg, context)
    results = {}
    for name, calibration in {
        "exact": exact_calibration(bench.shape),
        "quantized": bench.calibration(),
    }.items():
        try:
            results[name] = lm_eval.simple_evaluate(
                model=_model(bench, calibration, task.batch_size, name, context.items),
                tasks=list(task.tasks),
                task_manager=manager,
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=cfg.seed,
                numpy_random_seed=cfg.seed,
                torch_random_seed=cfg.seed,
                fewshot_random_seed=cfg.seed,
                verbosity="ERROR",
            )
        except (ConnectionError, FileNotFoundError, OSError) as error:
            raise DataError(
                f"the data of {', '.join(task.tasks)} must be on this machine, they are not ({str(error).splitlines()[0]}); "
                "run the task once where there is internet, and copy the folder that HF_HOME names"
            ) from error
    _report(cfg, context, results)


def _model(bench: Workbench, calibration: Calibration, batch_size: int, cache: str, items: ItemStore) -> Any:
    """The harness' view of a model whose keys and values lie in blocks; every request that it answers is an item."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = bench.tokenizer

    class BlockLM(TemplateLM):  # type: ignore[misc]
        """Answers requests with ragged batches over one calibration."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            """The token that stands in for an empty context."""
            for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
                if token is not None:
                    return int(token)
            return 0

        @property
        def tokenizer_name(self) -> str:
            """A name for the harness' own caches."""
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Tokens of a text."""
            special = True if add_special_tokens is None else add_special_tokens
            return list(tokenizer.encode(string, add_special_tokens=special, verbose=False))

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            # The longest first, as the harness does: memory runs out at once or never.
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                for group in _batches_of(batch, requests, bench.context):
                    asked = [requests[i] for i in group]
                    keys = [f"{cache}-likelihood-{short_hash(request[1:])}" for request in asked]
                    scored = items.batch(keys, functools.partial(self._score, asked))
                    for index, result in zip(group, scored, strict=True):
                        out[index] = result["log_likelihood"], result["is_greedy"]
            return out

        def _score(self, requests: list[Any]) -> list[dict[str, Any]]:
            sequences, answers = [], []
            for (_, text), context, continuation in requests:
                if not continuation:
                    raise DataError(
                        f"an answer must tokenise to at least 1 token, got none for {text!r}; drop the document"
                    )
                ids = torch.tensor([*context, *continuation][-(bench.context + 1) :])
                sequences.append(ids[:-1])
                answers.append(ids[-len(continuation) :])
            rows = max(len(a) for a in answers)
            logits = run_cache(bench, calibration, sequences, rows).logits.view(len(sequences), rows, -1)
            return [_scored(x[-len(a) :], a) for x, a in zip(logits, answers, strict=True)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, window by window."""
            out = []
            for request in requests:
                windows = map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.eot_token_id, bench.context, 1
                    ),
                )
                scored = self._loglikelihood_tokens([(("", ""), *window) for window in windows])
                out.append(sum(x for x, _ in scored))
            return out

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Greedy continuations up to the first stop string."""
            by_key = {f"{cache}-text-{short_hash(request.args)}": request for request in requests}
            finished = items.run(by_key, lambda key: self._continue(by_key[key]))
            texts = {key: item.values["text"] for key, item in zip(by_key, finished, strict=True)}
            return [texts[f"{cache}-text-{short_hash(request.args)}"] for request in requests]

        def _continue(self, request: Any) -> dict[str, str]:
            text, settings = request.args
            new = min(int(settings.get("max_gen_toks", 128)), bench.context // 2)
            ids = torch.tensor(self.tok_encode(text)[-(bench.context - new) :])
            (tokens,) = greedy(bench, calibration, [ids], new)
            answer = tokenizer.decode(tokens)
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                answer = answer.split(stop)[0] if stop else answer
            return {"text": answer}

    return BlockLM()


def _batches_of(batch: list[int], requests: Any, context: int) -> Iterable[list[int]]:
    """One batch if each of its sequences has the rows that the longest answer needs, else one at a time."""
    rows = max(len(requests[i][2]) for i in batch)
    shortest = min(min(len(requests[i][1]) + len(requests[i][2]), context + 1) - 1 for i in batch)
    return [batch] if shortest >= rows else [[i] for i in batch]


def _scored(logits: Tensor, answer: Tensor) -> dict[str, Any]:
    answer = answer.to(logits.device)
    picked = logits.float().log_softmax(-1).gather(1, answer[:, None])
    return {
        "log_likelihood": float(picked.sum()),
        "is_greedy": bool((logits.argmax(-1) == answer).all()),
    }


def _report(cfg: Any, context: Any, results: dict[str, Any]) -> None:
    metrics: dict[str, Any] = {}
    lines, p_values, entries = [], [], []
    for task, found in results["quantized"]["results"].items():
        samples = {name: {s["doc_id"]: s for s in r["samples"].get(task, [])} for name, r in results.items()}
        for key, value in found.items():
            if not isinstance(value, int | float) or "stderr" in key or key == "sample_len":
                continue
            metric = key.split(",")[0]
            exact = results["exact"]["results"][task][key]
            entry: dict[str, Any] = {"exact": exact, "quantized": value, "n": len(samples["quantized"])}
            pairs = [
                (samples["exact"][doc][metric], sample[metric])
                for doc, sample in samples["quantized"].items()
                if isinstance(sample.get(metric), int | float)
            ]
            text, p = "-", 1.0
            if len(pairs) > 1:
                interval = mean_interval([q - e for e, q in pairs], [1] * len(pairs))
                entry["difference"] = dataclasses.asdict(interval)
                text = interval.text()
                p = sign_test([e > q for e, q in pairs], [q > e for e, q in pairs])
            metrics.setdefault(task, {})[metric] = entry
            entries.append(entry)
            p_values.append(p)
            lines.append([f"{task}, {metric}", str(entry["n"]), f"{exact:.4f}", f"{value:.4f}", text])
    for entry, line, p in zip(entries, lines, holm(p_values), strict=True):
        entry["p_holm"] = p
        line.append(f"{p:.3f}")
    context.record.metrics["tasks"] = metrics
    save_json(
        context.run_dir / "items.json",
        {name: {t: r["samples"][t] for t in r["samples"]} for name, r in results.items()},
    )
    context.record.set_table(
        f"lm-evaluation-harness, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits",
        ["", "n", "exact cache", "quantized cache", "difference [95%]", "p (sign test, Holm)"],
        lines,
    )
