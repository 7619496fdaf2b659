"""Landmark retrieval and copy detection: `eval=retrieval`, `eval=copy_detection`."""
