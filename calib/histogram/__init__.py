"""Histograms of absolute values: what one is and how it is counted, of a ReLU's two sides at once, and on a GPU."""
