"""Which process of a run this one is, from the environment variables of launchers."""

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK", "GROUP_RANK")
"""Environment variables that number the processes or machines of a run from 0."""


def is_first_process() -> bool:
    """Whether this process is the first of its run, or the only one, as far as the environment variables tell."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


def is_first_on_machine() -> bool:
    """Whether this process is the first of its run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def rank_name() -> str:
    """The rank of this process, for messages; on its machine if the launcher has set no other."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
