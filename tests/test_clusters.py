"""The commands and the SLURM script of docs/clusters.md work unchanged."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import cast

import pytest
from composing import composed
from omegaconf import OmegaConf

from dino_lightning.config import TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
LINES = [line.split(" #")[0] for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if "train.py" in line]
(SCRIPT,) = [block for block in BLOCKS if block.startswith("#!")]


def test_there_are_commands_of_each_kind() -> None:
    for beginning, count in {"python": 6, "torchrun": 2, "srun": 1}.items():
        assert sum(line.startswith(beginning) for line in COMMANDS) == count


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_and_pass_the_checks(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    overrides = [word for word in words[words.index("train.py") + 1 :] if not word.startswith("--")]
    if any(word.startswith("hydra/launcher=") for word in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in overrides]  # the first run of a sweep
    overrides = [f"data.path={tmp_path}" if word.startswith("data.path=") else word for word in overrides]
    overrides = [word for word in overrides if not word.startswith("resume=")]
    config = composed(*overrides, "trainer.precision=32", "trainer.accelerator=cpu", output_dir=tmp_path)
    check_config(cast(TrainConfig, OmegaConf.to_object(config)))


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("torchrun")])
def test_torchrun_has_the_options(command: str) -> None:
    from torch.distributed.run import get_args_parser

    words = shlex.split(command)[1:]
    options, (*_, devices) = get_args_parser().parse_args(words), [w for w in words if w.startswith("trainer.devices")]
    assert options.training_script == "train.py"
    assert devices == f"trainer.devices={options.nproc_per_node}"
    nodes = [word for word in words if word.startswith("trainer.num_nodes")]
    assert nodes == ([] if options.nnodes in (None, "1:1", "1") else [f"trainer.num_nodes={options.nnodes}"])


def test_the_script_requests_the_resources_of_the_run() -> None:
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SCRIPT, flags=re.MULTILINE))
    assert f"trainer.devices={options['ntasks-per-node']} trainer.num_nodes={options['nodes']}" in SCRIPT
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"].startswith("USR1@")
    assert "#SBATCH --requeue\n" in SCRIPT
    assert options["open-mode"] == "append"


def test_the_page_has_the_exit_statuses() -> None:
    for status in (0, 2, PREEMPTED, INTERRUPTED, 1):
        assert re.search(rf"^\| {status} \| ", PAGE.read_text(), flags=re.MULTILINE), status
