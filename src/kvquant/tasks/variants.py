"""The rows of a table of methods: options of the quant group with changes, written as a list that multiplies out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from kvquant.cli import conf_dir
from kvquant.errors import ConfigError
from kvquant.methods import method_class
from kvquant.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: what it is called and how it stores keys and values."""

    label: str
    spec: QuantSpec


def expand(rows: Iterable[Any]) -> list[Variant]:
    """Turn ``{option: [nuq, uniform], bits: [2, 3]}`` into four variants, in order, without repetitions.

    Args:
        rows: mappings with ``option`` (a file of conf/quant), fields of QuantSpec to change, and perhaps ``label``;
            a list stands for each of its values.

    Raises:
        ConfigError: an option or a field that does not exist, a value it cannot take, or a label given twice.
    """
    out: dict[QuantSpec, Variant] = {}
    for index, row in enumerate(rows):
        if OmegaConf.is_config(row):
            row = OmegaConf.to_container(row, resolve=True)
        if not isinstance(row, Mapping) or "option" not in row:
            raise ConfigError(
                f"task.variants[{index}] must be a mapping with an option of the quant group, got {row}; "
                "try {option: nuq, bits: 2}"
            )
        choices = [value if isinstance(value, list) else [value] for value in row.values()]
        for values in itertools.product(*choices):
            variant = _variant(index, dict(zip(row, values, strict=True)))
            same = [v for v in out.values() if v.label == variant.label and v.spec != variant.spec]
            if same:
                raise ConfigError(
                    f"task.variants[{index}] must have a label of its own, got {variant.label} a second time; leave label out"
                )
            out.setdefault(variant.spec, variant)
    return list(out.values())


def _variant(index: int, settings: dict[str, Any]) -> Variant:
    option, label = str(settings.pop("option")), settings.pop("label", None)
    path = conf_dir() / "quant" / f"{option}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"task.variants[{index}].option must be one of {', '.join(known)}, got {option}; try nuq"
        )
    base = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(base, dict)
    base.pop("defaults", None)
    known = sorted(field.name for field in dataclasses.fields(QuantSpec))
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(
            f"task.variants[{index}] must name fields of the quant group, got {unknown[0]}; try one of {', '.join(known)}"
        )
    options = {**base.pop("options", {}), **settings.get("options", {})}
    merged = {**base, **settings, "options": options}
    try:
        spec = QuantSpec(**merged)  # type: ignore[arg-type]
        method_class(spec.method).check(spec)
    except ValueError as error:
        raise ConfigError(f"task.variants[{index}]: {error}") from None
    return Variant(label or describe(option, spec, settings), spec)


def describe(option: str, spec: QuantSpec, changes: Mapping[str, Any]) -> str:
    """A short name: ``nuq2-1%``, with what else was changed behind it."""
    bits = spec.key_bits if spec.key_bits == spec.value_bits else f"k{spec.key_bits}v{spec.value_bits}"
    name = f"{option}{'' if spec.is_exact else bits}"
    if spec.outlier_fraction:
        name += f"-{100 * spec.outlier_fraction:g}%"
    skipped = {"bits", "key_bits", "value_bits", "outlier_fraction", "options", "method", "fisher_weight"}
    extra = [
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changes.items() if k not in skipped
    ]
    extra += [f"{k}={v}" for k, v in changes.get("options", {}).items()]
    if "fisher_weight" in changes:
        extra.append(f"{spec.fisher_weight}")
    return " ".join([name, *extra])
