"""An adapter of fewer ranks: one budget over the directions of all sites, after the training.

Without data each direction counts by its squared norm, with data by what it changes for the inputs of its site. Those
that hold most for their price are kept, whatever their site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from weightlora.errors import MissingPackageError, OptionError, PlanError, ServingError
from weightlora.files import write_json, write_text
from weightlora.folders import require_replaceable, whole_folder
from weightlora.plan.card import CARD_FILE, PICTURE_FILE
from weightlora.plan.heatmap import draw_heatmap
from weightlora.plan.limits import Limits, read_bytes
from weightlora.plan.plan import ADAPTER_FILES, AdapterPlan, PlannedSite, tensor_headers
from weightlora.serving.adapter import Adapted, Adapter, base_name, matrix_name, read_files
from weightlora.serving.check import PLAIN_STARTS
from weightlora.serving.moments import Directions, find_directions, kept_ranks
from weightlora.serving.write import (
    DTYPES,
    Planned,
    copy_beside,
    file_header,
    require_apart,
    stock_config,
    write_tensors,
)
from weightlora.text import in_markdown
from weightlora.validation import Count, Share, checked

_WRITER = "weightlora squeeze"
_PLAN_FILE = "plan.json"
#: Settings with which a site computes something else than base + s·B·A.
_NOT_PLAIN = ("use_dora", "lora_bias", "target_parameters", "layer_replication", "use_bdlora", "use_qalora")


@dataclass(frozen=True)
class Squeezed:
    """An adapter that was cut, and what was lost."""

    folder: Path
    plan: AdapterPlan
    """Rank of each site before (``lora_r``) and after (``r``); the score is the site's share of the squared norm."""
    errors: Mapping[str, float]
    """Lost share of the squared norm of each site's update, in [0, 1], by the site's name."""

    @property
    def error(self) -> float:
        """Lost share of the squared norm of all updates, in [0, 1]."""
        return sum(entry.score * self.errors[entry.site.name] for entry in self.plan.entries)


def squeeze(
    folder: str | Path,
    output_dir: str | Path,
    *,
    parameters: float | None = None,
    max_rank: int | None = None,
    file_size: str | None = None,
    error: float | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Squeezed:
    """Write the adapter in ``folder`` with fewer ranks to ``output_dir``, as stock PEFT; all limits hold.

    No base weights are needed. In memory are the matrices of one site, whose directions are found twice: to choose, and
    to write. All sites get one whole ``lora_alpha``, which every runtime reads. A site that keeps its rank keeps its
    matrices. Heads and other modules that were trained whole stay.

    Args:
        folder: A directory that PEFT saved a LoRA adapter into, with any ranks and alphas, also rsLoRA.
        output_dir: The new directory, outside of ``folder``. What an earlier call wrote there is replaced; a folder
            with anything else is refused.
        parameters: At most so many parameters in A and B, or this share of the adapter's in (0, 1].
        max_rank: The largest rank of a site.
        file_size: The largest ``adapter_model.safetensors``, such as ``"10MB"``.
        error: The share of the squared norm that may be lost, in [0, 1). As few parameters are kept as it allows.
        moments: Second moments of each site's inputs as A sees them, from :func:`adapter_moments`. None weights all
            inputs alike.

    Raises:
        OptionError: No limit is given, one is out of its range, or they exclude each other.
        PlanError: The folder holds no LoRA adapter, or one that changes nothing.
        ServingError: The adapter is not plain LoRA, such as one of DoRA.
        OutputError: The folder holds other files, overlaps ``folder``, or cannot be written.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> import torch
        >>> get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), lora).save_pretrained(tmp_path / "adapter")
        >>> squeezed = squeeze(tmp_path / "adapter", tmp_path / "small", parameters=0.5)
        >>> squeezed.plan.ranks, 0 < squeezed.error < 0.5
        ({'0': 2}, True)
    """
    asked = {"parameters": parameters, "max_rank": max_rank, "file_size": file_size, "error": error}
    limits, adapter = require_possible(folder, output_dir, **asked)
    _require_moments(adapter, moments)
    with safe_open(adapter.folder / ADAPTER_FILES[1], framework="pt") as tensors:
        source = _OpenAdapter(adapter, tensors, moments)
        gains = [source.directions(own).gains for own in adapter.sites]
        ranks = _ranks(source, gains, limits)
        squeezed = Squeezed(Path(output_dir), _plan(adapter, gains, ranks, limits), _errors(adapter, gains, ranks))
        with whole_folder(output_dir, _WRITER) as draft:
            _write(draft, source, squeezed.plan)
            _write_beside(draft, adapter, squeezed)
    return squeezed


# -- what is asked -----------------------------------------------------------------------------------------------------


def _checked(**asked: Any) -> dict[str, Any]:
    """The limits that are given.

    Raises:
        OptionError: There is none, or one is out of its range.
    """
    limits = {name: value for name, value in asked.items() if value is not None}
    if not limits:
        raise OptionError("squeeze has no limit: give parameters, max_rank, file_size or error")
    Limits(parameters=limits.get("parameters"))
    if "max_rank" in limits:
        checked(Count, limits["max_rank"], "max_rank")
    if "error" in limits:
        checked(Share, limits["error"], "error")
    if "file_size" in limits and not (isinstance(limits["file_size"], str) and read_bytes(limits["file_size"])):
        raise OptionError(
            f"file_size={limits['file_size']!r:.40} is not allowed: give a size with its unit, such as 10MB or 512KiB"
        )
    return limits


def require_possible(folder: str | Path, output_dir: str | Path, **asked: Any) -> tuple[dict[str, Any], Adapter]:
    """Return the limits and the adapter, before anything is computed.

    Args:
        folder: See :func:`squeeze`.
        output_dir: See there.
        asked: The limits, as there.

    Raises:
        OptionError: See there, as the others.
        PlanError: See there.
        ServingError: See there.
        OutputError: See there.
    """
    limits, adapter = _checked(**asked), read_files(folder)
    _require_plain(adapter)
    require_apart(adapter.folder, Path(output_dir))
    require_replaceable(output_dir, _WRITER)
    return limits, adapter


def _require_plain(adapter: Adapter) -> None:
    """Raise where a site computes something else than base + s·B·A.

    Raises:
        ServingError: With the setting or the tensor.
    """
    config = adapter.config
    said = next((f"{name}={config[name]!r:.40}" for name in _NOT_PLAIN if config.get(name)), None)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        said = f"init_lora_weights={start!r:.40}, for which PEFT changes the base weights"
    said = next((f"the tensor {name}" for name in adapter.others if ".lora_" in name), said)
    if said is not None:
        raise ServingError(
            f"{adapter.folder} has {said}: only plain LoRA of linear layers and embeddings can be squeezed; merge the "
            "adapter into the base model (PeftModel.merge_and_unload), or train plain LoRA"
        )


def _require_moments(adapter: Adapter, moments: Mapping[str, Tensor] | None) -> None:
    """Raise where a site has no moments.

    Raises:
        OptionError: With the site.
    """
    without = [own.site.name for own in adapter.sites if moments is not None and own.site.name not in moments]
    if without:
        kind = "adapters of embeddings have none; leave the data out" if adapter.embeds(without[0]) else "give them all"
        raise OptionError(f"moments has nothing of {without[0]}: {kind}")
    for own in adapter.sites:
        shape = (own.r, own.r) if moments is None else tuple(moments[own.site.name].shape)
        if shape != (own.r, own.r):
            raise OptionError(f"moments of {own.site.name} has shape {shape}: its rank is {own.r}; give this adapter's")


@dataclass(frozen=True)
class _OpenAdapter:
    """An adapter's open file; the matrices of a site are read when it is its turn."""

    adapter: Adapter
    tensors: Any
    moments: Mapping[str, Tensor] | None

    def directions(self, own: Adapted) -> Directions:
        """The directions of a site.

        Raises:
            PlanError: Its numbers are not finite.
        """
        moment = None if self.moments is None else self.moments[own.site.name]
        try:
            return find_directions(*self._matrices(own), own.scale, moment)
        except PlanError as error:
            raise PlanError(f"{self.adapter.folder} is damaged at {own.site.name}: {error}") from error

    def planned(self, ranks: Mapping[str, int], alpha: float) -> dict[str, Planned]:
        """The tensors of an adapter with these ranks; other tensors as they are."""
        headers = tensor_headers(self.adapter.folder)
        found: dict[str, Planned] = {}
        cut = lru_cache(maxsize=1)(self._cut)  # A and B of one site are made together, and those of the next after them
        for own in self.adapter.sites:
            k, site = ranks.get(own.site.name, 0), own.site
            for i, shape in enumerate(((k, site.in_features), (site.out_features, k))) if k else ():
                name = matrix_name(site.name, "AB"[i], embedding=own.embedding)
                found[name] = Planned(headers[name][0], shape, partial(_item, cut, own, k, alpha, i))
        for name, shape in self.adapter.others.items():
            if headers[name][0] not in DTYPES:
                raise ServingError(f"{self.adapter.folder} has {name} of type {headers[name][0]}; save it in another")
            site, wrapped, rest = name.removeprefix("base_model.model.").rpartition(".base_layer.")
            # What a LoRA layer has inside, such as a trained bias, is the plain layer's where there is no adapter.
            new = f"base_model.model.{site}.{rest}" if wrapped and not ranks.get(site) else name
            found[new] = Planned(headers[name][0], shape, partial(self.tensors.get_tensor, name))
        return found

    def _cut(self, own: Adapted, k: int, alpha: float) -> tuple[Tensor, Tensor]:
        a, b = self._matrices(own)
        if k < own.r:
            return self.directions(own).cut(a, b, k, alpha / k)
        factor = own.scale * k / alpha
        return a, b if factor == 1 else b.double() * factor

    def _matrices(self, own: Adapted) -> tuple[Tensor, Tensor]:
        a, b = (self.tensors.get_tensor(matrix_name(own.site.name, m, embedding=own.embedding)) for m in "AB")
        return a, b


def _item(cut: Callable[..., tuple[Tensor, Tensor]], own: Adapted, k: int, alpha: float, i: int) -> Tensor:
    return cut(own, k, alpha)[i]


def _ranks(source: _OpenAdapter, gains: Sequence[Sequence[float]], limits: Mapping[str, Any]) -> list[int]:
    """The rank of each site within the limits.

    Raises:
        PlanError: The adapter changes nothing.
        OptionError: Nothing fits, or more than ``error`` is lost.
    """
    sites, total = source.adapter.sites, math.fsum(map(math.fsum, gains))
    if total == 0:
        raise PlanError(f"{source.adapter.folder} changes nothing: B·A is zero at each site; train it first")
    spare = limits.get("error", 0.0) * total
    highest = limits.get("max_rank")
    prices = [own.site.parameters(1) for own in sites]
    cut = math.fsum(gain for own in gains for gain in own[highest:]) if highest is not None else 0.0
    ranks = kept_ranks([own[:highest] for own in gains], prices, _most(source, limits), max(0.0, spare - cut))
    asked = ", ".join(f"{name}={value!r}" for name, value in limits.items() if name != "error")
    if not any(ranks):
        raise OptionError(
            f"no direction fits {asked}: one of the cheapest site has {min(prices):,} parameters; raise it"
        )
    lost = total - math.fsum(gain for own, r in zip(gains, ranks, strict=True) for gain in own[:r])
    if "error" in limits and lost > spare + 1e-12 * total:
        raise OptionError(
            f"{asked} loses {lost / total:.3g} of the squared norm, more than error={limits['error']}; raise either"
        )
    return ranks


def _most(source: _OpenAdapter, limits: Mapping[str, Any]) -> int | None:
    """The most parameters in A and B; None where they are not limited."""
    whole = sum(own.site.parameters(own.r) for own in source.adapter.sites)
    most = Limits(parameters=limits.get("parameters")).parameters_of(whole)
    size = read_bytes(limits.get("file_size", ""))
    if size is None:
        return most
    full = source.planned({own.site.name: own.r for own in source.adapter.sites}, 1.0)
    matrices = {name: own for name, own in full.items() if ".lora_" in name}
    rest = sum(_bytes(own) for name, own in full.items() if name not in matrices) + len(file_header(full))
    fits = (size - rest) // max(DTYPES[own.dtype].itemsize for own in matrices.values())
    return max(0, fits if most is None else min(most, fits))


def _bytes(own: Planned) -> int:
    return math.prod(own.shape) * DTYPES[own.dtype].itemsize


# -- what is written ---------------------------------------------------------------------------------------------------


def _plan(
    adapter: Adapter, gains: Sequence[Sequence[float]], ranks: Sequence[int], limits: Mapping[str, Any]
) -> AdapterPlan:
    total = math.fsum(map(math.fsum, gains))
    alpha: float = max(1, round(adapter.config["lora_alpha"]))
    entries = [
        PlannedSite(own.site, own.r, own.scale * own.r, r, alpha, math.fsum(held) / total)
        for own, held, r in zip(adapter.sites, gains, ranks, strict=True)
    ]
    return AdapterPlan(tuple(entries), rule="squeeze", options=dict(limits), base_model=base_name(adapter) or None)


def _errors(adapter: Adapter, gains: Sequence[Sequence[float]], ranks: Sequence[int]) -> dict[str, float]:
    return {
        own.site.name: math.fsum(held[r:]) / (math.fsum(held) or 1.0)
        for own, held, r in zip(adapter.sites, gains, ranks, strict=True)
    }


def _write(draft: Path, source: _OpenAdapter, plan: AdapterPlan) -> None:
    """Write configuration and weights."""
    kept = {entry.site.name: entry.r for entry in plan.entries if entry.r}
    alpha = plan.entries[0].alpha
    write_json(draft / ADAPTER_FILES[0], stock_config(source.adapter.config, kept, max(kept.values()), alpha=alpha))
    write_tensors(draft / ADAPTER_FILES[1], source.planned(kept, alpha))


def _write_beside(draft: Path, adapter: Adapter, squeezed: Squeezed) -> None:
    """Write the plan, its picture and the card, with the table of all sites at its end."""
    copy_beside(adapter.folder, draft)
    squeezed.plan.save(draft / _PLAN_FILE)
    try:
        draw_heatmap(squeezed.plan, draft / PICTURE_FILE)
    except MissingPackageError:
        (draft / PICTURE_FILE).unlink(missing_ok=True)  # that of the adapter before
    card = draft / CARD_FILE
    before = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.is_file() else ""
    write_text(card, before + "\n".join(_table(squeezed)) + "\n")


def _table(squeezed: Squeezed) -> Iterator[str]:
    plan = squeezed.plan
    yield "## Squeezed"
    yield ""
    yield (
        f"`weightlora squeeze` cut this adapter from {plan.lora_parameters:,} to {plan.parameters:,} parameters, and "
        f"{squeezed.error:.2%} of the squared norm of its updates is lost. Ranks above are those before."
    )
    yield from ("", "| site | rank before | rank after | lost |", "| --- | ---: | ---: | ---: |")
    for entry in plan.entries:
        name, lost = entry.site.name, squeezed.errors[entry.site.name]
        yield f"| {in_markdown(name)} | {entry.lora_r} | {entry.r} | {lost:.2%} |"
