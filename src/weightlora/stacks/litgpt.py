"""LitGPT: the options of ``litgpt finetune_lora`` as YAML; whole types of projections with one rank."""

from __future__ import annotations

from weightlora.stacks._types import OPTIONS, has_mlp, kept_types, lacking_type
from weightlora.stacks.base import Fields, Stack, Written, as_yaml

_TYPES = {
    "self_attn.q_proj": "lora_query",
    "self_attn.k_proj": "lora_key",
    "self_attn.v_proj": "lora_value",
    "self_attn.o_proj": "lora_projection",
}
_USE = "Put these lines into your configuration: litgpt finetune_lora CHECKPOINT --config yours.yaml"


def _write(fields: Fields) -> Written:
    names = fields["target_modules"]
    kept = kept_types(names, _TYPES)
    flags = {word: word in kept for word in _TYPES.values()} | {"lora_mlp": has_mlp(names), "lora_head": False}
    return Written("litgpt.yaml", as_yaml(_USE, {**STACK.renamed(fields), **flags}))


STACK = Stack(
    _write, options={"r": "lora_r", **OPTIONS}, whole_alpha=True, limits=lambda plan: lacking_type(plan, _TYPES)
)
