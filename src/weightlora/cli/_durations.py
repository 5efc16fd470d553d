"""Times as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return ``seconds`` in the unit that fits.

    Example:
        >>> duration(8.4), duration(600), duration(9000), duration(200_000)
        ('8 s', '10 min', '2.5 h', '55.6 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
