"""Checks between configuration keys."""
