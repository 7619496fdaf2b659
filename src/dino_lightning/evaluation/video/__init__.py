"""`eval=video`: DAVIS video object segmentation."""
