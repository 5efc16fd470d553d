"""The time of a whole training with a store: below the floor blocks run once for each row, and only forward."""

from __future__ import annotations

from collections.abc import Sequence

#: Where the lowest adapter may lie, as a share of the depth, for the line of a plan and for an estimate.
FLOORS = ("1/6", "1/3", "1/2", "2/3", "5/6")


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
