"""DAVIS video object segmentation: `eval=video`."""
