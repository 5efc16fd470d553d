"""Which layers and which parts of fused matrices an adapter covers, and what would have to be added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from weightlora.model.sites import Site

if TYPE_CHECKING:
    from weightlora.serving import Group


def last_name(site: str) -> str:
    """Return the last part of a site's name.

    Example:
        >>> last_name("model.layers.0.mlp.up_proj")
        'up_proj'
    """
    return site.rpartition(".")[2]


def layer_number(site: str) -> str:
    """Return the number of the layer that a site is in; empty outside of layers.

    Example:
        >>> layer_number("model.layers.12.mlp.up_proj"), layer_number("lm_head")
        ('12', '')
    """
    return last_name(Site(site, 0, 0).block)


def missing_layers(sites: Iterable[Site], base: Mapping[str, Site]) -> dict[str, list[str]]:
    """Return the projections that some layers lack, each with the names of the sites that are not there.

    Args:
        sites: Those of the adapter; sites outside of layers, such as an output head, are left out.
        base: The base model's linear layers; empty takes the layers from 0 to the last that the adapter has.

    Example:
        >>> missing_layers([Site("h.0.q", 1, 1), Site("h.2.q", 1, 1), Site("h.0.v", 1, 1)], {})
        {'q': ['h.1.q'], 'v': ['h.1.v', 'h.2.v']}
    """
    present = [site for site in sites if site.block]
    names = {site.name for site in present}
    found: dict[str, list[str]] = {}
    for stack, projection in sorted({(_stack(site), site.projection) for site in present}):
        if base:
            wanted = [own.name for own in base.values() if (_stack(own), own.projection) == (stack, projection)]
        else:
            last = max(int(layer_number(site.name)) for site in present if _stack(site) == stack)
            wanted = [f"{stack}{number}.{projection}" for number in range(last + 1)]
        holes = [name for name in wanted if name not in names]
        if holes:
            found[projection] = holes
    return found


def split_groups(sites: Iterable[str], group: Group, base: Mapping[str, Site]) -> Iterator[tuple[str, list[str]]]:
    """Yield a part of ``group`` that the adapter has in a block, and the names in this block that it needs in addition.

    Args:
        sites: Names of the adapter's sites.
        group: Projections that are one matrix in the runtime.
        base: The base model's linear layers; what it does not have is not needed.
    """
    names = set(sites)
    for name in sorted(names):
        stem = name.removesuffix(last_name(name))
        lacking = [
            stem + other for other in group.needed if stem + other not in names and (not base or stem + other in base)
        ]
        if last_name(name) in group.names and lacking:
            yield name, lacking


def _stack(site: Site) -> str:
    """The name up to the layer's number."""
    return site.block.removesuffix(layer_number(site.name))
