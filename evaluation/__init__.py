"""Comparing a network's precisions: accuracy, agreement, latency, the verdict, the per-layer analysis, the report.

Importing this package costs nothing; the modules that need torch import it themselves.
"""
