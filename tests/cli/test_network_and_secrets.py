"""Nothing calls home: no import, no training, no evaluation, no logger offline. And keys of services stay unwritten."""

import json
import os
import pkgutil
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from composing import SMALL, composed

import dino_lightning
from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.config.constraints import check_keys

PROJECT = Path(__file__).parents[2]
GUARD = '''
"""Refuses connections to other machines and names of other machines, and writes down who tried."""
import os, socket, sys, traceback

HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None, socket.gethostname())

def refuse(what, address):
    with open(os.environ["NETWORK_LOG"], "a") as file:
        places = " < ".join(f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()[-3::-1])
        file.write(f"{what} {address} by {places[:2000]}\\n")
    raise OSError(f"no network in this test: {what} {address}")

def guarded(name):
    original = getattr(socket.socket, name)
    def connect(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
            refuse(name, address)
        return original(self, address, *rest)
    setattr(socket.socket, name, connect)

for name in ("connect", "connect_ex"):
    guarded(name)
for name in ("getaddrinfo", "gethostbyname"):
    def resolve(host, *rest, original=getattr(socket, name), name=name, **options):
        host = host.decode() if isinstance(host, bytes) else host
        if host not in HERE:
            refuse(name, host)
        return original(host, *rest, **options)
    setattr(socket, name, resolve)
'''
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
"""Set on the machine of a test, they would hide what a program does on others."""


class Machine:
    """Starts programs that cannot reach other machines."""

    def __init__(self, folder: Path):
        self.log, self.home = folder / "attempts.txt", folder / "home"
        self.home.mkdir()
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD)
        paths = [str(folder / "guard"), str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = {name: value for name, value in os.environ.items() if name not in FLAGS} | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NETWORK_LOG": str(self.log),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "WANDB__DISABLE_STATS": "true",
        }

    def run(self, *command: str, wrapper: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*wrapper, sys.executable, *command],
            env=self.environment | variables,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    @property
    def attempts(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def without_network() -> tuple[str, ...]:
    """The command that takes the network away, also from programs that are not Python, where the system lets us."""
    # Its own address stays: earlier versions of W&B speak with their process by it.
    wrapper = ("unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    there = all(shutil.which(name) for name in ("unshare", "ip"))
    if not there or subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        return ()
    return wrapper


def test_the_guard_sees_attempts(machine: Machine) -> None:
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
    machine.run("-c", code)
    lines = machine.attempts.splitlines()
    assert [line.split(" by ")[0] for line in lines] == [
        "getaddrinfo 192.0.2.1",
        "gethostbyname example.org",
        "getaddrinfo example.org",
        "connect ('192.0.2.1', 80)",
    ]


PROGRAM = """
import importlib, json, os, sys
from pathlib import Path

todo = json.loads(sys.argv[1])
phases = Path(os.environ["NETWORK_LOG"])
def begin(phase, **keys):
    os.environ["NETWORK_LOG"] = str(phases.with_name(f"{phase}.txt"))
    os.environ.update(keys)
    print(f"== {phase}", flush=True)

begin("imports")
for name in todo["modules"]:
    importlib.import_module(name)
from dino_lightning.cli.main import main
begin("training")
sys.argv = ["dino", "train", *todo["training"]]
main()
begin("evaluation")
sys.argv = ["dino", "eval", *todo["evaluation"]]
main()
os.environ.pop("DINO_LIGHTNING_RUN", None)
begin("with keys", **todo["keys"])
sys.argv = ["dino", "train", *todo["with keys"]]
main()
"""
KEYS = {"WANDB_API_KEY": secrets.token_hex(20), "HF_TOKEN": f"hf_{secrets.token_hex(17)}"}


@dataclass
class Done:
    """What one process has done that imported all modules, trained, evaluated, and trained with a logger and keys."""

    home: Path
    said: str

    def attempts(self, phase: str) -> str:
        """To reach other machines; each phase has come to pass."""
        assert f"== {phase}\n" in self.said
        log = self.home.with_name(f"{phase}.txt")
        return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
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
    done = machine.run("-c", PROGRAM, json.dumps(todo), wrapper=without_network())
    return Done(machine.home, done.stdout + done.stderr)


def test_imports(done: Done) -> None:
    assert done.attempts("imports") == ""


def test_training_and_evaluation(done: Done) -> None:
    assert (done.home / "run" / "teacher.safetensors").exists()
    assert (done.home / "knn" / "results.jsonl").exists()
    assert done.attempts("training") == ""
    assert done.attempts("evaluation") == ""


def test_keys_of_services_are_written_nowhere(done: Done) -> None:
    assert done.attempts("with keys") == ""
    files = [path for path in done.home.rglob("*") if path.is_file()]
    assert (done.home / "wandb" / "checkpoints" / "last.ckpt") in files
    assert any(path.suffix == ".wandb" for path in files)
    for name, key in KEYS.items():
        assert key not in done.said
        holders = [str(path) for path in files if key.encode() in path.read_bytes()]
        assert not holders, f"{name} stands in {holders}"


@pytest.mark.parametrize("word", ["+logger.api_key=", "logger.api_key=", "+api_key=", "++logger.key="])
def test_keys_on_the_command_line_are_refused(word: str) -> None:
    """They would stand in `config.yaml`, in checkpoints and in the list of processes."""
    key = secrets.token_hex(20)
    with pytest.raises(EXPLAINED) as caught:
        check_keys(composed("logger=wandb", f"{word}{key}"))
    sentence = message_for(caught.value)
    assert f"{word.strip('+=')} is not a key of the configuration" in sentence
    assert key not in sentence
