"""Which layers run in INT8."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from calib.network import OUTPUT, Layer, Network
from calib.scales import node_scales
from calib.table import CalibrationTable
from common.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Plan:
    """Which layers run in INT8, and the scale of every value they quantize.

    Attributes:
        network: The float network.
        layers: Names of the layers that run in INT8.
        scales: fx node name -> scale, for every activation that an INT8 layer reads.
        weighted: The INT8 layers with weights, in network order.
        kept: Layer -> why it stays in float although it could run in INT8.
        output_scale: Scale of the network's output where that is quantized too.
        own_scales: fx node name -> scale of its tensor in the table, for every activation that has a usable one.
        float_inputs: INT8 layer -> the fx nodes among its inputs that it reads in float nevertheless.
        rounded: fx nodes whose value is quantized with the scale of its own tensor for all that read it, those that
            compute in float too.
        integer_biases: fx nodes of the layers that add their bias to the int32 sum, rounded to a multiple of input
            scale * weight scale, and not in float.
    """

    network: Network
    layers: frozenset[str]
    scales: Mapping[str, float]
    weighted: tuple[Layer, ...]
    kept: Mapping[str, str]
    output_scale: float | None = None
    own_scales: Mapping[str, float] = field(default_factory=dict)
    float_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()
    integer_biases: frozenset[str] = frozenset()

    def reads_int8(self, layer: Layer, node: str) -> bool:
        """Whether ``layer`` runs in INT8 and takes the value of the fx node ``node`` quantized."""
        return layer.name in self.layers and node in layer.inputs and node not in self.float_inputs.get(layer.name, ())


def plan_int8(
    network: Network, table: CalibrationTable, keep_fp: Iterable[str] = (), quantize_output: bool = False
) -> Int8Plan:
    """Decide which layers run in INT8: all that can, but for those kept and those whose inputs have no scale.

    Args:
        network: The float network.
        table: Its calibration table; entries that the network does not know are named in a warning.
        keep_fp: Layers to keep in float.
        quantize_output: Whether the softmax and its output are quantized as well.

    Raises:
        InputError: ``keep_fp`` names no layer of the network, or the table has no scale for any of its layers.
    """
    known = {layer.name: layer for layer in network.layers}
    for name in keep_fp:
        if name not in known:
            raise InputError(f"no layer {name!r} in {network.name}: choose from {', '.join(known)}")
    own_scales = node_scales(network, table)
    layers: list[Layer] = []
    scales: dict[str, float] = {}
    kept: dict[str, str] = {}
    for layer in network.layers:
        if layer.kind == "softmax" and not quantize_output:
            continue
        missing = [network.tensor_of.get(item, item) for item in layer.inputs if item not in own_scales]
        if layer.name in keep_fp:
            kept[layer.name] = "kept in float as asked"
        elif missing:
            kept[layer.name] = f"no scale for {', '.join(missing)} in the table"
            logger.warning("%s stays in float: %s", layer.name, kept[layer.name])
        else:
            layers.append(layer)
            scales.update((item, own_scales[item]) for item in layer.inputs)
    if not layers and not set(known) <= {*keep_fp, OUTPUT}:
        raise InputError(f"the table has no scale for any layer of {network.name}: it belongs to another network")
    return Int8Plan(
        network=network,
        layers=frozenset(layer.name for layer in layers),
        scales=scales,
        weighted=tuple(layer for layer in layers if layer.kind in ("conv", "linear")),
        kept=kept,
        output_scale=own_scales.get(network.outputs[0]) if quantize_output and len(network.outputs) == 1 else None,
        own_scales=own_scales,
    )
