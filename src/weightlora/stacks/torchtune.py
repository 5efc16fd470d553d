"""torchtune: the fields of a model in its YAML; whole types of projections with one rank."""

from __future__ import annotations

from weightlora.stacks._types import OPTIONS, has_mlp, kept_types, lacking_type
from weightlora.stacks.base import Fields, Stack, Written, as_yaml

_TYPES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "output_proj",
}
_USE = "Put these lines below the model's _component_ in your configuration: tune run RECIPE --config yours.yaml"


def _write(fields: Fields) -> Written:
    names = fields["target_modules"]
    model = {
        "lora_attn_modules": kept_types(names, _TYPES),
        "apply_lora_to_mlp": has_mlp(names),
        "apply_lora_to_output": False,
        **STACK.renamed(fields),
    }
    return Written("torchtune.yaml", as_yaml(_USE, {"model": model}))


STACK = Stack(_write, options={"r": "lora_rank", **OPTIONS}, limits=lambda plan: lacking_type(plan, _TYPES))
