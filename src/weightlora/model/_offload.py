"""Weights that leave their device while nothing needs them, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from torch import Tensor, nn

from weightlora.errors import OptionError


class Offload:
    """The weights of some modules of a model, on their device or in the memory of the CPU. Buffers stay.

    Args:
        model: The whole model; weights that other modules of it share stay on the device.
        modules: Parts of it, of which nothing is trained.

    Raises:
        OptionError: The modules are quantised to 8 bit, which keeps second references to its weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> lower = Offload(net, [net[0]])
        >>> lower.leave()
        >>> lower.bytes, lower.is_away, net[0].weight.device
        (24, True, device(type='cpu'))
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        inside = {id(module): module for module in modules}
        others = {id(p) for p in _outside(model, inside)}
        own = {id(p): p for module in inside.values() for p in module.parameters()}
        self._weights = [p for key, p in own.items() if key not in others]
        if any("SCB" in vars(p) for p in self._weights):
            raise OptionError("offload does not go with load_in_8bit; load in 4 bit, or leave offload out")
        self._devices = [p.device for p in self._weights]
        self._kept: list[Tensor] = []
        """On the CPU; the weights are frozen, so that these stay true."""
        self.is_away = False

    @property
    def bytes(self) -> int:
        """What leaves the device."""
        return sum(p.numel() * p.element_size() for p in self._weights)

    def leave(self) -> None:
        """Free the device of the weights."""
        if not self.is_away:
            self._kept = self._kept or [p.data.cpu() for p in self._weights]
            self._place(map(self._while_away, self._kept))
            self.is_away = True

    def come_back(self) -> None:
        """Put the weights back onto their device."""
        if self.is_away:
            self._place(kept.to(device) for kept, device in zip(self._kept, self._devices, strict=True))
            self.is_away = False

    def _while_away(self, kept: Tensor) -> Tensor:
        """What a weight is while it is away: a checkpoint of the whole model reads it."""
        return kept

    def _place(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._weights, values, strict=True):
            parameter.data = value


def _outside(module: nn.Module, inside: Container[int]) -> Iterator[nn.Parameter]:
    """The parameters of a model that are reached without passing through these modules."""
    if id(module) not in inside:
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _outside(child, inside)
