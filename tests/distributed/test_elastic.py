"""torchrun restarts a run after a process was killed or a host was too slow, and its result does not change.

On two hosts, in network namespaces, as root.
"""

import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from launches import HERE, ONE_HOST, TORCHRUN, end_all, members, run, start, train
from safetensors.torch import load_file
from two_hosts import Host, two_hosts, why_not

TIMEOUT_S = 20
LONG = ["trainer.max_epochs=3"]
"""Twelve steps."""
MEASURED = ("speed/", "images_per_second", "time")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(train(f"output_dir={folder}/out", *LONG), log=folder / "log", timeout=240)
    assert ended.status == 0, ended.said
    return folder / "out"


def rows(folder: Path) -> list[dict[str, str]]:
    """`metrics.csv` without the measured speed."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if value and not key.startswith(MEASURED)}
            for row in csv.DictReader(file)
        ]


def assert_same(folder: Path, undisturbed: Path, *, steps: int = 12) -> None:
    """Bit-identical weights, and every row of metrics exactly once."""
    weights, expected = load_file(folder / "teacher.safetensors"), load_file(undisturbed / "teacher.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [row for row in rows(folder) if row] == [row for row in rows(undisturbed) if row]
    losses = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert losses == [str(step) for step in range(steps)]


@pytest.mark.slow
def test_a_killed_process_of_one_host(undisturbed: Path, tmp_path: Path) -> None:
    """Killed in the second epoch: both processes restart from the end of the first one."""
    command = train(
        f"imports=[{HERE}/faulty_rank.py]",
        f"output_dir={tmp_path}/out",
        *LONG,
        launcher=[*TORCHRUN, *ONE_HOST, "--max-restarts=2"],
    )
    faults = {"FAULT": "killed", "FAULTY": "1", "FAULT_STEP": "6", "MARK": str(tmp_path / "mark")}
    ended = run(command, log=tmp_path / "log", timeout=240, **faults)
    assert ended.status == 0, ended.said
    assert (tmp_path / "mark").exists()
    assert "(SIGKILL)" in ended.said or "exitcode: -9" in ended.said or "-9" in ended.said
    assert_same(tmp_path / "out", undisturbed)


# ------------------------------------------------------------------------------------------------------- two hosts


@dataclass
class Cluster:
    """Two hosts with a torchrun on each."""

    hosts: tuple[Host, Host]
    folder: Path
    runs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *words: str, restarts: int = 3, **variables: str) -> list[subprocess.Popen[bytes]]:
        """Start torchrun on both hosts; the first hosts the rendezvous."""
        for number, host in enumerate(self.hosts):
            launcher = [
                *TORCHRUN,
                "--nnodes=2",
                "--nproc-per-node=1",
                f"--max-restarts={restarts}",
                "--rdzv-id=two",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={self.hosts[0].address}:29400",
                f"--rdzv-conf=is_host={1 - number},join_timeout=90,last_call_timeout=2",
                f"--local-addr={host.address}",
            ]
            command = train(
                f"imports=[{HERE}/faulty_rank.py]",
                f"output_dir={self.folder}/out",
                "trainer.devices=1",
                "trainer.num_nodes=2",
                "trainer.strategy=ddp",
                f"collective_timeout_s={TIMEOUT_S}",
                *LONG,
                *words,
                launcher=launcher,
            )
            own = {"GLOO_SOCKET_IFNAME": host.device, "MARK": str(self.folder / "mark"), **variables}
            self.runs.append(start(host.command(*command), log=self.folder / f"log{number}", **own))
        return self.runs

    def wait(self, seconds: float) -> tuple[list[int], float]:
        """Exit statuses, and the seconds from the fault until the last process ended."""
        until = time.monotonic() + seconds
        statuses = [process.wait(timeout=max(1, until - time.monotonic())) for process in self.runs]
        while any(members(process.pid) for process in self.runs):
            assert time.monotonic() < until, "processes are left over"
            time.sleep(0.2)
        return statuses, time.time() - (self.folder / "mark").stat().st_mtime

    def said(self) -> str:
        """Both logs."""
        return "".join((self.folder / f"log{number}").read_text(errors="replace") for number in (0, 1))

    def wait_for(self, happened: Callable[[], bool], seconds: float = 180) -> None:
        """Wait until something is there."""
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, self.said()
            assert None in [process.poll() for process in self.runs], self.said()
            time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as hosts:
        made = Cluster(hosts, tmp_path)
        yield made
        for process in made.runs:
            end_all(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_of_two_hosts(rank: str, undisturbed: Path, cluster: Cluster) -> None:
    """The host of the other process has not failed, so its torchrun counts no restart."""
    cluster.start(FAULT="killed", FAULTY=rank, FAULT_STEP="6")
    statuses, _ = cluster.wait(300)
    assert statuses == [0, 0], cluster.said()
    assert_same(cluster.folder / "out", undisturbed)


@pytest.mark.slow
def test_a_host_that_is_slow_for_some_seconds(undisturbed: Path, cluster: Cluster) -> None:
    """Stopped for a third of the timeout: the other host waits."""
    cluster.start(FAULT="stopped", FAULTY="1", FAULT_STEP="6", restarts=0)
    resume_after(cluster, TIMEOUT_S / 3)
    statuses, _ = cluster.wait(300)
    assert statuses == [0, 0], cluster.said()
    assert_same(cluster.folder / "out", undisturbed)


@pytest.mark.slow
def test_a_host_that_is_slow_for_too_long(undisturbed: Path, cluster: Cluster) -> None:
    """Stopped for twice the timeout: the other host ends, both restart and finish."""
    cluster.start(FAULT="stopped", FAULTY="1", FAULT_STEP="6")
    resume_after(cluster, 2 * TIMEOUT_S)
    statuses, _ = cluster.wait(300)
    assert statuses == [0, 0], cluster.said()
    assert "another rank has ended or has not answered" in cluster.said()
    assert_same(cluster.folder / "out", undisturbed)


@pytest.mark.slow
def test_a_pulled_cable_that_is_plugged_in_again(undisturbed: Path, cluster: Cluster) -> None:
    """TCP retransmits what was lost, and the run continues."""
    cluster.start(FAULT="noted", FAULT_STEP="6", FAULTY="1")
    cluster.wait_for((cluster.folder / "mark").exists)
    cluster.hosts[1].pull_cable()
    time.sleep(TIMEOUT_S / 4)
    cluster.hosts[1].plug_cable()
    statuses, _ = cluster.wait(300)
    assert statuses == [0, 0], cluster.said()
    assert_same(cluster.folder / "out", undisturbed)


@pytest.mark.slow
def test_a_pulled_cable(cluster: Cluster) -> None:
    """Neither host can restart without the other: both end with a message, and no process remains."""
    cluster.start(FAULT="noted", FAULT_STEP="6", FAULTY="1")
    cluster.wait_for((cluster.folder / "mark").exists)
    cluster.hosts[1].pull_cable()
    statuses, seconds = cluster.wait(500)
    assert 0 not in statuses
    assert seconds < 400
    for number in (0, 1):
        log = (cluster.folder / f"log{number}").read_text(errors="replace")
        assert "another rank has ended or has not answered" in log
    assert (cluster.folder / "out" / "checkpoints" / "last.ckpt").exists()


def resume_after(cluster: Cluster, seconds: float) -> None:
    """Send SIGCONT to the process that has stopped itself."""
    cluster.wait_for((cluster.folder / "mark").exists)
    time.sleep(seconds)
    for number in (number for process in cluster.runs for number in members(process.pid)):
        os.kill(number, signal.SIGCONT)
