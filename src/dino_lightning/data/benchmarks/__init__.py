"""Benchmark datasets in their original layouts on disk."""
