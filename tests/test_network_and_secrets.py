"""Nothing calls home: no import, no training, no evaluation, no logger offline. And keys of services stay unwritten."""

import os
import pkgutil
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from composing import SMALL, composed

import dino_lightning
from dino_lightning.cli import CONF, EXPLAINED
from dino_lightning.config.rules import check_keys
from dino_lightning.explain import explain

PROJECT = Path(__file__).parents[1]
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
FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK",
         "WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN", "WANDB_DISABLED")  # fmt: skip
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
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "NETWORK_LOG": str(self.log), "HOME": str(self.home),
            "OMP_NUM_THREADS": "1", "WANDB__DISABLE_STATS": "true",
        }  # fmt: skip

    def run(self, *command: str, wrapper: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*wrapper, sys.executable, *command],
            env=self.environment | variables, cwd=self.home, capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
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
        "getaddrinfo 192.0.2.1", "gethostbyname example.org", "getaddrinfo example.org",
        "connect ('192.0.2.1', 80)",
    ]  # fmt: skip


def test_imports(machine: Machine) -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(dino_lightning.__path__, "dino_lightning.")
        if not module.name.endswith(("_triton", "_kernels"))
    ]
    assert len(names) > 100
    machine.run("-c", f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert machine.attempts == ""


def test_training_and_evaluation(machine: Machine) -> None:
    run = machine.home / "run"
    machine.run(str(PROJECT / "train.py"), *SHORT, f"output_dir={run}", wrapper=without_network())
    assert (run / "teacher.safetensors").exists()
    evaluation = ["eval=knn", f"checkpoint={run}", "data.train_images=64", "data.val_images=32", "data.num_workers=0"]
    evaluation += ["eval.k=[5]"]
    evaluation += ["trainer.accelerator=cpu", f"output_dir={machine.home / 'knn'}", "cpu_threads=1"]
    machine.run("-m", "dino_lightning.evaluate", *evaluation, wrapper=without_network())
    assert (machine.home / "knn" / "results.jsonl").exists()
    assert machine.attempts == ""


def test_keys_of_services_are_written_nowhere(machine: Machine) -> None:
    keys = {"WANDB_API_KEY": secrets.token_hex(20), "HF_TOKEN": f"hf_{secrets.token_hex(17)}"}
    run = machine.home / "run"
    command = [str(PROJECT / "train.py"), *SHORT, "callbacks.knn.enabled=false", f"output_dir={run}"]
    command += ["logger=wandb", "logger.mode=offline"]
    done = machine.run(*command, wrapper=without_network(), **keys)
    assert machine.attempts == ""
    files = [path for path in machine.home.rglob("*") if path.is_file()]
    assert (run / "checkpoints" / "last.ckpt") in files
    assert any(path.suffix == ".wandb" for path in files)
    for name, key in keys.items():
        assert key not in done.stdout + done.stderr
        holders = [str(path) for path in files if key.encode() in path.read_bytes()]
        assert not holders, f"{name} stands in {holders}"


@pytest.mark.parametrize("word", ["+logger.api_key=", "logger.api_key=", "+api_key=", "++logger.key="])
def test_keys_on_the_command_line_are_refused(word: str) -> None:
    """They would stand in `config.yaml`, in checkpoints and in the list of processes."""
    key = secrets.token_hex(20)
    with pytest.raises(EXPLAINED) as caught:
        check_keys(composed("logger=wandb", f"{word}{key}"))
    sentence = explain(caught.value, conf=CONF)
    assert f"{word.strip('+=')} is not a key of the configuration" in sentence
    assert key not in sentence
