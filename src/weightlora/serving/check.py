"""Whether a runtime reads an adapter right: from its files alone, with each reason why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.model.sites import TASK_HEADS
from weightlora.serving import padded_rank, reader_of
from weightlora.serving.adapter import (
    BaseModel,
    base_name,
    is_here,
    last_name,
    layer_number,
    matrix_name,
    missing_layers,
    read_base,
    read_files,
    split_groups,
)

if TYPE_CHECKING:
    from weightlora.serving import Reader
    from weightlora.serving.adapter import Adapted, Adapter

#: Initialisations that only set the start of A and B. With another one PEFT changes the base weights, too, when it
#: loads the adapter.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MERGE = "merge the adapter into the base model (PeftModel.merge_and_unload) and serve that"
_SHOWN = 4


@dataclass(frozen=True)
class Problem:
    """A reason why a runtime does not read an adapter right."""

    text: str
    mended: bool
    """Whether an export mends it."""
    known: bool = True
    """False where it is not known whether the adapter is read right: this is no yes, and no reason to refuse."""


def check(folder: str | Path, reader: str, *, base: str | None = None) -> tuple[Problem, ...]:
    """Return every reason why a runtime does not compute with an adapter what PEFT computes; none where it does.

    Args:
        folder: A directory that PEFT saved a LoRA adapter into.
        reader: A runtime such as ``"vllm"`` or ``"llama.cpp"``.
        base: Folder or hub name of the base model. None takes the one that the adapter names, where it is a folder.

    Raises:
        OptionError: There is no such runtime.
        PlanError: The folder holds no LoRA adapter.
        DataError: The base model's configuration cannot be read.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> lora = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"1.self_attn.q_proj": 2})
        >>> get_peft_model(model, lora).save_pretrained(tmp_path)
        >>> [problem.text[:41] for problem in check(tmp_path, "mlx")][1:]
        ['ranks from 2 to 4; one rank for all sites', 'the scale of 1 of 2 sites is read wrong: ']
    """
    adapter = read_files(folder)
    return find_problems(adapter, reader_of(reader), base_at(adapter, base))


def base_at(adapter: Adapter, base: str | None) -> BaseModel | None:
    """Return the base model that is given, or the one that the adapter names where it is a folder; else None.

    Raises:
        DataError: Its configuration cannot be read.
    """
    name = base or base_name(adapter)
    return read_base(name, adapter.config.get("task_type")) if base or is_here(name) else None


def find_problems(adapter: Adapter, reader: Reader, base: BaseModel | None = None) -> tuple[Problem, ...]:
    """Return every reason why ``reader`` does not compute what PEFT computes; none where it does.

    Args:
        adapter: The files of an adapter.
        reader: The runtime.
        base: The base model; without it, the layers are those that the adapter names.
    """
    case = _Case(adapter, reader, base or BaseModel())
    if unread := case.task():
        return (Problem(unread, mended=False),)
    lost = (case.model, case.shapes, case.unread, case.unknown)
    mended = (case.format, case.ranks, case.scales, case.groups, case.layers)
    return (
        *(Problem(text, mended=False, known=False) for text in case.unclear()),
        *(Problem(text, mended=False) for find in lost for text in find()),
        *(Problem(text, mended=True) for find in mended for text in find()),
    )


def needed_option(adapter: Adapter, reader: Reader) -> str | None:
    """Return the option that the server must be started with for this adapter; None where the defaults do.

    Example:
        >>> from pathlib import Path
        >>> from weightlora.model.sites import Site
        >>> from weightlora.serving import reader_of
        >>> from weightlora.serving.adapter import Adapted, Adapter
        >>> adapter = Adapter(Path("."), {"r": 40}, (Adapted(Site("q_proj", 64, 64), 40, 2.0),), {})
        >>> needed_option(adapter, reader_of("vllm"))
        '--max-lora-rank 64'
    """
    limit = next((limit for limit in reader.ranks if limit >= adapter.asked_rank), None)
    if limit is None or reader.default_rank is None or limit <= reader.default_rank:
        return None
    return f"{reader.rank_option} {limit}"


def most_gpus(adapter: Adapter, reader: Reader) -> int | None:
    """Return on how many GPUs an adapter that ``reader`` reads right is still read right; None where that is no matter.

    TGI and LoRAX pad a rank to 8 for each GPU, and scale with the padded rank.
    """
    return max(1, adapter.rank // 8) if reader.padded else None


@dataclass(frozen=True)
class _Case:
    """An adapter and a runtime; each method yields the problems of one kind."""

    adapter: Adapter
    reader: Reader
    base: BaseModel

    def task(self) -> str | None:
        """A task whose adapters this runtime was not seen to read: its other facts are of other tasks."""
        task = self.adapter.config.get("task_type")
        if task is None or task in self.reader.tasks:
            return None
        return (
            f"it is only known to read adapters of {' and '.join(self.reader.tasks)}, and this one has "
            f"task_type={task!r:.40}; use it with PEFT, or merge it into the base model (PeftModel.merge_and_unload)"
        )

    def unclear(self) -> Iterator[str]:
        """A class of base models of which nothing is known."""
        name = self.base.architecture
        if self.reader.serves and (not name or self.reader.serves(name) is None):
            what = f"{name} is not in vLLM's list" if name else "the base model is not at hand: give it with --base"
            yield f"whether its class is served with adapters is not known: {what}"

    # -- what no layout can express ------------------------------------------------------------------------------------

    def model(self) -> Iterator[str]:
        """A base model that the runtime serves without adapters."""
        name = self.base.architecture
        if self.reader.serves and name and self.reader.serves(name) is False:
            yield f"base models of class {name} are served without adapters; {_MERGE}"

    def shapes(self) -> Iterator[str]:
        """Tensors of another shape than the base model's."""
        wrong = list(self._of_other_shapes())
        if wrong:
            name, found, needed, resized = wrong[0]
            more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
            way = "the one with its embeddings resized" if resized else "the one that it was trained on"
            yield f"{name} has the shape {found}, and this base model needs {needed}{more}; give {way} with --base"

    def _of_other_shapes(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], bool]]:
        """Name, shape, the shape that the base model asks for, and whether its embeddings were resized."""
        for own in self.adapter.sites:
            layer = self.base.layers.get(own.site.name, own.site)
            for matrix, found, needed in (
                ("A", (own.r, own.site.in_features), (own.r, layer.in_features)),
                ("B", (own.site.out_features, own.r), (layer.out_features, own.r)),
            ):
                if found != needed:
                    name = matrix_name(own.site.name, matrix, embedding=own.embedding)
                    yield name, found, needed, own.embedding and matrix == "A"
        heads = TASK_HEADS.get(str(self.adapter.config.get("task_type")), ())
        for name, found in self.adapter.others.items():
            part = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            needed = self.base.shapes.get(part, found)
            # How many classes a head tells apart is the adapter's own.
            if found != needed and not (_module(part) in heads and found[1:] == needed[1:]):
                yield name, found, needed, found[1:] == needed[1:]

    def unread(self) -> Iterator[str]:
        """Parts of the adapter that are not read."""
        config = self.adapter.config
        if config.get("use_dora"):
            yield f"DoRA's magnitudes are not read; {_MERGE}"
        if config.get("lora_bias"):
            yield f"the biases of B (lora_bias) are not read; {_MERGE}"
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
            yield (
                f"init_lora_weights={start!r:.40} belongs to base weights that PEFT has changed; save the adapter with "
                "path_initial_model_for_weight_conversion"
            )
        fields = ("alora_invocation_tokens", "layer_replication", "target_parameters", "use_bdlora", "use_qalora")
        yield from (f"{name} is not read; {_MERGE}" for name in fields if config.get(name))
        known = ("lora_magnitude_vector", "lora_B.bias", ".base_layer.weight")  # the last is a copy of the base model's
        others = [name for name in self.adapter.others if not any(word in name for word in known)]
        lost = [name.removeprefix("base_model.model.") for name in others if not self._is_head(name)]
        if lost:
            yield f"tensors that are not read: {len(lost)}, {lost[0]} among them; {_MERGE}"
        if self.reader.ranks and self.adapter.rank > self.reader.ranks[-1]:
            yield f"rank {self.adapter.rank} is above {self.reader.ranks[-1]}, the largest; {_MERGE}"

    def unknown(self) -> Iterator[str]:
        """Sites that the runtime or the base model does not have."""
        base, reader, names = self.base, self.reader, [own.site.name for own in self.adapter.sites]
        strange = [name for name in names if base.layers and name not in base.layers]
        if strange:
            yield f"the base model has no {_listed(strange)}; give the right one with --base"
        words = [own.site.name for own in self.adapter.sites if own.embedding and not reader.embeddings]
        if words:
            yield f"{_listed(words)}: adapters of embeddings are not read; {_MERGE}"
        tied = [name for name in names if name in base.tied and not reader.tied]
        if tied:
            yield (
                f"{_listed(tied)}: output head and embeddings share their weights in this base model, and an "
                f"adapter of one is not read right; {_MERGE}"
            )
        by_converter = "export with --converter, and serve adapter.gguf"
        if base.model_type and reader.models and base.model_type not in reader.models:
            readable = ", ".join(reader.models)
            yield f"adapters of base models of type {base.model_type} are not read, only of {readable}; {by_converter}"
        misread = [name for name in names if last_name(name) in reader.misread]
        if misread and base.model_type in ("", *reader.misread_models):
            yield (
                f"{_listed(misread)}: for Llama's architecture, the rows of the heads are not reordered as the base "
                f"model's are; {by_converter}"
            )
        unread = [name for name in names if last_name(name) not in reader.projections]
        if reader.projections and unread and not words:
            yield f"{_listed(unread)} would not be read, only {', '.join(reader.projections)}; {_MERGE}"
        ranks = {own.site: self.adapter.rank if reader.one_rank else own.r for own in self.adapter.sites}
        wide = [site for site, r in ranks.items() if r > site.out_features]
        if reader.tall_b and wide:
            yield (
                f"{_listed(site.name for site in wide)}: rank {ranks[wide[0]]} is above its {wide[0].out_features} "
                f"outputs, and B would be read transposed; {_MERGE}"
            )

    # -- what an export mends ------------------------------------------------------------------------------------------

    def format(self) -> Iterator[str]:
        """The kind of files, and of values in the configuration."""
        config, reader, named = self.adapter.config, self.reader, self.adapter.config.get("target_modules")
        if not reader.peft_folder:
            yield "it reads no PEFT folder, only files of its own"
        if reader.named_list and not isinstance(named, list) and named != "all-linear":
            yield "target_modules is no list, and only a list is read"
        if reader.whole_alpha and not isinstance(config["lora_alpha"], int):
            yield f"lora_alpha={config['lora_alpha']!r} is no whole number"
        if reader.plain_bias and config.get("bias", "none") != "none":
            yield f"bias={config['bias']!r:.40} is refused"
        if reader.ranks and self.adapter.asked_rank > reader.ranks[-1] >= self.adapter.rank:
            yield f"the configuration has a rank of {self.adapter.asked_rank}, which no site has"

    def ranks(self) -> Iterator[str]:
        """Ranks that differ; of padded ones those of a projection: TGI and LoRAX stack its matrices of all layers."""
        if self.reader.padded:
            for projection, sites in self._by_projection().items():
                ranks = sorted({padded_rank(own.r) for own in sites})
                if len(ranks) > 1:
                    yield f"{projection} has ranks from {ranks[0]} to {ranks[-1]}; one is read"
        elif self.reader.one_rank:
            ranks = sorted({own.r for own in self.adapter.sites})
            if len(ranks) > 1:
                yield f"ranks from {ranks[0]} to {ranks[-1]}; one rank for all sites is read"
            elif ranks[0] != self.adapter.config["r"]:
                yield f"all ranks are {ranks[0]}, and r={self.adapter.config['r']} is read"

    def scales(self) -> Iterator[str]:
        """Sites whose B·A would be multiplied by another number."""
        sites = self.adapter.sites
        scales = self._padded_scales() if self.reader.padded else map(self._read_scale, sites)
        pairs = zip(sites, scales, strict=True)
        wrong = [(own, scale) for own, scale in pairs if abs(scale / own.scale - 1) > 1e-9]
        if wrong:
            own, scale = wrong[0]
            yield (
                f"the scale of {len(wrong)} of {len(sites)} sites is read wrong: {own.site.name} was trained with "
                f"{own.scale:g} and would get {scale:g}"
            )

    def groups(self) -> Iterator[str]:
        """Parts of fused matrices."""
        names = [own.site.name for own in self.adapter.sites]
        for group in self.reader.groups:
            split = list(split_groups(names, group, self.base.layers))
            if split:
                part, lacking = last_name(split[0][0]), " and ".join(map(last_name, split[0][1]))
                where = _layers(name for name, _ in split)
                yield f"{part} without {lacking} in {where}: {', '.join(group.names)} are one matrix"

    def layers(self) -> Iterator[str]:
        """Projections that some layer lacks."""
        if self.reader.every_layer:
            for projection, holes in missing_layers([own.site for own in self.adapter.sites], self.base.layers).items():
                yield f"{projection} is missing in {_layers(holes)} and would be dropped everywhere"

    # ------------------------------------------------------------------------------------------------------------------

    def _is_head(self, tensor: str) -> bool:
        return _module(tensor) in self.reader.heads

    def _read_scale(self, own: Adapted) -> float:
        """What the runtime multiplies B·A of a site by."""
        if self.reader.scale == "site":
            return own.scale
        return self._scale(self.adapter.config["r"] if self.reader.scale == "config" else own.r)

    def _scale(self, r: float) -> float:
        """lora_alpha ÷ r, as the runtime reads it."""
        config = self.adapter.config
        return config["lora_alpha"] / (r**0.5 if self.reader.rslora and config.get("use_rslora") else r)

    def _padded_scales(self) -> list[float]:
        """The scale of each site where loading a projection overwrites r with its padded rank, for the next ones."""
        r: int = self.adapter.config["r"]
        scales: dict[str, float] = {}
        dropped = missing_layers([own.site for own in self.adapter.sites], self.base.layers)
        for projection, sites in self._by_projection().items():
            scales |= {own.site.name: self._scale(r) for own in sites}
            if sites[0].site.projection not in dropped and projection in self.reader.projections:
                r = padded_rank(sites[0].r)
        return [scales[own.site.name] for own in self.adapter.sites]

    def _by_projection(self) -> dict[str, list[Adapted]]:
        """The sites of each projection in the order that the runtime loads them; others come last."""
        order = self.reader.projections
        found: dict[str, list[Adapted]] = {name: [] for name in order}
        for own in self.adapter.sites:
            found.setdefault(last_name(own.site.name), []).append(own)
        return {name: sites for name, sites in found.items() if sites}


def _module(tensor: str) -> str:
    """The last name of the module that a tensor belongs to; empty where its name has no dot."""
    return last_name(tensor.rpartition(".")[0])


def _layers(names: Iterable[str]) -> str:
    """The numbers of the layers that ``names`` are in."""
    numbers = sorted({layer_number(name) for name in names}, key=lambda number: (len(number), number))
    return f"{'layer' if len(numbers) == 1 else 'layers'} {_listed(numbers)}"


def _listed(names: Iterable[str]) -> str:
    every: Sequence[str] = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
