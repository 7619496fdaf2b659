"""The versions, machine, commit and command line of a run."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The versions, machine, commit and command line of this process."""
    packages = ("dino-lightning", "torch", "torchvision", "lightning", "timm", "hydra-core")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "gpu": gpu,
        "cpu_count": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


@cache
def commit() -> str | None:
    """Commit of the checkout that the code runs from, with `+` if it was modified; None for an installed wheel.

    Cached at the start of a run, because the checkout may have changed by its end.
    """
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder), "--no-optional-locks"]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return None
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.stdout.strip() else "")
