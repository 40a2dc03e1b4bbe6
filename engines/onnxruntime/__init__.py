"""ONNX Runtime as an engine: how it runs a network, the form that its integer kernels take, and what they multiply."""
