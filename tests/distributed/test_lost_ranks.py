"""A rank fails, stops or never starts: the others end soon, with a message that names the rank.

Whole runs of `train.py` on two real processes, by Lightning's launcher and by torchrun; `faulty_rank.py` breaks one.
"""

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import BUILTIN, HERE, ONE_HOST, TORCHRUN, end_all, environment, members, start, train
from PIL import Image
from programs import processes_of, start_program

TIMEOUT_S = 45
"""`collective_timeout_s`: more than two processes need to start on a busy machine."""
LAUNCHERS = {"lightning": [], "torchrun": [*TORCHRUN, *ONE_HOST]}
FOLDER = ["data=folder", "data.holdout=0.2", "data.path=${oc.env:IMAGES_OF_RANK}"]
LOST = "ends because another rank has ended or has not answered within collective_timeout_s"


@dataclass(frozen=True)
class Lost:
    """A run in which one rank was lost."""

    status: int
    said: str
    seconds: float
    """Seconds from the fault until the last process ended."""


def images(folder: Path, *, count: int = 40) -> Path:
    """Two classes."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (5 * number, 90, 140)).save(path)
    return folder


def torchrun_variables(*, ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def lose(
    folder: Path,
    fault: str,
    *words: str,
    launcher: str,
    rank: int = 1,
    data: Sequence[str] = BUILTIN,
    **variables: str,
) -> Lost:
    """Run until all processes have ended."""
    mark, log = folder / "mark", folder / "log"
    command = train(
        f"imports=[{HERE}/faulty_rank.py]",
        f"output_dir={folder}/out",
        *(words if any("timeout" in word for word in words) else [f"collective_timeout_s={TIMEOUT_S}", *words]),
        launcher=LAUNCHERS[launcher],
        data=data,
    )
    process = start(command, log=log, FAULT=fault, FAULTY=str(rank), MARK=str(mark), **variables)
    try:
        status = process.wait(timeout=240)
        while members(process.pid):
            assert time.time() < mark.stat().st_mtime + 120, "processes are left over"
            time.sleep(0.2)
        return Lost(status, log.read_text(errors="replace"), time.time() - mark.stat().st_mtime)
    finally:
        end_all(process.pid)


def test_an_error_on_the_second_rank_ends_the_first(tmp_path: Path) -> None:
    """The processes are forked with loaded libraries and have torchrun's variables; the tests below use launchers."""
    mark, log = tmp_path / "mark", tmp_path / "log"
    words = train(f"imports=[{HERE}/faulty_rank.py]", f"output_dir={tmp_path}/out", f"collective_timeout_s={TIMEOUT_S}")
    fault = {"FAULT": "error", "FAULTY": "1", "MARK": str(mark)}
    processes = [
        start_program(*words[1:], cwd=tmp_path, stdout=log, stderr=log, variables=environment(fault | variables))
        for variables in torchrun_variables(ranks=2)
    ]
    try:
        for process in processes:
            process.join(timeout=240)
            assert process.exitcode == 1
        seconds = time.time() - mark.stat().st_mtime
        assert not any(processes_of(process.pid or 0) for process in processes)
    finally:
        for number in [number for process in processes for number in processes_of(process.pid or 0)]:
            os.kill(number, signal.SIGKILL)
    said = log.read_text()
    assert "[rank1]: MemoryError: no memory left for a batch" in said
    assert f"rank 0 {LOST}" in said
    assert seconds < TIMEOUT_S


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_the_other(rank: int, launcher: str, tmp_path: Path) -> None:
    lost = lose(tmp_path, "error", launcher=launcher, rank=rank)
    assert lost.status == 1
    assert f"[rank{rank}]: MemoryError: no memory left for a batch" in lost.said
    assert f"rank {1 - rank} {LOST}" in lost.said
    assert lost.seconds < TIMEOUT_S + 15


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(rank: int, launcher: str, tmp_path: Path) -> None:
    lost = lose(tmp_path, "killed", launcher=launcher, rank=rank)
    assert lost.status not in (0, 2)
    assert f"rank {1 - rank} {LOST}" in lost.said
    assert lost.seconds < TIMEOUT_S + 15


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_starts_ends_the_other(rank: int, launcher: str, tmp_path: Path) -> None:
    """The rank is killed right after Python starts, while the other one joins the process group."""
    lost = lose(tmp_path, "killed at the start", launcher=launcher, rank=rank)
    assert lost.status not in (0, 2)
    assert lost.seconds < 60


@pytest.mark.slow
def test_the_first_process_is_killed_while_the_second_starts(tmp_path: Path) -> None:
    """Nothing watches the second process any more, and it would wait for the first one for the complete timeout."""
    lost = lose(tmp_path, "kills the first", "collective_timeout_s=600", launcher="lightning")
    assert lost.status == -9
    assert "the first process of this machine has ended" in lost.said
    assert lost.seconds < 90


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_stops_ends_the_other_within_the_timeout(launcher: str, tmp_path: Path) -> None:
    """A stopped process does not handle SIGTERM: torchrun kills it after 30 seconds, our watchdog after 10."""
    lost = lose(tmp_path, "stopped", launcher=launcher)
    assert lost.status == 1
    assert f"rank 0 {LOST}" in lost.said
    assert TIMEOUT_S - 1 < lost.seconds < TIMEOUT_S + 60


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_images_that_are_missing_on_one_host(launcher: str, tmp_path: Path) -> None:
    """That rank reports it, and the other one does not wait for it."""
    folders = {"IMAGES_OF_RANK": str(images(tmp_path / "images")), "OTHER_IMAGES": str(tmp_path / "nowhere")}
    lost = lose(tmp_path, "images", "collective_timeout_s=600", data=FOLDER, launcher=launcher, **folders)
    assert lost.status == (2 if launcher == "lightning" else 1)
    assert f"on rank 1: data.path={tmp_path}/nowhere" in lost.said
    assert lost.seconds < 60


@pytest.mark.slow
def test_fewer_images_on_one_host(tmp_path: Path) -> None:
    fewer = images(tmp_path / "fewer", count=20)
    lost = lose(
        tmp_path,
        "images",
        data=FOLDER,
        launcher="torchrun",
        IMAGES_OF_RANK=str(images(tmp_path / "images")),
        OTHER_IMAGES=str(fewer),
    )
    assert "rank 1 has number of training images=16, but rank 0 has number of training images=32: " in lost.said
    assert lost.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_bad_file_on_one_host(on_error: str, tmp_path: Path) -> None:
    """If it is skipped, only that rank is affected; otherwise that rank names the file, and both end."""
    other = images(tmp_path / "other")
    for path in sorted(other.rglob("*.png"))[4:6]:
        path.write_bytes(path.read_bytes()[:60])
    words = [f"data.on_error={on_error}", "data.max_bad_share=0.5"]
    lost = lose(
        tmp_path,
        "images",
        *words,
        launcher="lightning",
        data=FOLDER,
        IMAGES_OF_RANK=str(images(tmp_path / "images")),
        OTHER_IMAGES=str(other),
    )
    if on_error == "skip":
        assert lost.status == 0
        assert "bad_images" in lost.said
    else:
        assert lost.status in (1, 2)
        assert ".png" in lost.said
        assert f"rank 0 {LOST}" in lost.said
