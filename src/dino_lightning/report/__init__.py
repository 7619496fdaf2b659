"""`report.html`, one self-contained page about a run, and the table of its results for the terminal."""

from dino_lightning.report.page import results_table, write_report

__all__ = ["results_table", "write_report"]
