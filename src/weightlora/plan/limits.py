"""What a user wants to save: adapters, parameters, step time, memory. Each is a limit, and all of them hold.

With a store, time is that of the whole training: below the floor blocks run once for each row, and only forward.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from weightlora.errors import OptionError, WeightLoraWarning

#: What a plan calls its rule where nothing is scored.
UNIFORM = "uniform"
#: The options' names, in the order in which they are told.
LIMITS = ("adapters", "parameters", "time", "memory")
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_ALLOWED = {
    "adapters": "a number of adapters such as 18, or a share of them in (0, 1] such as 0.5",
    "parameters": "a number of parameters such as 300000, or a share of LoRA's in (0, 1] such as 0.1",
    "time": "a share of LoRA's time in (0, 1], such as 0.6",
    "memory": 'the peak of the device with a unit, such as "8GB" or "7.5GiB"',
}
#: Where the lowest adapter may lie, as a share of the depth, for the line of a plan and for an estimate.
FLOORS = ("1/6", "1/3", "1/2", "2/3", "5/6")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The four limits of a selection, checked; None is no limit.

    Args:
        adapters: At most so many whole adapters at the user's rank, the paper's K: ``18``, or a share of the candidates
            such as ``0.5``. ``1`` is one adapter, ``1.0`` all of them.
        parameters: At most so many trained adapter parameters: ``300_000``, or a share of LoRA's such as ``0.1``.
        time: At most this share of LoRA's time, in (0, 1].
        memory: At most this peak of the device, such as ``"8GB"``: weights, activations, gradients and optimizer.

    Raises:
        OptionError: A limit is out of its range.

    Example:
        >>> Limits(parameters=0.1, time=0.6).asked
        {'parameters': 0.1, 'time': 0.6}
        >>> Limits().k_of(36), Limits(adapters=18).k_of(36), Limits(parameters=0.1).k_of(36)
        (18, 18, None)
    """

    adapters: float | None = None
    parameters: float | None = None
    time: float | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        for name in LIMITS:
            object.__setattr__(self, name, check_limit(name, getattr(self, name)))

    @property
    def asked(self) -> dict[str, Any]:
        """The limits that are given."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    @property
    def limits(self) -> Limits:
        """The limits alone; half of the adapters where none is given, as the paper recommends."""
        return Limits(**(self.asked or {"adapters": 0.5}))

    @property
    def are_measured(self) -> bool:
        """Whether a step of the model decides what fits."""
        return self.time is not None or self.memory is not None

    @property
    def frees_ranks(self) -> bool:
        """Whether parameters are the only limit, so that a lower rank on all sites fits as well as fewer sites."""
        return [*self.asked] == ["parameters"]

    @property
    def text(self) -> str:
        """The limits as they are written in Python.

        Example:
            >>> Limits(adapters=18, memory="8GB").text
            "adapters=18, memory='8GB'"
        """
        return ", ".join(f"{name}={value!r}" for name, value in self.asked.items())

    def k_of(self, n: int) -> int | None:
        """Return the most adapters of ``n`` candidates; None where they are not limited.

        Raises:
            OptionError: There are fewer candidates, or the share of them is less than one adapter.
        """
        limits = self.limits
        if limits.adapters is None:
            return None
        if isinstance(limits.adapters, int):
            if limits.adapters > n:
                raise OptionError(
                    f"adapters={limits.adapters} exceeds the {n} candidate sites; lower it or widen target_modules"
                )
            return limits.adapters
        k = math.floor(_decimal(limits.adapters) * n)
        if k == 0:
            raise OptionError(f"adapters={limits.adapters} of {n} candidate sites is less than one adapter; raise it")
        return k

    def parameters_of(self, total: int, besides: int = 0) -> int | None:
        """Return the most parameters of the sites' adapters; None where they are not limited.

        Args:
            total: LoRA's, on all sites.
            besides: Those of adapters that are not chosen. A number of parameters is for all adapters together.

        Raises:
            OptionError: Nothing is left beside them.

        Example:
            >>> Limits(parameters=0.1).parameters_of(30), Limits(parameters=300_000).parameters_of(1_000_000)
            (3, 300000)
        """
        if self.parameters is None:
            return None
        if isinstance(self.parameters, int):
            left = self.parameters - besides
            if left < 1:
                raise OptionError(
                    f"parameters={self.parameters} leaves nothing beside {besides:,} parameters of target_parameters; "
                    "raise it or lower r"
                )
            return left
        # The decimal that the user wrote, not the float nearest to it: 0.1 of 30 parameters are 3.
        return math.floor(_decimal(self.parameters) * total)

    def time_of(self, total: int) -> int | None:
        """Return the most time of a step, in the unit of LoRA's ``total``; None where it is not limited."""
        return None if self.time is None else math.floor(_decimal(self.time) * total)

    def warn_of_all(self, stacklevel: int) -> None:
        """Warn where the only limit is 1.0, so that nothing is selected; 1 may have been meant.

        Args:
            stacklevel: As of ``warnings.warn``, counted from here.
        """
        one = {"adapters": "one adapter", "parameters": "one parameter"}
        for name, what in one.items():
            if [*self.asked] == [name] and isinstance(value := self.asked[name], float) and value == 1.0:
                text = f"{name}=1.0 is all of them, so nothing is selected; {name}=1 is {what}, 0.5 half of them"
                warnings.warn(text, WeightLoraWarning, stacklevel=stacklevel)

    @property
    def bytes(self) -> int | None:
        """The limit on memory in bytes.

        Example:
            >>> Limits(memory="1.5GB").bytes, Limits(memory="1.5 GiB").bytes
            (1500000000, 1610612736)
        """
        return None if self.memory is None else read_bytes(self.memory)


def check_limit(name: str, value: Any) -> Any:
    """Return a value of the limit ``name`` as an int, float, text or None; no model is needed.

    Raises:
        OptionError: It is not allowed.

    Example:
        >>> check_limit("adapters", 18), check_limit("time", 1), check_limit("memory", None)
        (18, 1.0, None)
    """
    if value is None:
        return None
    if name == "memory":
        if isinstance(value, str) and read_bytes(value) is not None:
            return value
    elif not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < math.inf:
        if isinstance(value, Integral) and name != "time":
            return int(value)
        if float(value) <= 1:
            return float(value)
    raise OptionError(f"{name}={value!r:.80} is not allowed: give {_ALLOWED[name]}")


def read_limit(name: str, text: str) -> float | str:
    """Return a limit as it is written on a command line, checked.

    Raises:
        OptionError: It is none.

    Example:
        >>> read_limit("adapters", "18"), read_limit("parameters", "0.1"), read_limit("memory", "8GB")
        (18, 0.1, '8GB')
    """
    value: Any = text.strip()
    for number in () if name == "memory" else (int, float):
        try:
            value = number(text)
            break
        except ValueError:
            continue
    return check_limit(name, value)


def read_limits(texts: Mapping[str, str | None]) -> dict[str, float | str]:
    """Return the limits among options of a command line, without those that are not given.

    Example:
        >>> read_limits({"adapters": None, "time": "0.6", "seed": "3"})
        {'time': 0.6}
    """
    return {name: read_limit(name, text) for name in LIMITS if (text := texts.get(name)) is not None}


def _decimal(value: float) -> Fraction:
    return Fraction(str(float(value)))


def read_bytes(text: str) -> int | None:
    """Return a size with its unit as a number of bytes; None where it is none.

    Example:
        >>> read_bytes("10MB"), read_bytes("1.5 GiB"), read_bytes("10")
        (10000000, 1610612736, None)
    """
    match = re.fullmatch(r"\s*(\d[\d_]*\.?\d*|\.\d+)\s*([kmg]i?b)\s*", text, re.IGNORECASE)
    amount = int(Fraction(match.group(1).replace("_", "")) * _BYTES[match.group(2).lower()]) if match else 0
    return amount or None


# -- the time of a training with a store -------------------------------------------------------------------------------


def run_time(
    floor: int, epochs: float, forward: Sequence[float], backward: Sequence[float], *, rest: float = 0.0
) -> float:
    """Return the time of a training whose lowest adapter is in block ``floor``, in the unit of the blocks' times.

    With E epochs::

        E · (rest + Σ above (forward + backward)) + min(E, 1) · Σ below forward

    Where all blocks take the same, forward and backward passes sum to 1 each and a share f lies below the floor, that
    is 2(1 − f)E + f; LoRA on all blocks takes 2E, and (2 − f)E without a store.

    Args:
        floor: How many blocks lie below the lowest adapter.
        epochs: How often each row is seen; 2.5 is two epochs and a half.
        forward: Of a forward pass of all rows through each block, the lowest first.
        backward: The same of the backward pass.
        rest: Of everything outside of the blocks, such as the output head.

    Example:
        >>> halves = [1 / 6] * 6
        >>> round(run_time(3, 3, halves, halves), 6), round(run_time(0, 3, halves, halves), 6)
        (3.5, 6.0)
    """
    above = rest + sum(forward[floor:]) + sum(backward[floor:])
    return epochs * above + min(epochs, 1.0) * sum(forward[:floor])


def floors_of(blocks: int) -> tuple[int, ...]:
    """Return how many blocks lie below each of :data:`FLOORS`; one is left at least.

    Example:
        >>> floors_of(6), floors_of(32)
        ((1, 2, 3, 4, 5), (5, 11, 16, 21, 27))
    """
    return tuple(min(round(blocks * sixths / 6), blocks - 1) for sixths in range(1, 6))
