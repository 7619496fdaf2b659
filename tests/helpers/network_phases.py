"""Imports modules, trains, evaluates, and trains with a logger and API keys, all without a network.

The argument is JSON: `modules`, the words of `training`, `evaluation` and `with keys`, and the `keys`. The attempts to
reach other machines are in one file for each phase, in the folder of the file NETWORK_LOG.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import network_guard

LOG = Path(os.environ["NETWORK_LOG"])


def begin(phase: str) -> None:
    os.environ["NETWORK_LOG"] = str(LOG.with_name(f"{phase}.txt"))
    print(f"== {phase}", flush=True)


def run(verb: str, words: list[str]) -> None:
    sys.argv = ["dino", verb, *words]
    from dino_lightning.cli.main import main  # after the first phase

    assert not main()
    os.environ.pop("DINO_LIGHTNING_RUN", None)


def all_phases() -> None:
    todo = json.loads(sys.argv[1])
    network_guard.leave_network()
    network_guard.install()
    begin("imports")
    for name in todo["modules"]:
        importlib.import_module(name)
    begin("training")
    run("train", todo["training"])
    begin("evaluation")
    run("eval", todo["evaluation"])
    begin("with keys")
    os.environ.update(todo["keys"])
    run("train", todo["with keys"])


if __name__ == "__main__":
    all_phases()
