"""Attention maps as segmentations: `eval=attention`."""
