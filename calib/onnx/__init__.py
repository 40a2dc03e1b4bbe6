"""ONNX files: calibrated, given Q/DQ pairs, and read for the names that TensorRT's parser gives their tensors."""
