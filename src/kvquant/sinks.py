"""Which leading tokens of a sequence are sinks in a layer, told from calibration."""

from __future__ import annotations

from torch import Tensor

from kvquant.spec import QuantSpec

# Standard deviations of all other tokens that a leading position must be off their mean.
_DEVIATIONS = 3.0


def sinks_of_layer(
    spec: QuantSpec, keys: Tensor, positions: Tensor | None, attention_mass: Tensor | None
) -> int:
    """How many leading tokens one layer keeps exactly: ``spec.sink_tokens`` of them, or those that stand out.

    Args:
        spec: ``sink_tokens`` and ``sink_rule``.
        keys: calibration tokens, [T, H, D].
        positions: position of each in its sequence, [T]; None: none of them leads.
        attention_mass: what the first tokens draw (`kvquant.models.attention_mass`), [at most T].

    Raises:
        ValueError: the rule needs the attention mass, which is not there.
    """
    if not spec.sink_tokens or spec.sink_rule == "position" or positions is None:
        return spec.sink_tokens
    if spec.sink_rule == "key_norm":
        norm = keys.float().flatten(1).norm(dim=1)
        return predicted_sinks(norm, positions, spec.sink_tokens)
    if attention_mass is None:
        raise ValueError(
            "quant.sink_rule=attention_mass must be calibrated with a model's attention_mass, got none; "
            "use kvquant.calibration.calibrate, or try quant.sink_rule=key_norm"
        )
    return predicted_sinks(
        attention_mass, positions[: len(attention_mass)], spec.sink_tokens, below_counts=False
    )


def predicted_sinks(measure: Tensor, positions: Tensor, most: int, *, below_counts: bool = True) -> int:
    """How many leading positions are sinks: up to the last one whose mean is off the other tokens'.

    Args:
        measure: what marks a sink, of every token, [T]; NaN where it is not known.
        positions: of each token in its sequence, [T].
        most: at most so many.
        below_counts: whether a mean far below the others' marks a sink too (the norm of a sink's key may be either).
    """
    known = ~measure.isnan()
    measure, positions = measure[known].float(), positions[known]
    rest = measure[positions >= most]
    if not len(rest):
        return most
    found = 0
    for position in range(most):
        here = measure[positions == position]
        if not len(here):
            continue
        off = here.mean() - rest.mean()
        if bool((off.abs() if below_counts else off) > _DEVIATIONS * rest.std()):
            found = position + 1
    return found
