"""Speed, measured side by side with what people use otherwise: ``python -m benchmarks`` (``make bench``)."""
