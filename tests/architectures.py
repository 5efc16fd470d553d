"""Small models of many architectures, each with random weights from a seed and a batch; the table of the documents.

``python tests/architectures.py`` writes the table into docs/lab/architectures.md.
"""

import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import weightlora
from weightlora.errors import WeightLoraError, WeightLoraWarning
from weightlora.model.sites import find_sites

PAGE = Path(__file__).parent.parent / "docs" / "lab" / "architectures.md"
ROWS, TOKENS, LABELS = 4, 8, 2

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 32, "max_position_embeddings": 32, **SIZES, **SPECIAL}
WIDE = TEXT | {"intermediate_size": 24}
LLM = WIDE | {"num_key_value_heads": 1}
HEADS = LLM | {"head_dim": 8}
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL}
MOE = LLM | {"moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK = MOE | LATENT | ROUTED | {"num_key_value_heads": 2, "n_group": 2, "topk_group": 1}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FFN = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SEQ2SEQ = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 32, **LAYERS, **FFN}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
VISION = SIZES | {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
CONVS = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SPEECH = SIZES | CONVS | POSITIONS | {"intermediate_size": 24, "classifier_proj_size": 8}
MAMBA = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 4}
ANY_DEPTH = {key: value for key, value in HEADS.items() if key != "num_hidden_layers"}
AUDIO_TEXT = {"vocab_size": 32, "d_model": 16, "max_target_positions": 16, "decoder_start_token_id": 1, **SPECIAL}
STAGES = {"depths": [1, 1], "image_size": 8}

#: Family → name → (class, its config's fields).
FAMILIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "dense": {
        "BLOOM": ("BloomForCausalLM", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
        "Cohere": ("CohereForCausalLM", LLM),
        "Falcon": ("FalconForCausalLM", TEXT),
        "Gemma 2": ("Gemma2ForCausalLM", HEADS),
        "Gemma 3": ("Gemma3ForCausalLM", HEADS),
        "GLM-4": ("Glm4ForCausalLM", HEADS),
        "GPT-2": ("GPT2LMHeadModel", GPT),
        "GPT-J": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
        "GPT-NeoX": ("GPTNeoXForCausalLM", WIDE),
        "Granite": ("GraniteForCausalLM", LLM),
        "Llama": ("LlamaForCausalLM", LLM),
        "Mistral": ("MistralForCausalLM", LLM),
        "OLMo": ("OlmoForCausalLM", LLM | {"clip_qkv": 0.05}),
        "OLMo 2": ("Olmo2ForCausalLM", LLM),
        "OPT": ("OPTForCausalLM", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        "Phi": ("PhiForCausalLM", WIDE),
        "Phi-3": ("Phi3ForCausalLM", LLM),
        "Qwen2": ("Qwen2ForCausalLM", LLM),
        "Qwen3": ("Qwen3ForCausalLM", HEADS),
        "SmolLM3": ("SmolLM3ForCausalLM", LLM),
        "StableLM": ("StableLmForCausalLM", LLM),
        "StarCoder2": ("Starcoder2ForCausalLM", LLM),
    },
    "mixture of experts": {
        "DBRX": (
            "DbrxForCausalLM",
            {
                "vocab_size": 32,
                "d_model": 16,
                "n_layers": 2,
                "n_heads": 2,
                "max_seq_len": 32,
                "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
                "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
            },
        ),
        "DeepSeek-V2": ("DeepseekV2ForCausalLM", DEEPSEEK | {"topk_method": "greedy"}),
        "DeepSeek-V3": ("DeepseekV3ForCausalLM", DEEPSEEK),
        "ERNIE 4.5": (
            "Ernie4_5_MoeForCausalLM",
            MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        ),
        "GLM-4 MoE": ("Glm4MoeForCausalLM", MOE | ROUTED | {"head_dim": 8}),
        "GPT-OSS": ("GptOssForCausalLM", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "GraniteMoE": ("GraniteMoeForCausalLM", LLM | {"num_local_experts": 4}),
        "HunYuan MoE": ("HunYuanMoEV1ForCausalLM", HEADS | {"num_experts": 4, "moe_topk": 2}),
        "Jamba": (
            "JambaForCausalLM",
            LLM | JAMBA | {"num_experts": 2, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 2},
        ),
        "JetMoE": ("JetMoeForCausalLM", LLM | {"kv_channels": 8, "num_local_experts": 4}),
        "Llama 4": (
            "Llama4ForCausalLM",
            HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
        ),
        "MiniMax-M2": ("MiniMaxM2ForCausalLM", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "Mixtral": ("MixtralForCausalLM", LLM | {"num_local_experts": 4}),
        "NLLB-MoE": (
            "NllbMoeForConditionalGeneration",
            SEQ2SEQ | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        ),
        "OLMoE": ("OlmoeForCausalLM", LLM | {"num_experts": 4, "num_experts_per_tok": 2}),
        "PhiMoE": ("PhimoeForCausalLM", LLM | {"num_local_experts": 4}),
        "Qwen2-MoE": (
            "Qwen2MoeForCausalLM",
            MOE | {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8},
        ),
        "Qwen3-MoE": (
            "Qwen3MoeForCausalLM",
            MOE | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "mlp_only_layers": [0]},
        ),
        "Switch Transformers": (
            "SwitchTransformersForConditionalGeneration",
            T5
            | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
            | {"num_decoder_layers": 2, "decoder_start_token_id": 0},
        ),
    },
    "state space": {
        "Bamba": ("BambaForCausalLM", LLM | MAMBA_HEADS | {"attn_layer_indices": [1]}),
        "Falcon Mamba": ("FalconMambaForCausalLM", MAMBA | {"time_step_rank": 2}),
        "Falcon-H1": ("FalconH1ForCausalLM", HEADS | MAMBA_HEADS | {"mamba_d_ssm": 32}),
        "LFM2": (
            "Lfm2ForCausalLM",
            LLM | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ),
        "Mamba": ("MambaForCausalLM", MAMBA | {"time_step_rank": 2}),
        "Mamba 2": ("Mamba2ForCausalLM", MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
        "Nemotron-H": (
            "NemotronHForCausalLM",
            ANY_DEPTH | NEMOTRON | {"layers_block_type": ["mamba", "attention", "mlp"]},
        ),
        "RecurrentGemma": (
            "RecurrentGemmaForCausalLM",
            HEADS | {"lru_width": 16, "block_types": ["recurrent", "attention"]},
        ),
    },
    "encoder": {
        "ALBERT": ("AlbertForSequenceClassification", WIDE | {"embedding_size": 8}),
        "BERT": ("BertForSequenceClassification", WIDE),
        "DeBERTa-v2": (
            "DebertaV2ForSequenceClassification",
            WIDE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        ),
        "DistilBERT": (
            "DistilBertForSequenceClassification",
            {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        ),
        "ELECTRA": ("ElectraForSequenceClassification", WIDE | {"embedding_size": 8}),
        "ModernBERT": ("ModernBertForSequenceClassification", WIDE | {"cls_token_id": 1, "sep_token_id": 2}),
        "MPNet": ("MPNetForSequenceClassification", WIDE),
        "RoBERTa": ("RobertaForSequenceClassification", WIDE),
    },
    "encoder-decoder": {
        "BART": ("BartForConditionalGeneration", SEQ2SEQ),
        "LED": (
            "LEDForConditionalGeneration",
            SEQ2SEQ
            | {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32, "attention_window": 4},
        ),
        "M2M-100": ("M2M100ForConditionalGeneration", SEQ2SEQ),
        "Marian": ("MarianMTModel", SEQ2SEQ | {"pad_token_id": 0, "decoder_start_token_id": 0}),
        "ProphetNet": (
            "ProphetNetForConditionalGeneration",
            FFN
            | {"vocab_size": 32, "hidden_size": 16, "max_position_embeddings": 32, **SPECIAL}
            | {"num_encoder_layers": 2, "num_decoder_layers": 2}
            | {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2},
        ),
        "T5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
    },
    "vision": {
        "BEiT": ("BeitForImageClassification", VISION),
        "CLIP": ("CLIPModel", {"text_config": WIDE, "vision_config": VISION, "projection_dim": 8}),
        "ConvNeXt": (
            "ConvNextForImageClassification",
            STAGES | {"hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 2, "layer_scale_init_value": 1.0},
        ),
        "DeiT": ("DeiTForImageClassification", VISION),
        "DINOv2": ("Dinov2ForImageClassification", VISION | {"mlp_ratio": 2}),
        "LLaVA": (
            "LlavaForConditionalGeneration",
            {
                "text_config": LLM | {"model_type": "llama"},
                "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 8},
                "image_token_index": 5,
            },
        ),
        "SegFormer": (
            "SegformerForImageClassification",
            STAGES
            | {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
            | {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
        ),
        "SigLIP": ("SiglipForImageClassification", {"vision_config": VISION}),
        "Swin": (
            "SwinForImageClassification",
            STAGES | {"embed_dim": 8, "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
        ),
        "ViT": ("ViTForImageClassification", VISION),
    },
    "speech": {
        "AST": (
            "ASTForAudioClassification",
            VISION | {"max_length": 8, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
        ),
        "HuBERT": ("HubertForSequenceClassification", SPEECH),
        "Speech2Text": (
            "Speech2TextForConditionalGeneration",
            LAYERS
            | FFN
            | AUDIO_TEXT
            | {"max_source_positions": 32, "conv_channels": 16, "num_conv_layers": 1, "conv_kernel_sizes": [3]}
            | {"input_feat_per_channel": 8, "input_channels": 1},
        ),
        "Wav2Vec2": ("Wav2Vec2ForSequenceClassification", SPEECH),
        "WavLM": ("WavLMForSequenceClassification", SPEECH),
        "Whisper": (
            "WhisperForConditionalGeneration",
            LAYERS
            | FFN
            | AUDIO_TEXT
            | {"num_mel_bins": 8, "max_source_positions": 4, "suppress_tokens": None, "begin_suppress_tokens": None},
        ),
    },
}
ARCHITECTURES = {name: (family, *own) for family, models in FAMILIES.items() for name, own in models.items()}


def model_of(name):
    """The model, the same at every call, in evaluation mode."""
    _, kind, fields = ARCHITECTURES[name]
    torch.manual_seed(0)
    of_kind = getattr(transformers, kind)
    model = of_kind(of_kind.config_class(**deepcopy(fields)))
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # experts and routers that transformers leaves to be loaded
        if not parameter.isfinite().all() or (parameter.ndim > 1 and not parameter.any()):
            parameter.data.normal_(0, 0.1, generator=noise)
    return model.eval()


def batch_of(name, seed=0):
    """What the model is called with; it computes a loss."""
    family, kind, _ = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 32, (ROWS, TOKENS), generator=generator)
    images = torch.randn(ROWS, 3, 8, 8, generator=generator)
    classes = torch.arange(ROWS) % LABELS
    if name == "CLIP":
        ids[:, -1] = SPECIAL["eos_token_id"]
        return {"input_ids": ids, "pixel_values": images, "return_loss": True}
    if name == "LLaVA":
        ids[:, :4] = 5  # (8 / 4)² patches
        return {"input_ids": ids, "labels": ids, "pixel_values": images}
    if family == "vision":
        return {"pixel_values": images, "labels": classes}
    if kind == "ASTForAudioClassification":
        return {"input_values": images[:, 0], "labels": classes}
    if family == "speech" and kind.endswith("ConditionalGeneration"):
        return {"input_features": images[:, 0], "labels": ids}
    if family == "speech":
        return {"input_values": torch.randn(ROWS, 400, generator=generator), "labels": classes}
    return {"input_ids": ids, "labels": classes if family == "encoder" else ids}


# -- select, attach, train, save, load with stock PEFT, merge ----------------------------------------------------------


@torch.no_grad()
def logits(model, batch):
    output = model.eval()(**batch)
    return output.logits if "logits" in output else output.logits_per_text


def train(model, batches):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_and_loaded(name, attached):
    """Train two steps, save, load with stock PEFT and merge; return the logits before, trained, loaded and merged."""
    batch = batch_of(name)
    results = [logits(model_of(name), batch)]
    train(attached, [batch, batch_of(name, 1)])
    results.append(logits(attached, batch))
    with tempfile.TemporaryDirectory() as folder:
        attached.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(model_of(name), folder)
    results.append(logits(loaded, batch))
    results.append(logits(loaded.merge_and_unload(), batch))
    return results


def agree(results):
    """Whether training changed something, and loading and merging did not."""
    before, trained, *others = results
    near = 1e-5 * max(1.0, float(trained.abs().max()))
    return float((before - trained).abs().max()) > 10 * near and all(
        float((other - trained).abs().max()) < near for other in others
    )


def plain_works(name, lora):
    """Whether stock PEFT alone trains, saves, loads and merges these adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return agree(trained_and_loaded(name, get_peft_model(model_of(name), lora)))
        except (ValueError, AttributeError):
            return False


def selected(name, lora, **options):
    """The plan, the model it was made for, and what find_sites warned of."""
    model = model_of(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightLoraWarning)
        batches = [batch_of(name, seed) for seed in range(2)]
        plan = weightlora.select(model, batches, lora=lora, steps=2, progress=False, **options)
    return plan, model, [str(warning.message) for warning in caught if "no adapter" in str(warning.message)]


# -- the table ---------------------------------------------------------------------------------------------------------

#: A part of the reason that find_sites gives, and what the table says.
REASONS = {
    "part of the fused experts": "PEFT reads the name as fused experts",
    "PEFT refuses": "PEFT refuses it",
    "more than one tensor": "returns a tuple",
    "never calls it": "its module never calls it",
}
PLAIN = {True: "works", False: "fails"}
HEADER = (
    "| model | class | layers | fused experts | left out | `select` | plain PEFT, `all-linear` |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def fused(model):
    """Names of the parameters that hold several experts."""
    owners = {name: module for name, module in model.named_modules() if not isinstance(module, nn.Conv1d)}
    own = {f"{name}.{key}": p for name, owner in owners.items() for key, p in owner.named_parameters(recurse=False)}
    return sorted(name for name, p in own.items() if p.ndim == 3)


def endings(names):
    """A parameter is named by its module's last part and its own, as in target_parameters."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def row(name, state, plain):
    """The line of an architecture, given what ``select`` and plain PEFT do with it."""
    _, kind, _ = ARCHITECTURES[name]
    model = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightLoraWarning)
        every = find_sites(model, LoraConfig(target_modules="all-linear"))
        layers = len(find_sites(model).sites)
    besides = ticks(endings(each.name for each in every.parameters))
    request = ticks(endings(fused(model))) if ARCHITECTURES[name][0] == "mixture of experts" else ""
    experts = besides or (f"on request: {request}" if request else "")
    by_reason = {text: set() for text in REASONS.values()}
    for skip in every.skipped:
        for part, text in REASONS.items():
            if part in skip.reason:
                by_reason[text].add(skip.name.rsplit(".", 1)[-1])
    left_out = "; ".join(f"{ticks(names)}: {text}" for text, names in by_reason.items() if names)
    return "| " + " | ".join([name, f"`{kind}`", str(layers), experts, left_out, state, PLAIN[plain]]) + " |"


def ticks(names):
    return ", ".join(f"`{name}`" for name in sorted(names))


def outcome(name):
    """What ``select`` does with the default targets, in a word, and whether plain PEFT works with ``"all-linear"``."""
    plain = plain_works(name, LoraConfig(r=2, target_modules="all-linear"))
    try:
        plan, model, _ = selected(name, LoraConfig(r=2))
    except WeightLoraError as error:
        return f"refused: {error}", plain
    return ("works" if agree(trained_and_loaded(name, plan.attach(model))) else "differs"), plain


def table():
    """The whole table, a heading for each family."""
    parts = []
    for family, models in FAMILIES.items():
        lines = [row(name, *outcome(name)) for name in models]
        parts.append(f"## {family.capitalize()}\n\n{HEADER}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    text, _, _ = PAGE.read_text(encoding="utf-8").partition("## Dense\n")
    PAGE.write_text(text + table(), encoding="utf-8")
