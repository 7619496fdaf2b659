"""Benchmarks in their own layouts on disk."""
