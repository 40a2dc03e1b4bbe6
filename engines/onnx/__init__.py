"""A network as ONNX files: the float graph, the one with Q/DQ pairs and 8-bit weights, and what is written of them.

``from engines.onnx import export_int8``.
"""

from engines.onnx.export import export_int8

__all__ = ["export_int8"]
