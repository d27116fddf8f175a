"""The one way a schema refuses a value."""

from typing import Any

from kvquant.errors import ConfigError


def require(ok: bool, key: str, constraint: str, value: Any, fix: str) -> None:
    """Raise a ConfigError that states constraint, value and fix, unless ``ok``."""
    if not ok:
        raise ConfigError(f"{key} must be {constraint}, got {value}; try {fix}")
