"""Scales: which tensors share one, and which the values of a network have by a calibration table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import fx
from torch.nn import functional as F

from calib.network import Network
from calib.table import CalibrationTable

logger = logging.getLogger(__name__)


def scale_sources(
    nodes: Iterable[fx.Node],
    kinds: Mapping[str, str],
    own: Mapping[str, str],
    tensors: Mapping[str, str],
    module: fx.GraphModule,
) -> dict[str, str]:
    """Tensor -> tensor whose histogram gives its scale, by the rule that TensorRT 10.6's tables show.

    The output of pooling over a window, maximum or average, takes its input's scale. All others have their own:
    global pooling, a concatenation and its inputs.
    """
    source = {tensor: tensor for tensor in tensors}
    for node in nodes:
        tensor = own[node.name]
        # What an in-place ReLU overwrites is another tensor: it keeps its own scale.
        if kinds[node.name] not in ("maxpool", "avgpool") or tensors.get(tensor) != node.name:
            continue
        if not _pools_everything(node, module):
            source[tensor] = source[own[node.all_input_nodes[0].name]]
    return source


def _pools_everything(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a pooling operation makes one value of each channel, of whatever size (adaptive pooling to size 1)."""
    if node.op == "call_module":
        size = getattr(module.get_submodule(str(node.target)), "output_size", None)
    elif node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    else:
        return False
    return size == 1 or (isinstance(size, tuple | list) and list(size) == [1, 1])


def node_scales(network: Network, table: CalibrationTable) -> dict[str, float]:
    """Scales by fx node name: that of its tensor in the table, for every activation that has a usable one.

    Entries of tensors that the network does not have are named in a warning.
    """
    foreign = [name for name in table.scales if name not in network.tensors]
    if foreign:
        logger.warning("the table names tensors that %s does not have: %s", network.name, ", ".join(foreign))
    usable = {name: scale for name, scale in table.scales.items() if name not in table.unusable}
    return {node: usable[tensor] for node, tensor in network.tensor_of.items() if tensor in usable}
