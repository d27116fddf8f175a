"""Schemas of every configuration group; ranges and combinations are checked in `kvquant.validation`.

Values live in YAML under conf/; these dataclasses give them types, so that a misspelt key or a wrong type fails
while the configuration is composed, before torch is imported. A schema is the option ``_schema`` of its group,
or ``_<name>`` where each option of a group has fields of its own (tasks), and an option's file starts with
``defaults: [_schema, _self_]``. A field that some option requires (``path: ???``) defaults to MISSING here, because
a merge never lets ??? replace a value.

A further task: a dataclass <Name>Task(TaskConfig) in one of the ``*_tasks`` modules, with `name: str = "<name>"` and, for its
ranges, a `check`; beside it conf/task/<name>.yaml starting with `defaults: [_<name>, _self_]`. Nothing else changes: every
subclass of TaskConfig is registered.
"""

from kvquant.config import cost_tasks, other_tasks, quality_tasks  # registers their tasks
from kvquant.config.checks import require
from kvquant.config.other_tasks import TrainStage, TrainTask
from kvquant.config.task_base import TaskConfig
from kvquant.config.whole import Config, register_schemas, validate

__all__ = [
    "Config",
    "TaskConfig",
    "TrainStage",
    "TrainTask",
    "cost_tasks",
    "other_tasks",
    "quality_tasks",
    "register_schemas",
    "require",
    "validate",
]
