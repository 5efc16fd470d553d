"""Every error and warning of the package; each is also a standard type, so that ``except ValueError`` works.

The text of an error names the value found, what is allowed, and which knob to turn.
"""

from __future__ import annotations

from importlib.util import find_spec


class WeightLoraError(Exception):
    """Base class of all errors that a user can cause; the command line prints the text and exits with status 2."""


class OptionError(WeightLoraError, ValueError):
    """An argument is out of its range, or no option has this name."""


class SiteError(WeightLoraError, ValueError):
    """The model has no layer that can carry an adapter, or the wanted layers do not exist."""


class SelectionError(WeightLoraError, RuntimeError):
    """The selection could not score the adapters; the model is unchanged."""


class PlanError(WeightLoraError, ValueError):
    """A file is not a valid plan."""


class PlanMismatchError(PlanError):
    """A plan does not match a model; the text lists the differences."""


class ServingError(WeightLoraError, ValueError):
    """A runtime cannot read an adapter in any layout; the text says why, and what can be served instead."""


class StackError(WeightLoraError, ValueError):
    """A training stack cannot train a plan; the text says what the stack can express and what the plan has."""


class DataError(WeightLoraError, ValueError):
    """A data file is missing, malformed or lacks a column."""


class MissingPackageError(WeightLoraError, ImportError):
    """A package of an extra is not installed; the text says how to install it."""


class OutputError(WeightLoraError, OSError):
    """A result could not be written; no partial file was left."""


class WeightLoraWarning(UserWarning):
    """Something was done differently from what was asked; the text says what, and how to avoid it."""


def require_extra(package: str, extra: str) -> None:
    """Raise where a package that comes with an extra is not installed; call it before long work begins.

    Args:
        package: The name that is imported.
        extra: The extra of weightlora that installs it.

    Raises:
        MissingPackageError: It is not installed.

    Example:
        >>> require_extra("json", "train")
        >>> require_extra("no_such_package", "train")
        Traceback (most recent call last):
        ...
        weightlora.errors.MissingPackageError: no_such_package is not installed; run: pip install 'weightlora[train]'
    """
    if find_spec(package) is None:
        raise MissingPackageError(f"{package} is not installed; run: pip install 'weightlora[{extra}]'")
