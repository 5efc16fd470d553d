"""Every error and warning of the package; each is also a stdlib type, so old ``except ValueError`` code works.

The text of an error names the value found, what is allowed, and which knob to turn.
"""

from __future__ import annotations


class WeightLoraError(Exception):
    """Root of all errors that a user can cause; the command line prints its text and exits 2."""


class OptionError(WeightLoraError, ValueError):
    """An argument is out of its range, or no option has this name."""


class SiteError(WeightLoraError, ValueError):
    """The model has no layer that could carry an adapter, or the wanted ones do not exist."""


class SelectionError(WeightLoraError, RuntimeError):
    """The warm-up could not tell which adapters matter; the model is as it was."""


class PlanError(WeightLoraError, ValueError):
    """A plan file is not readable as a plan."""


class PlanMismatchError(PlanError):
    """A plan and a model do not belong together; the text lists what does not match."""


class DataError(WeightLoraError, ValueError):
    """A data file is missing, malformed or lacks a column."""


class OutputError(WeightLoraError, OSError):
    """A result could not be written; nothing half-written was left behind."""


class WeightLoraWarning(UserWarning):
    """Something was done differently from what was asked; the text says what and how to silence it."""
