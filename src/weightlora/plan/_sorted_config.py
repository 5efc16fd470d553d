"""A ``LoraConfig`` that is saved with sorted names; PEFT is imported with this file."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig


class SortedLoraConfig(LoraConfig):
    """A ``LoraConfig`` whose sets are saved as sorted lists; in memory they stay sets, which PEFT's operations need.

    PEFT saves a set in random order, and ``add_weighted_adapter`` takes names only as a set.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as PEFT does, with sorted lists in place of sets."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
