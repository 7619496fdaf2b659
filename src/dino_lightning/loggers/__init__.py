"""Metrics to `metrics.csv` and to Weights & Biases."""
