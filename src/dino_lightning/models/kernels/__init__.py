"""Faster implementations of PyTorch operations; each names the reference implementation that it equals."""
