"""Imports, training, evaluation and an offline logger use no network, and API keys are not written to files."""

import json
import os
import pkgutil
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from composing import SMALL, composed
from programs import Completed, run_program

import dino_lightning
from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.config.constraints import check_keys

PROJECT = Path(__file__).parents[2]
PHASES = str(PROJECT / "tests" / "helpers" / "network_phases.py")
SHORT = [*SMALL, "trainer.max_steps=2", "trainer.max_epochs=1", "callbacks.knn.queries=16", "cpu_threads=1"]
FLAGS = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "WANDB_MODE",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "WANDB_DISABLED",
)
"""Variables that would hide attempts if they were set on the machine of the test."""


class Machine:
    """Starts programs that record attempts to reach other machines; so do new Pythons that they start."""

    def __init__(self, folder: Path):
        self.log, self.home = folder / "attempts.txt", folder / "home"
        self.home.mkdir()
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text("import network_guard\nnetwork_guard.install()\n")
        paths = [
            str(folder / "guard"),
            str(PROJECT / "tests" / "helpers"),
            str(PROJECT / "src"),
            os.environ.get("PYTHONPATH", ""),
        ]
        self.variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NETWORK_LOG": str(self.log),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "WANDB__DISABLE_STATS": "true",
        }

    def run(self, *command: str) -> Completed:
        """Run a new Python."""
        environment = {name: value for name, value in os.environ.items() if name not in FLAGS} | self.variables
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        return Completed(done.returncode, done.stdout, done.stderr)

    def run_forked(self, program: str, *arguments: str) -> Completed:
        """Run a program in a process in which the libraries are imported already."""
        with pytest.MonkeyPatch.context() as patch:
            for name in FLAGS:
                patch.delenv(name, raising=False)
            return run_program(program, *arguments, cwd=self.home, variables=self.variables)

    @property
    def attempts(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_guard_records_attempts(machine: Machine) -> None:
    code = """
import socket, urllib.request
for attempt in (lambda: socket.create_connection(("192.0.2.1", 80), 1), lambda: socket.gethostbyname("example.org"),
                lambda: urllib.request.urlopen("http://example.org", timeout=1),
                lambda: socket.socket().connect(("192.0.2.1", 80))):
    try: attempt()
    except OSError as error: assert "no network in this test" in str(error), error
    else: raise SystemExit("a connection")
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
"""
    done = machine.run("-c", code)
    assert done.returncode == 0, done.stderr
    lines = machine.attempts.splitlines()
    assert [line.split(" by ")[0] for line in lines] == [
        "getaddrinfo 192.0.2.1",
        "gethostbyname example.org",
        "getaddrinfo example.org",
        "connect ('192.0.2.1', 80)",
    ]


KEYS = {"WANDB_API_KEY": secrets.token_hex(20), "HF_TOKEN": f"hf_{secrets.token_hex(17)}"}


@dataclass
class Done:
    """What `network_phases.py` has written."""

    home: Path
    output: str

    def attempts(self, phase: str) -> str:
        """Attempts to reach other machines in a phase, which has begun."""
        assert f"== {phase}\n" in self.output
        log = self.home.with_name(f"{phase}.txt")
        return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module", params=["forked process", pytest.param("new Python", marks=pytest.mark.slow)])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Only a new Python shows what the imports of libraries do; ours are also imported in the forked process."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    modules = [
        module.name
        for module in pkgutil.walk_packages(dino_lightning.__path__, "dino_lightning.")
        if not module.name.endswith(("_triton", "_kernels"))
    ]
    assert len(modules) > 100
    evaluation = ["eval=knn", f"checkpoint={machine.home / 'run'}", "data.train_images=64", "data.val_images=32"]
    evaluation += ["eval.k=[5]", "data.num_workers=0", "trainer.accelerator=cpu", "cpu_threads=1"]
    with_keys = [*SHORT, "callbacks.knn.enabled=false", "logger=wandb", "logger.mode=offline"]
    todo = {
        "modules": modules,
        "training": [*SHORT, f"output_dir={machine.home / 'run'}"],
        "evaluation": [*evaluation, f"output_dir={machine.home / 'knn'}"],
        "with keys": [*with_keys, f"output_dir={machine.home / 'wandb'}"],
        "keys": KEYS,
    }
    run = machine.run if request.param == "new Python" else machine.run_forked
    done = run(PHASES, json.dumps(todo))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Done(machine.home, done.stdout + done.stderr)


def test_imports_use_no_network(done: Done) -> None:
    assert done.attempts("imports") == ""


def test_training_and_evaluation_use_no_network(done: Done) -> None:
    assert (done.home / "run" / "teacher.safetensors").exists()
    assert (done.home / "knn" / "results.jsonl").exists()
    assert done.attempts("training") == ""
    assert done.attempts("evaluation") == ""


def test_api_keys_are_in_no_file_and_no_output(done: Done) -> None:
    assert done.attempts("with keys") == ""
    files = [path for path in done.home.rglob("*") if path.is_file()]
    assert (done.home / "wandb" / "checkpoints" / "last.ckpt") in files
    assert any(path.suffix == ".wandb" for path in files)
    for name, key in KEYS.items():
        assert key not in done.output
        files_with_key = [str(path) for path in files if key.encode() in path.read_bytes()]
        assert not files_with_key, f"{name} is in {files_with_key}"


@pytest.mark.parametrize("word", ["+logger.api_key=", "logger.api_key=", "+api_key=", "++logger.key="])
def test_api_keys_on_the_command_line_are_refused(word: str) -> None:
    """They would be visible in `config.yaml`, in checkpoints and in the list of processes."""
    key = secrets.token_hex(20)
    with pytest.raises(EXPLAINED) as caught:
        check_keys(composed("logger=wandb", f"{word}{key}"))
    sentence = message_for(caught.value)
    assert f"{word.strip('+=')} is not a key of the configuration" in sentence
    assert key not in sentence
