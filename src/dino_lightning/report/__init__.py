"""`report.html`, one self-contained page about a run or several, and the table of a run's results for the terminal."""

from dino_lightning.report.page import results_table, write_report

__all__ = ["results_table", "write_report"]
