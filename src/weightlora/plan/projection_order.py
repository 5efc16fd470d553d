"""The order in which a transformer block runs its projections, by their names."""

from __future__ import annotations

from collections.abc import Iterable

#: Words in the name of an attention over another sequence, in lower case and without underscores.
_CROSS = ("crossattention", "crossattn", "encdecattention", "encoderattn", "encoderattention")

#: The last words of attention's projections in the order of the forward pass.
_ATTENTION = (
    {"c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "in_proj"},  # query, key and value in one matrix
    {"q", "query", "q_proj", "query_proj", "q_lin", "q_attn", "q_a_proj", "wq"},
    {"q_b_proj"},
    {"k", "key", "k_proj", "key_proj", "k_lin", "kv_a_proj_with_mqa", "wk"},
    {"v", "value", "v_proj", "value_proj", "v_lin", "kv_b_proj", "wv"},
    {"pos_key_proj", "pos_proj"},
    {"pos_query_proj", "pos_q_proj"},
    {"o", "output", "o_proj", "out_proj", "c_proj", "out_lin", "dense", "wo"},
)
#: Those of the MLP.
_MLP = (
    {"gate", "gate_proj", "gate_up_proj", "wi_0", "w1"},
    {"up", "up_proj", "wi_1", "w3"},
    {"intermediate", "c_fc", "fc1", "fc_in", "lin1", "wi", "dense_h_to_4h", "ffn"},
    {"down", "down_proj", "output", "c_proj", "fc2", "fc_out", "lin2", "wo", "w2", "dense_4h_to_h", "ffn_output"},
)


#: What each set above computes, in the same order.
_ATTENTION_ROLES = ("qkv", "query", "query", "key", "value", "position", "position", "output")
_MLP_ROLES = ("gate", "up", "up", "down")


def projection_key(projection: str) -> tuple[int, int, str]:
    """Return a sort key that puts a block's projections in the order of the forward pass.

    Self-attention comes first (query, key, value, output), then cross-attention, then the MLP (gate, up, down). Names
    of BERT, RoBERTa, ALBERT, DeBERTa, DistilBERT, ViT, Llama, Qwen, Mistral, Mixtral, DeepSeek, Phi, Falcon, GPT-2,
    GPT-J, GPT-NeoX, OPT, T5 and BART are known. Unknown names follow in alphabetical order.

    Args:
        projection: A site's name inside its block, :attr:`weightlora.model.sites.Site.projection`.

    Example:
        >>> sorted(["mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj"], key=projection_key)
        ['self_attn.q_proj', 'self_attn.o_proj', 'mlp.down_proj']
    """
    words = projection.lower().split(".")
    if len(words) > 1 and words[-1] == "dense" and words[-2] in ("output", "intermediate"):  # BERT's
        words = words[:-1]
    parents, last = [word.replace("_", "") for word in words[:-1]], words[-1]
    if any(word in _CROSS for word in parents):
        part, places = 1, _ATTENTION
    elif any("attention" in word or "attn" in word for word in parents):
        part, places = 0, _ATTENTION
    elif any(last in names for names in _MLP):
        part, places = 2, _MLP
    else:  # such as "q_proj" alone; "dense" alone may be anything
        part, places = 0, _ATTENTION[:-1]
    place = next((i for i, names in enumerate(places) if last in names), None)
    return (3, 0, projection) if place is None else (part, place, projection)


def projection_role(projection: str) -> tuple[str, str]:
    """Return the part of the block that a projection belongs to, and its role there.

    The parts are ``attention``, ``cross-attention``, ``mlp`` and ``other``. Roles in attention are ``query``, ``key``,
    ``value``, ``qkv`` (all three in one matrix), ``position`` and ``output``; in the MLP ``gate``, ``up`` and ``down``.

    Args:
        projection: As in :func:`projection_key`, which lists the models whose names are known.

    Example:
        >>> projection_role("self_attn.v_proj"), projection_role("attention.output.dense")
        (('attention', 'value'), ('attention', 'output'))
        >>> projection_role("output.dense"), projection_role("classifier")
        (('mlp', 'down'), ('other', 'other'))
    """
    part, place, _ = projection_key(projection)
    if part == 3:
        return "other", "other"
    return ("attention", "cross-attention", "mlp")[part], (_MLP_ROLES if part == 2 else _ATTENTION_ROLES)[place]


def ordered_projections(projections: Iterable[str]) -> list[str]:
    """Return the distinct projections in the order of the forward pass; see :func:`projection_key`.

    Example:
        >>> ordered_projections(["output.dense", "intermediate.dense", "attention.self.key", "attention.self.key"])
        ['attention.self.key', 'intermediate.dense', 'output.dense']
    """
    return sorted(set(projections), key=projection_key)
