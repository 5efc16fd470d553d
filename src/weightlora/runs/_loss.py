"""Whether the loss of a training has fallen, judged by what was logged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

#: Fewer logged losses than this say nothing.
_FEWEST = 10


def loss_fault(losses: Sequence[float], rate: float) -> str | None:
    """Return what to tell the user of a loss that has not fallen; None where it has, or where few losses are logged.

    The loss has fallen where the mean of the last fifth is below that of the first fifth by more than the median change
    from one logged loss to the next.

    Args:
        losses: As logged; one that is no finite number stands for a step that failed.
        rate: The learning rate, for the text.

    Example:
        >>> loss_fault([1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 1e-3)
        >>> loss_fault([1.4] * 10, 5e-5)[:73]
        'the loss has not fallen: 1.4 in the first fifth of the training, 1.4 in t'
    """
    if len(losses) < _FEWEST:
        return None
    if not all(map(math.isfinite, losses)):
        return f"the loss was no finite number in the training (learning_rate={rate:g}); try a lower learning_rate"
    fifth = len(losses) // 5
    first, last = statistics.mean(losses[:fifth]), statistics.mean(losses[-fifth:])
    spread = statistics.median(abs(a - b) for a, b in pairwise(losses))
    if first - last > spread:
        return None
    advice = "a lower" if last - first > spread else "a higher"
    return (
        f"the loss has not fallen: {first:.4g} in the first fifth of the training, {last:.4g} in the last, with "
        f"changes of {spread:.2g} from one logged loss to the next (learning_rate={rate:g}); try {advice} "
        "learning_rate or more steps, and look at the rows and their labels"
    )
