"""Checks a command before Hydra runs it, so that a slip costs one line: a key, an option, a range, in every point.

Hydra itself prints a page, knows no nearest match and exits with 1; worse, it finds a bad point of a sweep only when
that point's turn comes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kvquant.cli import CONFIG_NAME, conf_dir
from kvquant.config import validate
from kvquant.errors import ConfigError
from kvquant.kernel_limits import gpu_refusal
from kvquant.validation import nearest

TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


class Composer:
    """Composes configurations and knows which groups and options exist; use inside ``initialize_config_dir``.

    Args:
        config_name: the primary configuration.
        config_dir: another folder of options, as given by ``--config-dir``.
    """

    def __init__(self, config_name: str, config_dir: str | None) -> None:
        self.config_name = config_name
        self.extra = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
        self._options: dict[str, list[str]] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return the composed configuration with Hydra's own node."""
        return compose(self.config_name, overrides=[*self.extra, *overrides], return_hydra_config=True)

    def options(self, group: str) -> list[str]:
        """Return the choices of a group, schemas left out; empty when there is no such group."""
        if group not in self._options:
            loader = GlobalHydra.instance().config_loader()
            found = loader.get_group_options(group, config_name=self.config_name, overrides=self.extra)
            self._options[group] = [name for name in found if not name.startswith("_")]
        return self._options[group]

    def groups(self) -> list[str]:
        """Return every group of the configuration folder, and Hydra's launchers and sweepers."""
        loader = GlobalHydra.instance().config_loader()
        own = [group for group in loader.list_groups("") if group != "hydra"]
        return [*own, "hydra/launcher", "hydra/sweeper"]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    Raises:
        ConfigError: one of them is not ``key=value``.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        return parser.parse_overrides(list(overrides))
    except OverrideParseException as error:
        reason = str(error).split("\nSee http")[0].splitlines()
        raise ConfigError(
            f"cannot read override {error.override!r}: {reason[-1].strip(' ^')}; try key=value"
        ) from None


def check_options(composer: Composer, override: Override) -> None:
    """Refuse an option that its group does not have.

    Raises:
        ConfigError: names the nearest option, and all of them.
    """
    group = override.key_or_group
    options = composer.options(group)
    if not options or override.is_delete():
        return
    values: Iterable[object] = [override.value()]
    if override.is_sweep_override():
        values = override.sweep_iterator() if override.is_discrete_sweep() else []
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            if name is None or str(name) in options:
                continue
            close = nearest(str(name), options)
            hint = f"did you mean {group}={close}? It is" if close else f"{group} is"
            raise ConfigError(f"unknown option {group}={name}; {hint} one of {', '.join(sorted(options))}")


def check_installed(override: Override) -> None:
    """Refuse a launcher whose package is not there; without it Hydra would miss one of that package's files.

    Raises:
        ConfigError: names the package.
    """
    name = override.value() if override.key_or_group == "hydra/launcher" else None
    if name in (None, "basic") or importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher"):
        return
    raise ConfigError(
        f"hydra/launcher={name} must have the package hydra-submitit-launcher, got none installed; try "
        "pip install hydra-submitit-launcher"
    )


def known_keys(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of nested dicts, nodes and leaves."""
    for key, child in tree.items():
        yield f"{prefix}{key}"
        if isinstance(child, Mapping):
            yield from known_keys(child, f"{prefix}{key}.")


def _line(override: Override) -> str:
    """Return the override as it was typed; every parsed one has its line."""
    return str(override.input_line)


def group_choices(composer: Composer, overrides: Sequence[Override]) -> list[str]:
    """Return the overrides that choose an option, sweeps left out."""
    return [_line(o) for o in overrides if composer.options(o.key_or_group) and not o.is_sweep_override()]


def _unknown_key(composer: Composer, key: str, overrides: Sequence[Override]) -> str:
    """Say which key was probably meant, by composing with the options alone."""
    choices = group_choices(composer, overrides)
    try:
        tree = OmegaConf.to_container(composer.compose(choices))
        keys = list(known_keys(tree)) if isinstance(tree, dict) else []
    except (HydraException, OmegaConfBaseException):
        keys = []
    if "/" in key or "." not in key:
        keys += composer.groups()
    # The same parent first: task.reepats means task.repeats, not another group's key of a similar name.
    parent = key.rpartition(".")[0]
    siblings = [name for name in keys if name.rpartition(".")[0] == parent]
    close = nearest(key, siblings) or nearest(key, keys)
    if close:
        return f"unknown key {key}; did you mean {close}?"
    if parent and siblings:
        return f"unknown key {key}; {parent} has {', '.join(sorted(s.rpartition('.')[2] for s in siblings))}"
    return f"unknown key {key}; see `python src/run.py --cfg job` for all keys"


def explain(composer: Composer, error: Exception, overrides: Sequence[Override]) -> str:
    """Turn what Hydra or OmegaConf raised while composing into one line."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    key = getattr(cause, "full_key", None)
    named = re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", str(error))
    if named or (isinstance(cause, ConfigAttributeError | ConfigKeyError) and key):
        return _unknown_key(composer, named.group(1) if named else str(key), overrides)
    wrong_type = re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", text)
    if wrong_type and key:
        value, kind = wrong_type.groups()
        return f"{key} must be {TYPE_NAMES.get(kind, kind)}, got {value or 'nothing'}; {_current(composer, key, overrides)}"
    return f"{key}: {text}" if key else " ".join(str(error).split())


def _current(composer: Composer, key: str, overrides: Sequence[Override]) -> str:
    choices = group_choices(composer, overrides)
    try:
        return f"try {key}={OmegaConf.select(composer.compose(choices), key)}"
    except (HydraException, OmegaConfBaseException):
        return "see `python src/run.py --cfg job`"


def points(overrides: Sequence[Override], preset_params: Sequence[Override]) -> list[list[str]]:
    """Expand a sweep as Hydra's basic sweeper does.

    Args:
        overrides: from the command line; they win over a preset's parameters of the same key.
        preset_params: from ``hydra.sweeper.params``.

    Returns:
        One list of overrides per point.
    """
    by_key: dict[str, list[str]] = {}
    for override in [*preset_params, *overrides]:
        key = override.get_key_element()
        if not override.is_sweep_override():
            by_key[key] = [_line(override)]
        elif override.is_discrete_sweep():
            by_key[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [list(point) for point in itertools.product(*by_key.values())]


def check_command(args: argparse.Namespace, *, only_compose: bool = False) -> None:
    """Check everything that can be known before a task starts.

    Args:
        args: what Hydra's own argument parser made of the command line.
        only_compose: the configuration is shown, not run, so ranges are left alone.

    Raises:
        ConfigError: the first thing wrong, with the nearest match or a fix.
    """
    commands = [flag for flag in ("run", "multirun", "cfg", "info") if getattr(args, flag)]
    if len(commands) > 1:
        raise ConfigError(
            f"only one of --run, --multirun, --cfg, --info can be given, got --{' and --'.join(commands)}"
        )
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="run"):
        composer = Composer(args.config_name or CONFIG_NAME, args.config_dir)
        overrides = parse(args.overrides)
        for override in overrides:
            check_options(composer, override)
            check_installed(override)
        try:
            _check(composer, overrides, multirun=args.multirun, only_compose=only_compose)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(composer, error, overrides)) from None


def check_launcher(cfg: DictConfig, *, multirun: bool) -> None:
    """Refuse a launcher that would be ignored, or that cannot start a job from this machine.

    Args:
        cfg: the composed configuration with Hydra's own node.
        multirun: whether this is a sweep; only sweeps have launchers.

    Raises:
        ConfigError: says what is missing.
    """
    name = OmegaConf.select(cfg, "hydra.runtime.choices.hydra/launcher")
    # That task looks at the launcher's settings itself, and names all that is wrong with them at once.
    if name in (None, "basic") or cfg.task.name == "slurm_check":
        return
    if not multirun:
        raise ConfigError(
            f"hydra/launcher={name} must come with -m, since Hydra ignores it otherwise and would start the run on "
            "this machine; add -m"
        )
    try:
        settings = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    except OmegaConfBaseException as error:
        variable = re.search(r"Environment variable '(\w+)' not found", str(error))
        if variable is None:
            return
        key = str(error.full_key or "").rpartition(".")[2] or "account"
        raise ConfigError(
            f"hydra.launcher.{key} must be given, got no environment variable {variable.group(1)}; "
            f"try export {variable.group(1)}=<grant>-gpu-a100"
        ) from None
    if isinstance(settings, dict) and "partition" in settings and shutil.which("sbatch") is None:
        raise ConfigError(
            f"hydra/launcher={name} must find sbatch, got none on this machine; submit from a login node, or try "
            "hydra/launcher=local"
        )


def check_gpu(cfg: DictConfig, launcher: str | None) -> None:
    """Refuse ``kernel=triton`` where no GPU of this machine runs it; jobs for other machines look there, at their start.

    Args:
        cfg: a composed configuration.
        launcher: the choice of ``hydra/launcher``.

    Raises:
        ConfigError: says why, and which backend works.
    """
    if cfg.kernel.backend != "triton" or launcher not in (None, "basic", "local"):
        return
    reason = gpu_refusal()
    if reason is not None:
        raise ConfigError(f"kernel.backend=triton {reason}; try kernel=pytorch_fused")


def _check(composer: Composer, overrides: list[Override], *, multirun: bool, only_compose: bool) -> None:
    first = points(overrides, [])[0]
    base = composer.compose(first)
    sweeps = [override for override in overrides if override.is_sweep_override()]
    multirun = multirun or base.hydra.mode == RunMode.MULTIRUN
    if sweeps and not multirun:
        line = _line(sweeps[0])
        raise ConfigError(f"{line} gives several values, which is a sweep; add -m to run one job for each")
    if only_compose:
        return
    check_launcher(base, multirun=multirun)
    params = (base.hydra.sweeper.get("params") or {}) if multirun else {}
    if params and any(sweep.key_or_group == "experiment" for sweep in sweeps):
        # Hydra reads a preset's parameters before it expands a sweep over presets: they would be ignored.
        raise ConfigError(
            "experiment=a,b cannot sweep over presets that sweep; try experiment=[a,b] to combine them"
        )
    grid = points(overrides, parse([f"{key}={value}" for key, value in params.items()]))
    if multirun and OmegaConf.select(base, "hydra.runtime.choices.hydra/sweeper") == "resumable":
        # That sweeper composes and checks every point itself before it starts one; twice would take twice as long.
        grid = grid[:1]
    for point in grid:
        cfg = composer.compose(point)
        launcher = OmegaConf.select(cfg, "hydra.runtime.choices.hydra/launcher")
        with open_dict(cfg):
            cfg.pop("hydra")
        try:
            validate(cfg)
            check_gpu(cfg, launcher if multirun else None)
        except ConfigError as error:
            swept = [entry for entry in point if entry not in {_line(o) for o in overrides}]
            where = f" (in the sweep's point {' '.join(swept)})" if swept else ""
            raise ConfigError(f"{error}{where}") from None
