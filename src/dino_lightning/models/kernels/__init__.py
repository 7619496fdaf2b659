"""Faster forms of what PyTorch has; each knows the plain form it equals."""
