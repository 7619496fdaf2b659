"""What a person looks at: `report.html`, picture sheets, tables and plots of sweeps, the W&B workspace."""

from dino_lightning.report.page import results_table, write_report

__all__ = ["results_table", "write_report"]
