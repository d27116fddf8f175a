"""Every option and every preset composes and passes validation; ranges and combinations are refused with a fix."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.errors import ConfigError

CONF = conf_dir()
# Options that need a path nobody can guess.
NEEDED = {
    "model=local": ["model.path=/somewhere"],
    "data=wikitext2": ["data.path=/somewhere"],
    "data=text_file": ["data.path=/somewhere"],
    "batch=trace": ["batch.trace_path=/somewhere.csv"],
    "task=longbench": ["task.path=/somewhere"],
    "quant=hf_quantized": ["task=perplexity"],
}
# Groups whose options set keys of several others.
PRESETS = ("experiment", "paper")


def _options() -> list[str]:
    files = sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF and p.parent.name not in PRESETS)
    return [f"{p.parent.relative_to(CONF).as_posix()}={p.stem}" for p in files if "hydra" not in p.parts]


def _presets() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def _paper_runs() -> list[str]:
    return sorted(path.stem for path in (CONF / "paper").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra_session() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        yield


@functools.cache
def _runs_of(preset: str) -> list[str]:
    cfg = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
    return cfg.hydra.sweeper.params["paper"].split(",")


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("option", _options())
def test_every_option_composes_and_validates(option: str) -> None:
    cfg = composed(option, *NEEDED.get(option, []))
    validate(cfg)


@pytest.mark.parametrize("option", _options())
def test_every_option_starts_from_its_schema_and_says_why(option: str) -> None:
    group, name = option.split("=")
    text = (CONF / group / f"{name}.yaml").read_text()
    schema = f"_{name}" if group == "task" else "_schema"
    assert f"defaults: [{schema}, _self_]" in text
    assert text.startswith("# ")


@pytest.mark.parametrize("option", sorted(set(NEEDED) - {"quant=hf_quantized"}))
def test_a_required_path_is_asked_for_by_name(option: str) -> None:
    key = NEEDED[option][0].partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key} must be given"):
        validate(composed(option))


@pytest.mark.parametrize("preset", _presets())
def test_every_preset_composes_and_validates(preset: str) -> None:
    cfg = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
    params = cfg.hydra.sweeper.params or {}
    # Without the mode a preset's sweep is silently ignored.
    assert (cfg.hydra.mode is not None and cfg.hydra.mode.name == "MULTIRUN") == bool(params)
    for key, values in params.items():
        for value in str(values).split(","):
            validate(composed(f"experiment={preset}", f"{key}={value}"))
    validate(composed(f"experiment={preset}"))
    validate(composed(f"experiment=[{preset},smoke]"))


@pytest.mark.parametrize("name", _paper_runs())
def test_every_run_of_the_paper_composes_and_belongs_to_a_preset(name: str) -> None:
    validate(composed(f"paper={name}"))
    # The last word is smoke's, or the paper could not be built in continuous integration.
    cfg = composed(f"paper={name}", "experiment=smoke")
    validate(cfg)
    assert cfg.data.heldout_tokens == 512
    assert name in [run for preset in ("paper", "paper_a100") for run in _runs_of(preset)]


def test_the_default_job_is_the_documented_one() -> None:
    cfg = compose("config", return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    expected = (
        "model=tiny quant=nuq cache=blocked kernel=auto batch=ragged data=stdlib task=prefill tracking=none"
    )
    assert " ".join(f"{g}={choices[g]}" for g in (e.partition("=")[0] for e in expected.split())) == expected
    assert cfg.hydra.job.chdir is False
    assert "%f" in OmegaConf.to_container(cfg.hydra.run)["dir"], (
        "two runs of one second must not share a folder"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("quant.bits=9", "quant.bits must be 1 to 8, got 9; try 4"),
        ("quant.bits=0", "quant.bits must be 1 to 8, got 0; try 4"),
        ("quant.key_bits=12", "quant.key_bits must be 1 to 8, got 12"),
        ("quant.outlier_fraction=-0.1", "quant.outlier_fraction must be at least 0"),
        ("quant.method=nuqq", "quant.method must be one of"),
        ("cache.block_size=60", "cache.block_size must be a multiple of 32 from 32 to 1024, got 60; try 64"),
        ("cache.block_size=4096", "got 4096; try 1024"),
        ("cache.block_size=0", "got 0; try 32"),
        ("cache.num_blocks=4 cache.memory_budget_gib=1", "both size the pool"),
        ("cache.memory_budget_gib=0", "cache.memory_budget_gib must be above 0"),
        ("cache.prefill_reads=exakt", "try exact"),
        ("cache.prefill_reads=exact task=perplexity", "try cache.prefill_reads=quantized"),
        ("batch=single batch.prompt_tokens=0", "batch.prompt_tokens must be 1 or more"),
        ("batch=uniform batch.prompt_tokens=null", "batch.prompt_tokens must be given with batch=uniform"),
        ("batch=single batch.num_prompts=2", "try batch=uniform"),
        ("batch.max_fraction_of_context=1.5", "above 0 and at most 1"),
        ("batch.trace_quantiles=[1,2]", "batch.quantile_levels must be as many as"),
        ("batch.trace_quantiles=[] batch.quantile_levels=[]", "at least one length"),
        ("batch.trace_quantiles=[9,2] batch.quantile_levels=[0.1,0.5]", "growing from 1"),
        ("batch.trace_quantiles=[1,2] batch.quantile_levels=[0.5,0.1]", "rising from 0 to 1"),
        ("data.calibration_tokens=3", "calibration_tokens must be 16 or more, got 3; try 8192"),
        ("device=gpu", "device must be one of auto, cpu, cuda, got gpu"),
        ("model.dtype=fp16", "model.dtype must be one of"),
        ("seed=-1", "seed must be 0 to"),
        ("energy.country=pl", "energy.country must be an ISO 3166 code"),
        ("task=perplexity task.window=64 task.stride=128", "task.stride must be at most task.window=64"),
        ("task=generate task.prompt=''", "task.prompt must be at least one token long"),
        ("task=allocation task.channels=100", "a multiple of task.head_dim=128, got 100"),
        ("+quant.foo=1", "unknown key"),
    ],
)
def test_bad_values_are_refused_with_key_value_and_fix(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cfg = composed(*(part for part in overrides.split() if not part.startswith("+")))
        with open_dict(cfg):
            for part in overrides.split():
                if part.startswith("+"):
                    key, _, value = part[1:].partition("=")
                    OmegaConf.update(cfg, key, value, force_add=True)
        validate(cfg)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_the_shipped_trace_quantiles_match_the_shared_trace() -> None:
    cfg = composed("batch=ragged")
    assert len(cfg.batch.quantile_levels) == len(cfg.batch.trace_quantiles)
    # The published percentiles of the Azure 2023 conversation trace.
    by_level = dict(zip(cfg.batch.quantile_levels, cfg.batch.trace_quantiles, strict=True))
    assert (by_level[0.5], by_level[0.9], by_level[0.99]) == (1020, 2734, 4142)


def test_presets_hold_deltas_and_are_global() -> None:
    for path in (path for group in PRESETS for path in (CONF / group).glob("*.yaml")):
        assert path.read_text().startswith("# @package _global_\n# ")
