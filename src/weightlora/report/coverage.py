"""Which layers the fast step leaves to stock PEFT, read from files: neither a model nor torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from weightlora.plan.make import ADAPTER_FILES, adapter_config, tensor_shapes
from weightlora.plan.plan import AdapterPlan

#: Fields of a LoraConfig that make PEFT compute a layer in another way than plain LoRA, and the name of that way.
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron",
}
#: Values of ``init_lora_weights`` that change more than the initial weights.
_VARIANT_STARTS = {"mica": "MiCA"}


def fast_gaps(path: str | Path, plan: AdapterPlan) -> tuple[int, dict[str, str]]:
    """Return how many layers carry an adapter, and those that ``enable_fast_lora`` leaves to PEFT, with their reasons.

    Other reasons, such as hooks, show in a loaded model only: see :func:`weightlora.fast.enable.fast_coverage`.

    Args:
        path: A plan, or a directory that PEFT saved an adapter into.
        plan: What was read from it.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> entries = (PlannedSite(Site("a", 8, 8), 4, 8, r=4, alpha=8, score=2.0),)
        >>> fast_gaps("plan.json", AdapterPlan(entries, lora={"use_dora": True}))
        (1, {'a': 'DoRA'})
    """
    path = Path(path)
    if not all((path / name).is_file() for name in ADAPTER_FILES):
        return len(plan.names), _gaps(plan.lora, dict.fromkeys(plan.names))
    config = adapter_config(path)
    kinds: dict[str, str | None] = {}
    for key, shape in tensor_shapes(path).items():
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(lora_A|lora_embedding_A)(?:\.weight)?", key)
        if match:
            kinds[match[1]] = "an embedding" if match[2] != "lora_A" else "a convolution" if len(shape) > 2 else None
    parameters = config.get("target_parameters")
    for parameter in cast("list[Any]", parameters) if isinstance(parameters, list) else ():
        owner = str(parameter).rpartition(".")[0]
        kinds |= {name: "target_parameters" for name in kinds if f".{name}".removesuffix(".base_layer").endswith(owner)}
    return len(kinds), _gaps(config, dict(sorted(kinds.items())))


def fast_text(count: int, gaps: Mapping[str, str]) -> str:
    """Return one line about what :func:`fast_gaps` found.

    Example:
        >>> fast_text(3, {}), fast_text(1, {"a": "DoRA"}), fast_text(3, {"a": "an embedding"})
        ('all 3 adapters', '0 of 1 adapters: all are DoRA', '2 of 3 adapters; left to PEFT: a (an embedding)')
    """
    reasons = sorted(set(gaps.values()))
    if not gaps:
        return f"all {count} adapters"
    if len(gaps) == count and len(reasons) == 1:
        return f"0 of {count} adapters: all are {reasons[0]}"
    named = ", ".join(f"{name} ({reason})" for name, reason in gaps.items())
    return f"{count - len(gaps)} of {count} adapters; left to PEFT: {named}"


def _gaps(config: Mapping[str, Any], kinds: Mapping[str, str | None]) -> dict[str, str]:
    """Return the reason of each layer that has one: its kind, else the configuration's."""
    named = [name for field, name in VARIANTS.items() if config.get(field)]
    start = str(config.get("init_lora_weights")).lower()
    of_all = ", ".join([*named, *([_VARIANT_STARTS[start]] if start in _VARIANT_STARTS else [])])
    reasons = {name: kind or of_all for name, kind in kinds.items()}
    return {name: reason for name, reason in reasons.items() if reason}
