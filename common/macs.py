"""Multiply-accumulates of a network, layer by layer: how many compute in INT8. Imports nothing that is slow to load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

ENOUGH: Final = 90.0
"""Percent of the multiply-accumulates in INT8 below which a network is called INT8 with a warning."""

_NAMED: Final = 3


@dataclass(frozen=True)
class LayerMacs:
    """One convolution or matrix product.

    Attributes:
        layer: Its name: that of the value it gives.
        operator: ``Conv``, ``Gemm``, ``MatMul``, ...
        macs: Multiply-accumulates for one image.
        int8: Whether both operands are INT8.
        reason: Why they are not; empty where they are.
        planned: Whether they were to be, whatever an engine made of it.
    """

    layer: str
    operator: str
    macs: int
    int8: bool
    reason: str = ""
    planned: bool = True


@dataclass(frozen=True)
class MacCount:
    """The convolutions and matrix products of a network.

    Attributes:
        source: What was counted, for people.
        layers: In the network's order.
        uncounted: Layers whose shapes are not known, or that loops and branches hold.
    """

    source: str
    layers: list[LayerMacs]
    uncounted: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def int8(self) -> int:
        """Those of them in INT8."""
        return sum(layer.macs for layer in self.layers if layer.int8)

    @property
    def share(self) -> float | None:
        """Percent in INT8; None for a network that multiplies nothing."""
        return 100 * self.int8 / self.total if self.total else None

    @property
    def in_float(self) -> list[LayerMacs]:
        """The layers that compute in float, the largest first."""
        return sorted((layer for layer in self.layers if not layer.int8), key=lambda layer: -layer.macs)

    def for_one_of(self, images: int) -> MacCount:
        """The count for one image, of a count for a batch of so many."""
        return replace(self, layers=[replace(layer, macs=layer.macs // images) for layer in self.layers])

    def summary(self) -> str:
        """One line such as ``INT8: 99.7 % of 4.1 G multiply-accumulates; in float: fc (2.0 M)``."""
        if self.share is None:
            return "INT8: the network has no convolution and no matrix product"
        parts = [f"INT8: {percent(self.share)} % of {amount(self.total)} multiply-accumulates"]
        if self.in_float:
            parts.append(f"in float: {_listed([f'{one.layer} ({amount(one.macs)})' for one in self.in_float])}")
        if self.uncounted:
            parts.append(f"not counted: {_listed(self.uncounted)}")
        return "; ".join(parts)

    def warning(self) -> str | None:
        """Why less than :data:`ENOUGH` percent are in INT8, the costliest reason first; None if enough are."""
        if self.share is None or self.share >= ENOUGH:
            return None
        reasons: dict[str, list[LayerMacs]] = {}
        for layer in self.in_float:
            reasons.setdefault(layer.reason, []).append(layer)
        lines = []
        for reason, layers in sorted(reasons.items(), key=lambda item: -sum(layer.macs for layer in item[1])):
            part = 100 * sum(layer.macs for layer in layers) / self.total
            lines.append(f"{percent(part)} % in {_listed([layer.layer for layer in layers])} ({reason})")
        return (
            f"only {percent(self.share)} % of the multiply-accumulates are in INT8; in float: {_listed(lines, 'parts')}"
        )


def percent(share: float) -> str:
    """One digit behind the point; 100.0 and 0.0 only where nothing is missing."""
    if 99.95 <= share < 100:
        return "99.9"
    return "0.1" if 0 < share < 0.05 else f"{share:.1f}"


def amount(macs: int) -> str:
    """A number of multiply-accumulates, two significant digits or more: ``4.1 G``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= factor:
            return f"{macs / factor:.1f} {unit}"
    return str(macs)


def _listed(items: list[str], noun: str = "layers") -> str:
    """The first few of a list, and how many more there are."""
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more {noun if more > 1 else noun[:-1]}" if more > 0 else "")
