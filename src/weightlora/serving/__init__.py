"""Runtimes that serve LoRA adapters, and what each reads of a PEFT adapter directory; a new one is an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from weightlora.errors import OptionError
from weightlora.text import closest

Scale = Literal["site", "config", "rank"]
"""How a runtime scales B·A. ``"site"``: as PEFT, by the patterns and rsLoRA. ``"config"``: lora_alpha ÷ r of the
configuration. ``"rank"``: lora_alpha ÷ the rank of the site's own matrices."""


@dataclass(frozen=True)
class Group:
    """Projections of one block that a runtime keeps in one matrix."""

    names: tuple[str, ...]
    needed: tuple[str, ...]
    """What must be there where any of them is; zeros stand for the others."""


@dataclass(frozen=True)
class Reader:
    """A runtime, and what it reads of an adapter."""

    name: str
    """What users type."""
    title: str
    """Its own name, and the version that these facts are from."""
    tasks: tuple[str, ...] = ("CAUSAL_LM",)
    """PEFT's task types whose adapters are known to be read; of others nothing is known."""
    scale: Scale = "site"
    rslora: bool = False
    """Whether ``use_rslora`` is read."""
    one_rank: bool = False
    """Whether all sites must have one rank."""
    every_layer: bool = False
    """Whether a projection is read only if each layer has it."""
    groups: tuple[Group, ...] = ()
    """Projections that are one matrix inside the runtime."""
    named_list: bool = False
    """Whether ``target_modules`` must be a list."""
    whole_alpha: bool = False
    """Whether ``lora_alpha`` must be a whole number."""
    projections: tuple[str, ...] = ()
    """The only projections that are read; empty where all linear layers are."""
    heads: tuple[str, ...] = ()
    """Modules trained whole (``modules_to_save``) that are read."""
    ranks: tuple[int, ...] = ()
    """The limits that a server can be started with; an adapter needs the first one that is no smaller than its rank."""
    default_rank: int | None = None
    """The limit of a server that is started without one."""
    rank_option: str = ""
    """How a limit is given."""
    padded: bool = False
    """Whether ranks are padded while loading (to 8, or a multiple of 16), and each projection but the first is scaled
    with the padded rank."""
    embeddings: bool = False
    """Whether adapters of embeddings are read."""
    tied: bool = False
    """Whether an adapter of the output head or the embeddings is read right where these share their weights."""
    plain_bias: bool = False
    """Whether ``bias`` must be ``"none"``, even where no bias was trained."""
    models: tuple[str, ...] = ()
    """The only types of base models (``model_type``) whose adapters are read; empty where all are."""
    serves: Callable[[str], bool | None] | None = None
    """Whether base models of a class are served with adapters; None where this is not known of the class."""
    misread: tuple[str, ...] = ()
    """Projections whose rows are read in another order than PEFT writes them."""
    misread_models: tuple[str, ...] = ()
    """The types of base models of which ``misread`` holds."""
    tall_b: bool = False
    """Whether B must have at least as many rows as columns."""
    gguf: bool = False
    """Whether it reads the GGUF file that llama.cpp's converter makes."""
    gguf_only: bool = False
    """Whether it reads nothing else."""
    peft_folder: bool = True
    """Whether it reads PEFT's own files; others are exported to a format of their own."""
    weights_name: str = ""
    """The name under which it looks for the weights, written beside PEFT's; empty where it is PEFT's."""
    start: str = ""
    """What comes after an export; ``{adapter}`` is its folder, or the GGUF file in it; ``{path}`` is without quotes."""


#: A classifier that vLLM does not list is made of the class with one of these endings, tried in this order.
_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel", "Model")
_CLASSIFIER = "ForSequenceClassification"


def supports_lora(architecture: str) -> bool | None:
    """Return whether vLLM serves this class of transformers with adapters; None where it does not list the class.

    Example:
        >>> supports_lora("LlamaForCausalLM"), supports_lora("GPT2LMHeadModel"), supports_lora("LinearForCausalLM")
        (True, False, None)
        >>> supports_lora("Qwen3ForSequenceClassification")  # made of Qwen3ForCausalLM
        True
    """
    names = [architecture]
    if architecture.endswith(_CLASSIFIER):
        names += [architecture.removesuffix(_CLASSIFIER) + ending for ending in _ENDINGS]
    known = _vllm_models()
    return next((known[name] for name in names if name in known), None)


@cache
def _vllm_models() -> dict[str, bool]:
    """Every class that vLLM lists, and whether it is served with adapters."""
    import yaml

    lists: dict[str, str] = yaml.safe_load(Path(__file__).with_name("vllm_models.yaml").read_text(encoding="utf-8"))
    return dict.fromkeys(lists["with_lora"].split(), True) | dict.fromkeys(lists["without_lora"].split(), False)


GGUF_FILE = "adapter.gguf"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: In GGUF files Mistral and Mixtral are of Llama's architecture.
_LLAMA_MODELS = ("llama", "mistral", "mixtral")
_FUSED = (
    Group(("q_proj", "k_proj", "v_proj"), needed=("q_proj", "v_proj")),
    Group(("gate_proj", "up_proj"), needed=("gate_proj",)),
)

#: Every runtime that ``check`` and ``export`` know, and ``everywhere``: the layout that most of them read.
READERS = (
    Reader(
        "vllm",
        "vLLM 0.33.0",
        tasks=("CAUSAL_LM", "SEQ_CLS"),
        rslora=True,
        heads=("classifier", "score"),
        ranks=_VLLM_RANKS,
        default_rank=16,
        rank_option="--max-lora-rank",
        embeddings=True,
        tied=True,
        plain_bias=True,
        serves=supports_lora,
        start="vllm serve {base} --enable-lora --lora-modules adapter={adapter}{option}",
    ),
    Reader(
        "sglang",
        "SGLang 0.5.23",
        scale="config",
        one_rank=True,
        groups=_FUSED,
        named_list=True,
        embeddings=True,
        tied=True,
        start="python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={adapter}",
    ),
    Reader(
        "tgi",
        "TGI 3.3",
        scale="config",
        rslora=True,
        one_rank=True,
        padded=True,
        every_layer=True,
        projections=(*_LLAMA, "qkv_proj", "c_proj", "c_fc"),
        start="text-generation-launcher --model-id {base} --lora-adapters adapter={adapter}",
    ),
    Reader(
        "lorax",
        "LoRAX 0.12",
        scale="config",
        rslora=True,
        one_rank=True,
        padded=True,
        every_layer=True,
        projections=(*_LLAMA, "c_attn", "c_proj", "c_fc", "lm_head"),
        tied=True,
        start="lorax-launcher --model-id {base} --adapter-id {adapter} --adapter-source local",
    ),
    Reader(
        "llama.cpp",
        "llama.cpp's convert_lora_to_gguf.py",
        scale="rank",
        embeddings=True,
        gguf=True,
        gguf_only=True,
        start="llama-server -m base.gguf --lora {adapter}",
    ),
    Reader(
        "ollama",
        "Ollama's own conversion",
        scale="rank",
        whole_alpha=True,
        tall_b=True,
        projections=_LLAMA,
        models=(*_LLAMA_MODELS, "gemma2"),
        misread=("q_proj", "k_proj"),
        misread_models=_LLAMA_MODELS,
        gguf=True,
        weights_name="model.safetensors",
        start="write the lines FROM base.gguf and ADAPTER {path} into a Modelfile, "
        "then: ollama create NAME -f Modelfile",
    ),
    Reader(
        "mlx",
        "MLX LM 0.32",
        scale="config",
        one_rank=True,
        embeddings=True,
        peft_folder=False,
        start="mlx_lm.server --model {base} --adapter-path {adapter}",
    ),
    Reader(
        "everywhere",
        "all of them but MLX and Ollama's own conversion",
        scale="config",
        one_rank=True,
        padded=True,
        every_layer=True,
        groups=_FUSED,
        named_list=True,
        plain_bias=True,
        gguf=True,
        projections=_LLAMA,
        ranks=_VLLM_RANKS,
        default_rank=16,
        rank_option="vLLM's --max-lora-rank",
        serves=supports_lora,
        start="weightlora check {folder} --for all",
    ),
)


def padded_rank(r: int) -> int:
    """Return what TGI and LoRAX pad a rank to on one GPU.

    Example:
        >>> [padded_rank(r) for r in (4, 8, 9, 32)]
        [8, 8, 16, 32]
    """
    return 8 if r <= 8 else -(-r // 16) * 16


def reader_of(name: str) -> Reader:
    """Return the runtime of that name.

    Raises:
        OptionError: There is none.

    Example:
        >>> reader_of("vllm").title
        'vLLM 0.33.0'
    """
    known = {reader.name: reader for reader in READERS}
    if name not in known:
        raise OptionError(f"{name!r} is no runtime{closest(name, known)}: give one of {', '.join(known)}")
    return known[name]
