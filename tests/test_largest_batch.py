"""task=largest_batch under a small cap: memory is filled until a prompt is refused, and what is held is real."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.errors import ConfigError, PoolExhausted
from kvquant.results import load_result
from kvquant.tasks import run_task

SMALL = [
    "task=largest_batch",
    "device=cpu",
    "energy.meter=none",
    "task.shape=small",
    "task.layers=2",
    "task.prompt_tokens=100",
    "task.weights_gib=0",
    "task.memory_budget_gib=0.001",
    "task.bits=[4,2]",
]


def composed(*overrides: str):
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*SMALL, *overrides])


def test_memory_is_filled_until_a_prompt_is_refused(tmp_path):
    run_task.execute(composed(), run_dir=tmp_path, console=Console(quiet=True))
    result = load_result(tmp_path)
    metrics = result["metrics"]
    assert result["status"] == "ok" and len(result["table"]["rows"]) == 3
    assert [entry["step"] for entry in metrics["steps"]][2:] == [
        f"filling the memory, {name}" for name in ("exact", "nuq4", "nuq2")
    ]
    # Two blocks of 64 tokens hold a prompt: 2 layers x 2 sides x 128 tokens x 128 channels x 2 bytes.
    budget, exact = metrics["budget_bytes"], 2 * 2 * 128 * 128 * 2
    assert metrics["exact_sequences"] == (budget - 4096) // exact
    for name in ("exact", "nuq4", "nuq2"):
        assert metrics[f"{name}_pool_bytes"] <= budget
        # One more would not have fitted.
        per_sequence = metrics[f"{name}_held_bytes"] / metrics[f"{name}_sequences"]
        assert metrics[f"{name}_pool_bytes"] + per_sequence > 0.95 * budget
        assert "block" in metrics[f"{name}_refusal"] and metrics[f"{name}_attend_s"] > 0
    assert 0.008 < metrics["nuq4_key_outlier_fraction"] < 0.012 and 0 <= metrics["nuq4_spilled_blocks"] < 1
    assert "exact_key_outlier_fraction" not in metrics
    assert metrics["nuq4_times_exact"] == metrics["nuq4_sequences"] / metrics["exact_sequences"]
    assert 1 == metrics["exact_times_exact"] < metrics["nuq4_times_exact"] < metrics["nuq2_times_exact"]
    # 128 channels carry much slack and many tables; still it is bits that decide.
    assert metrics["nuq2_times_exact"] == pytest.approx(
        metrics["exact_effective_bits"] / metrics["nuq2_effective_bits"], rel=0.25
    )


def test_a_memory_for_not_even_one_prompt_says_so(tmp_path):
    with pytest.raises(PoolExhausted, match="must hold a prompt of 100 tokens"):
        cfg = composed("task.memory_budget_gib=0.0001")
        run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
    assert load_result(tmp_path)["status"] == "out_of_memory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.shape=gpt2", "task.shape must be one of llama2_7b"),
        ("task.bits=[2,2]", "task.bits must be widths"),
        ("task.memory_share=0", "task.memory_share must be above 0"),
        ("quant=kivi", "quant.method must be nuq"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        validate(composed(override))
