"""What the schema of every task starts from."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class TaskConfig:
    """What a run does; each task adds its fields in a subclass, and their ranges in `check`."""

    name: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """Raise a ConfigError for a field out of range; ``task`` is the composed node."""
