"""Whether a runtime reads an adapter right: from its files alone, with each reason why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightlora.serving._coverage import last_name, layer_number, missing_layers, split_groups

if TYPE_CHECKING:
    from weightlora.model.sites import Site
    from weightlora.serving import Reader
    from weightlora.serving.adapter import Adapted, Adapter

#: Initialisations that only set the start of A and B. With another one PEFT changes the base weights, too, when it
#: loads the adapter.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MERGE = "merge the adapter into the base model (PeftModel.merge_and_unload) and serve that"
_SHOWN = 4


@dataclass(frozen=True)
class Problem:
    """A reason why a runtime does not read an adapter right."""

    text: str
    mended: bool
    """Whether an export mends it."""


def find_problems(adapter: Adapter, reader: Reader, base: Mapping[str, Site] | None = None) -> tuple[Problem, ...]:
    """Return every reason why ``reader`` does not compute what PEFT computes; none where it does.

    Args:
        adapter: The files of an adapter.
        reader: The runtime.
        base: The base model's linear layers; without them, the layers are those that the adapter names.
    """
    case = _Case(adapter, reader, base or {})
    finders = (case.unread, case.unknown, case.format, case.ranks, case.scales, case.groups, case.layers)
    return tuple(problem for find in finders for problem in find())


def needed_option(adapter: Adapter, reader: Reader) -> str | None:
    """Return the option that the server must be started with for this adapter; None where the defaults do.

    Example:
        >>> from pathlib import Path
        >>> from weightlora.model.sites import Site
        >>> from weightlora.serving import reader_of
        >>> from weightlora.serving.adapter import Adapted, Adapter
        >>> adapter = Adapter(Path("."), {}, (Adapted(Site("q_proj", 64, 64), 40, 2.0),), ())
        >>> needed_option(adapter, reader_of("vllm"))
        '--max-lora-rank 64'
    """
    limit = next((limit for limit in reader.ranks if limit >= adapter.rank), None)
    if limit is None or reader.default_rank is None or limit <= reader.default_rank:
        return None
    return f"{reader.rank_option} {limit}"


@dataclass(frozen=True)
class _Case:
    """An adapter and a runtime; each method yields the problems of one kind."""

    adapter: Adapter
    reader: Reader
    base: Mapping[str, Site]

    def unread(self) -> Iterator[Problem]:
        """What no layout can express."""
        config, others = self.adapter.config, self.adapter.others
        if config.get("use_dora"):
            yield Problem(f"DoRA's magnitudes are not read; {_MERGE}", mended=False)
        if config.get("lora_bias"):
            yield Problem(f"the biases of B (lora_bias) are not read; {_MERGE}", mended=False)
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            yield Problem(
                f"init_lora_weights={start!r:.40} belongs to base weights that PEFT has changed; save the adapter with "
                "path_initial_model_for_weight_conversion",
                mended=False,
            )
        for name in ("alora_invocation_tokens", "layer_replication", "target_parameters"):
            if config.get(name):
                yield Problem(f"{name} is not read; {_MERGE}", mended=False)
        known = ("lora_magnitude_vector", "lora_B.bias")
        lost = [name for name in others if not any(word in name for word in known) and not self._is_head(name)]
        if lost:
            yield Problem(
                f"{len(lost)} other tensors are not read, {lost[0].removeprefix('base_model.model.')} among them; "
                f"{_MERGE}",
                mended=False,
            )
        if self.reader.ranks and self.adapter.rank > self.reader.ranks[-1]:
            yield Problem(
                f"rank {self.adapter.rank} is above {self.reader.ranks[-1]}, the largest; {_MERGE}", mended=False
            )

    def unknown(self) -> Iterator[Problem]:
        """Sites that the runtime or the base model does not have."""
        names = [own.site.name for own in self.adapter.sites]
        strange = [name for name in names if self.base and name not in self.base]
        if strange:
            yield Problem(f"the base model has no {_listed(strange)}; give the right one with --base", mended=False)
        unread = [name for name in names if last_name(name) not in self.reader.projections]
        if self.reader.projections and unread:
            known = ", ".join(self.reader.projections)
            yield Problem(f"{_listed(unread)} would not be read, only {known}; {_MERGE}", mended=False)
        ranks = {own.site: self.adapter.rank if self.reader.one_rank else own.r for own in self.adapter.sites}
        wide = [site for site, r in ranks.items() if r > site.out_features]
        if self.reader.tall_b and wide:
            yield Problem(
                f"{_listed(site.name for site in wide)}: rank {ranks[wide[0]]} is above its {wide[0].out_features} "
                f"outputs, and B would be read transposed; {_MERGE}",
                mended=False,
            )

    def format(self) -> Iterator[Problem]:
        """The kind of files, and of values in the configuration."""
        config = self.adapter.config
        if not self.reader.peft_folder:
            yield Problem("it reads no PEFT folder, only files of its own", mended=True)
        named = config.get("target_modules")
        if self.reader.named_list and not isinstance(named, list) and named != "all-linear":
            yield Problem("target_modules is no list, and only a list is read", mended=True)
        if self.reader.whole_alpha and not isinstance(config["lora_alpha"], int):
            yield Problem(f"lora_alpha={config['lora_alpha']!r} is no whole number", mended=True)

    def ranks(self) -> Iterator[Problem]:
        """Ranks that differ."""
        ranks = sorted({own.r for own in self.adapter.sites})
        if self.reader.one_rank and len(ranks) > 1:
            yield Problem(f"ranks from {ranks[0]} to {ranks[-1]}; one rank for all sites is read", mended=True)
        elif self.reader.one_rank and ranks[0] != self.adapter.config["r"]:
            yield Problem(f"all ranks are {ranks[0]}, and r={self.adapter.config['r']} is read", mended=True)

    def scales(self) -> Iterator[Problem]:
        """Sites whose B·A would be multiplied by another number."""
        wrong = [own for own in self.adapter.sites if abs(self._read_scale(own) / own.scale - 1) > 1e-9]
        if wrong:
            yield Problem(
                f"the scale of {len(wrong)} of {len(self.adapter.sites)} sites is read wrong: {wrong[0].site.name} was "
                f"trained with {wrong[0].scale:g} and would get {self._read_scale(wrong[0]):g}",
                mended=True,
            )

    def groups(self) -> Iterator[Problem]:
        """Parts of fused matrices."""
        names = [own.site.name for own in self.adapter.sites]
        for group in self.reader.groups:
            split = list(split_groups(names, group, self.base))
            if split:
                part, lacking = split[0]
                yield Problem(
                    f"{last_name(part)} without {' and '.join(map(last_name, lacking))} in "
                    f"{_layers(name for name, _ in split)}: {', '.join(group.names)} are one matrix",
                    mended=True,
                )

    def layers(self) -> Iterator[Problem]:
        """Projections that some layer lacks."""
        if self.reader.every_layer:
            for projection, holes in missing_layers([own.site for own in self.adapter.sites], self.base).items():
                yield Problem(
                    f"{projection} is missing in {_layers(holes)} and would be dropped everywhere", mended=True
                )

    def _is_head(self, tensor: str) -> bool:
        return tensor.split(".")[-2] in self.reader.heads

    def _read_scale(self, own: Adapted) -> float:
        """What the runtime multiplies B·A of a site by."""
        if self.reader.scale == "site":
            return own.scale
        config = self.adapter.config
        r: float = config["r"] if self.reader.scale == "config" else own.r
        return config["lora_alpha"] / (r**0.5 if self.reader.rslora and config.get("use_rslora") else r)


def _layers(names: Iterable[str]) -> str:
    """The numbers of the layers that ``names`` are in."""
    numbers = sorted({layer_number(name) for name in names}, key=lambda number: (len(number), number))
    return f"{'layer' if len(numbers) == 1 else 'layers'} {_listed(numbers)}"


def _listed(names: Iterable[str]) -> str:
    every: Sequence[str] = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
