"""The errors this project raises on purpose: one clear line each, safe to pickle across processes."""

from __future__ import annotations


class KVQuantError(Exception):
    """Base of every error that a user can act on.

    Takes exactly one string, because a job's exception travels back to the launcher pickled and an exception
    class with several arguments cannot be rebuilt there.

    Args:
        message: the constraint, the value that broke it, and a fix.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The message as given."""
        return str(self.args[0])


class ConfigError(KVQuantError):
    """A setting is unknown, out of range, or cannot be combined with another."""


class ModelError(KVQuantError):
    """A model is missing, corrupt, or of a kind that is not supported."""


class DataError(KVQuantError):
    """A text, trace or prompt is missing, unreadable or too short."""


class CalibrationError(KVQuantError):
    """A calibration is missing, corrupt, or was made for another model, data set or setting."""


class PoolExhausted(KVQuantError):
    """The block pool cannot take the tokens asked for; everything stored so far is intact."""


class NonFiniteActivations(KVQuantError):
    """A key or value is NaN or infinite; the message names the layer and the channel."""


class DeviceError(KVQuantError):
    """The device asked for does not exist here, or cannot do what is asked of it."""


class ResultError(KVQuantError):
    """A result.json cannot be written, or what was read is not one."""


class MeterError(KVQuantError):
    """An energy meter could not be read."""


class MeterUnavailable(MeterError):
    """A meter cannot be opened here, or stopped answering."""


class CounterStalled(MeterError):
    """An energy counter stood still while time went by."""


class CounterReset(MeterError):
    """An energy counter started again from below: what it had counted is lost."""


class CounterJumped(MeterError):
    """An energy counter rose faster than the device can draw power."""


class ReadingLate(MeterError):
    """No reading of an energy counter lies near enough to a window's edge."""


class LaunchError(KVQuantError):
    """Jobs were refused by the scheduler, or some points of a sweep did not end well."""
