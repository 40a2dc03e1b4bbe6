"""Everything about TensorRT: what of it can be used here, its calibration, its engines, and the form that suits it.

Nothing outside this package imports Torch-TensorRT or TensorRT; within it, :func:`support.load` alone does. The engine
is :class:`engines.tensorrt.engine.TorchTensorRTEngine`, made by :func:`engines.select.make_engine`.
"""
