"""Exceptions travel between processes: a Slurm job's error comes back to the launcher pickled."""

from __future__ import annotations

import inspect
import pickle

import pytest

from kvquant import errors

FAMILY = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.KVQuantError)]


@pytest.mark.parametrize("kind", FAMILY, ids=lambda c: c.__name__)
def test_errors_survive_pickling(kind: type[errors.KVQuantError]) -> None:
    error = pickle.loads(pickle.dumps(kind("quant.bits must be 1 to 8, got 9; try 4")))
    assert type(error) is kind
    assert error.message == str(error) == "quant.bits must be 1 to 8, got 9; try 4"


def test_the_family_is_complete() -> None:
    assert {"ConfigError", "ModelError", "DataError", "CalibrationError", "PoolExhausted"} <= {
        kind.__name__ for kind in FAMILY
    }
