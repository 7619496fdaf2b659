"""Checkpoint files: written atomically, verified, the previous one kept, and no code executed."""

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lightning.checkpoints import run_checkpoint as files
from dino_lightning.checkpoints.run_checkpoint import (
    AsyncCheckpointIO,
    CorruptCheckpointError,
    SafeCheckpointIO,
    latest_valid,
    list_checkpoints,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from dino_lightning.errors import UserError


def content(step: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((1000,), float(step))}, "loops": {}, "global_step": step}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_can_be_read_also_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(3), path)
    assert verify(path)
    assert read_checkpoint(path)["global_step"] == 3
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain["state_dict"]["w"], content(3)["state_dict"]["w"])
    assert torch.load(path, weights_only=True, mmap=True)["global_step"] == 3
    assert names(tmp_path) == {"last.ckpt"}


@pytest.mark.parametrize("place", ["first", "middle", "tensor", "hash", "last"])
def test_a_changed_byte_is_detected(tmp_path: Path, place: str) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(3), path)
    data = bytearray(path.read_bytes())
    tensor = data.index(torch.tensor([3.0] * 4).numpy().tobytes())
    where = {"first": 0, "middle": len(data) // 2, "tensor": tensor, "hash": len(data) - 40, "last": len(data) - 100}
    data[where[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_detected(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(3), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint(path)


def test_the_previous_checkpoint_is_used_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io = SafeCheckpointIO(keep_last=2)
    for step in (1, 2, 3):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert names(tmp_path) == {"last.ckpt", "last-1.ckpt"}
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-200])
    found = latest_valid(tmp_path)
    assert found is not None
    assert found[0].name == "last-1.ckpt"
    assert found[1]["global_step"] == 2
    assert "last.ckpt is damaged" in (printed := capsys.readouterr().err)
    assert "at step 2" in printed


def test_no_valid_checkpoint_is_an_error(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "nowhere") is None
    (tmp_path / "last.ckpt").write_bytes(b"")
    (tmp_path / "best_knn.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"last.ckpt is damaged \(it is empty\).*best_knn.ckpt is damaged"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_keep_last(tmp_path: Path, keep: int) -> None:
    io = SafeCheckpointIO(keep_last=keep)
    for step in range(6):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
        steps = [torch.load(path, weights_only=True)["global_step"] for path in list_checkpoints(tmp_path)]
        assert steps == list(range(step, -1, -1))[:keep]


def test_weights_handed_over_by_a_forked_process(tmp_path: Path) -> None:
    """Lightning writes and reads them with the same plugin as checkpoints, and loads them strictly."""
    io, weights = SafeCheckpointIO(), {"w": torch.arange(4.0)}
    io.save_checkpoint(weights, tmp_path / ".temp.ckpt")
    found = io.load_checkpoint(tmp_path / ".temp.ckpt")
    assert found.keys() == weights.keys()
    assert torch.equal(found["w"], weights["w"])


def test_a_smaller_keep_last(tmp_path: Path) -> None:
    for keep in (4, 4, 4, 4, 2):
        SafeCheckpointIO(keep_last=keep).save_checkpoint(content(keep), tmp_path / "last.ckpt")
    assert names(tmp_path) == {"last.ckpt", "last-1.ckpt"}


def test_further_names_are_links_and_stay(tmp_path: Path) -> None:
    io = SafeCheckpointIO(keep_last=1)
    io.names = ["best_knn.ckpt", "epoch0000.ckpt"]
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    io.save_checkpoint(content(2), tmp_path / "last.ckpt")
    assert names(tmp_path) == {"last.ckpt", "best_knn.ckpt", "epoch0000.ckpt"}
    for name in ("best_knn.ckpt", "epoch0000.ckpt"):
        assert read_checkpoint(tmp_path / name)["global_step"] == 1


def test_a_full_disk_keeps_the_file_and_names_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process may write no file larger than 64 KiB."""
    io = SafeCheckpointIO(keep_last=2)
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    resource = pytest.importorskip("resource")
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        io.save_checkpoint({**content(2), "more": torch.zeros(1 << 20)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert io.failure is not None
    assert io.failure.errno == errno.EFBIG
    assert "could not be written (File too large)" in capsys.readouterr().err
    assert names(tmp_path) == {"last.ckpt"}
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert io.failure is None
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


class Hostile:
    """A pickle that writes a file when it is loaded without checks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("way", ["torch", "pickle", "hashed"])
def test_a_hostile_pickle_never_runs(tmp_path: Path, way: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "last.ckpt"
    hostile = {**content(1), "callbacks": Hostile(mark)}
    match way:
        case "torch":
            torch.save(hostile, path)
        case "pickle":
            path.write_bytes(pickle.dumps(hostile))
        case "hashed":
            write_checkpoint(hostile, path)
    with pytest.raises((UserError, CorruptCheckpointError)) as refused:
        read_checkpoint(path)
    assert not mark.exists()
    if way != "pickle":
        assert "loading that could run code" in str(refused.value)


def test_an_older_file_without_a_hash_loads(tmp_path: Path) -> None:
    torch.save(content(5), tmp_path / "last.ckpt")
    assert not verify(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5


def test_a_later_format_is_refused_in_one_sentence(tmp_path: Path) -> None:
    write_checkpoint({**content(5), "format": files.FORMAT + 1}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"written by a later version .*\(format 3, this version reads 2\)"):
        latest_valid(tmp_path)


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="contains only weights"):
        latest_valid(tmp_path)


def test_asynchronous_files_contain_the_state_at_the_call(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(keep_last=3)
    weights = torch.zeros(1 << 20)
    for step in range(3):
        weights.fill_(step)
        io.save_checkpoint({**content(step), "state_dict": {"w": weights}}, tmp_path / "last.ckpt")
        weights.fill_(-1)
    io.wait()
    for step, path in enumerate(reversed(list_checkpoints(tmp_path))):
        saved = read_checkpoint(path)
        assert saved["global_step"] == step
        assert torch.equal(saved["state_dict"]["w"], torch.full((1 << 20,), float(step)))


def write_repeatedly(folder: Path, steps: Any) -> None:
    torch.set_num_threads(1)
    io = SafeCheckpointIO(keep_last=2)
    for step in range(10_000):
        weights = torch.full((1 << 18,), float(step))
        io.save_checkpoint({**content(step), "state_dict": {"w": weights}}, folder / "last.ckpt")
        steps.send(step)


def test_killed_while_writing(tmp_path: Path) -> None:
    """A kill at any moment of a write leaves a valid checkpoint: the last complete one or the one after it."""
    for attempt in range(8):
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_repeatedly, args=(tmp_path, there), daemon=True)
        writer.start()
        there.close()
        finished = [here.recv() for _ in range(3)]
        time.sleep(0.0007 * attempt)  # into the next write
        writer.kill()
        writer.join()
        while here.poll():
            try:
                finished.append(here.recv())
            except EOFError:
                break
        found = latest_valid(tmp_path)
        assert found is not None
        assert found[0].name in ("last.ckpt", "last-1.ckpt")
        step = found[1]["global_step"]
        assert finished[-1] <= step <= finished[-1] + 1
        assert torch.equal(found[1]["state_dict"]["w"], torch.full((1 << 18,), float(step)))
