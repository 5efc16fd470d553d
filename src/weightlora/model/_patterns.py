"""The regular expressions of a LoRA config."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weightlora.errors import SiteError

if TYPE_CHECKING:
    from peft import LoraConfig


def require_patterns(lora: LoraConfig) -> None:
    """Raise where an option of ``lora`` that PEFT reads as a regular expression is none.

    Raises:
        SiteError: With the option and the reason.
    """
    whole = {"target_modules": lora.target_modules, "exclude_modules": lora.exclude_modules}
    patterns = [(option, value) for option, value in whole.items() if isinstance(value, str)]
    patterns += [("rank_pattern", key) for key in lora.rank_pattern or {}]
    patterns += [("alpha_pattern", key) for key in lora.alpha_pattern or {}]
    for option, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise SiteError(
                f"{option} has {pattern!r}, which is no regular expression ({error}); correct it"
            ) from error
