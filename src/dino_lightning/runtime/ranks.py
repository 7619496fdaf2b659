"""TODO."""

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK", "GROUP_RANK")
"""Environment variables that number the processes of a run from 0."""


def is_first_process() -> bool:
    """Whether this process is the first of its run, or the only one, as far as the environment knows."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)
