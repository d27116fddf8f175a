"""What every task starts with: model, text and calibration, from the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as rich_track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvquant.calibration import Calibration, CalibrationText, calibrate
from kvquant.data.corpus import Corpus, load_corpus
from kvquant.data.prompts import calibration_stream, token_stream
from kvquant.errors import DataError, DeviceError, ModelError
from kvquant.models import ModelShape, load_model, load_tokenizer, model_shape
from kvquant.models.backend_check import triton_refusal_of
from kvquant.models.loading import model_fingerprint
from kvquant.models.rotary import rotated_channels
from kvquant.spec import QuantSpec

DEFAULT_SEQUENCE_LENGTH = (
    512  # of calibration: many short sequences see more kinds of text than few long ones
)


@dataclasses.dataclass
class Workbench:
    """A loaded model with its text; calibrations are made from it.

    Attributes:
        context: tokens a sequence may hold.
    """

    cfg: Any
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    context: int
    corpus: Corpus
    model_hash: str
    console: Console

    def spec(self) -> QuantSpec:
        """The quantization settings of this run."""
        return QuantSpec(**dict(self.cfg.quant))

    def calibration(
        self, spec: QuantSpec | None = None, *, overwrite: bool = False, seed: int | None = None
    ) -> Calibration:
        """Fit (or find) the quantizers of every layer on the corpus' calibration split.

        Args:
            spec: default: the run's own.
            overwrite: compute anew what is there.
            seed: which draw of calibration text; default: the run's seed.

        Raises:
            CalibrationError: see :func:`kvquant.calibration.calibrate`.
            DeviceError: see :meth:`check_kernel`.
        """
        settings = self.cfg.calibration
        self.check_kernel(self.spec() if spec is None else spec)
        length = settings.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, self.context)
        return calibrate(
            self.model,
            CalibrationText(
                calibration_stream(
                    self.tokenizer,
                    self.corpus.calibration,
                    settings.tokens,
                    length,
                    self.cfg.seed if seed is None else seed,
                ),
                length,
                self.model_hash,
                self.corpus.sha256,
            ),
            self.spec() if spec is None else spec,
            settings.dir,
            lock_timeout_s=settings.lock_timeout_s,
            overwrite=overwrite,
            track=progress(self.console),
        )

    def check_kernel(self, spec: QuantSpec) -> None:
        """Refuse ``kernel=triton`` before anything is calibrated for layers that it would not run.

        Raises:
            DeviceError: says why, and which backend works.
        """
        if self.cfg.kernel.backend != "triton":
            return
        reason = triton_refusal_of(
            spec,
            self.cfg.cache.block_size,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            query_heads=self.shape.num_query_heads,
            rotated=rotated_channels(self.model.get_decoder().rotary_emb),
        )
        if reason is not None:
            raise DeviceError(f"kernel=triton {reason}; try kernel=pytorch_fused")

    def heldout(self, max_tokens: int | None, part: str = "all") -> Tensor:
        """Tokens of the held-out split, int64 [at most max_tokens].

        Args:
            max_tokens: where to stop; None: take everything.
            part: ``all``, or every other document: ``dev`` to choose settings on, ``test`` to report them on.
        """
        documents = self.corpus.heldout
        if part != "all":
            documents = documents[("dev", "test").index(part) :: 2]
            if not documents:
                raise DataError(
                    f"the held-out split must hold 2 documents or more for task.part={part}, got 1; try task.part=all"
                )
        return token_stream(self.tokenizer, documents, max_tokens)

    def length(self, key: str, tokens: int | None) -> int:
        """A setting in tokens, the model's context where it is None.

        Raises:
            DataError: it is longer than the context.
        """
        if tokens is not None and tokens > self.context:
            raise DataError(
                f"{key} must be at most the model's context of {self.context} tokens, got {tokens}; lower it, or set rope "
                "scaling in the model's config.json"
            )
        return self.context if tokens is None else tokens

    @property
    def heldout_name(self) -> str:
        """What errors call the held-out text."""
        return f"the held-out part of {self.cfg.data.path or self.cfg.data.name}"

    def cache_settings(self) -> dict[str, Any]:
        """The arguments of ``kv.new_cache`` that the configuration sets."""
        cache = self.cfg.cache
        return {
            "block_size": cache.block_size,
            "num_blocks": cache.num_blocks,
            "memory_budget_gib": cache.memory_budget_gib,
            "prefill_reads": cache.prefill_reads,
            "spill_headroom": cache.spill_headroom,
            "backend": self.cfg.kernel.backend,
            "max_length": self.context,
        }

    def quality_settings(self, lengths: list[int]) -> dict[str, Any]:
        """`cache_settings` for sequences of these lengths, with room for whatever a text holds.

        Outliers vary with the text. Free chunks count in no figure of quality, running out of them would end a table.
        """
        settings = self.cache_settings()
        settings["spill_headroom"] = max(settings["spill_headroom"], 8.0)
        if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
            settings["num_blocks"] = sum(-(-n // settings["block_size"]) for n in lengths)
        return settings


def open_workbench(cfg: Any, context: Any) -> Workbench:
    """Load model and text, and note their hashes in the run's provenance.

    Raises:
        ModelError: the model is missing, corrupt or not supported.
        DataError: the text is.
    """
    with context.console.status("loading model and text"):
        settings = cfg.model
        model_hash = model_fingerprint(settings.path)
        model = load_model(
            settings.path,
            dtype=settings.dtype,
            device=context.device,
            device_map=settings.device_map,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
        tokenizer = load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
        shape = model_shape(model)
        try:
            corpus = load_corpus(cfg.data.name, cfg.data.path)
        except (ValueError, OSError) as error:
            raise DataError(str(error)) from error
    context.record.provenance["model_hash"] = model_hash
    context.record.provenance["data_hash"] = corpus.sha256
    context.record.metrics["model"] = {
        **dataclasses.asdict(shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    limit = min(settings.max_length or shape.max_length, shape.max_length)
    if settings.max_length is not None and settings.max_length > shape.max_length:
        raise ModelError(
            f"model.max_length must be at most the model's context of {shape.max_length}, got {settings.max_length}: "
            f"its rotary positions end there; set rope scaling in its config.json, or model.max_length={shape.max_length}"
        )
    torch.manual_seed(cfg.seed)
    return Workbench(cfg, model, tokenizer, shape, limit, corpus, model_hash, context.console)


def progress(console: Console) -> Callable[[Iterable[Any], str, int], Iterator[Any]]:
    """A ``track(items, description, total)`` that shows a progress bar."""

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        return iter(rich_track(items, description, total, console=console, transient=True))

    return track
