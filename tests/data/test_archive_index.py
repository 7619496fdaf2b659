"""Archives and several processes; the stored indices of their images."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from archive_cases import contents, images, opened, tar_bytes, zip_bytes
from source_cases import check_consistent

from dino_lightning.data.sources import archive
from dino_lightning.data.sources import archive_index as index


@pytest.fixture
def kept(tmp_path, monkeypatch) -> dict:
    """Tables are kept whatever their size; gives the option for `opened` that says where."""
    monkeypatch.setattr(index, "STORED_FROM_BYTES", 0)
    return {"cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def scans(monkeypatch) -> list[Path]:
    """The archives that were scanned so far."""
    done: list[Path] = []
    scan = index._folders

    def counted(path, **options):
        done.append(path)
        return scan(path, **options)

    monkeypatch.setattr(index, "_folders", counted)
    return done


def read_all(source, queue) -> None:
    wanted = [source.read(i) for i in range(len(source))]
    for _ in range(50):
        assert [source.read(i) for i in range(len(source))] == wanted
    queue.put(wanted)


class TestProcesses:
    def test_two_processes_read_what_the_parent_reads(self, tmp_path, kept):
        (tmp_path / "x.tar").write_bytes(tar_bytes(images("a/0.png", "a/1.png", "b/2.png", "b/3.png")))
        source = opened(tmp_path / "x.tar", **kept).train
        wanted = [source.read(i) for i in range(4)]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=read_all, args=(source, queue)) for _ in range(2)]
        for child in children:
            child.start()
        for _ in range(50):
            assert [source.read(i) for i in range(4)] == wanted
        assert [queue.get(timeout=60) for _ in children] == [wanted, wanted]
        for child in children:
            child.join()
            assert child.exitcode == 0

    def test_a_forked_process_opens_the_archive_itself(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        source = opened(tmp_path / "x.zip").train
        source.read(0)
        there, here = os.pipe()
        child = os.fork()
        if child == 0:
            misses = archive.opened.cache_info().misses
            source.read(0)
            os.write(here, bytes([archive.opened.cache_info().misses - misses]))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(there, 1) == bytes([1])
        os.close(there)
        os.close(here)

    def test_a_pickle_does_not_grow_with_the_images(self, tmp_path, kept):
        for count in (10, 1000):
            (tmp_path / f"{count}.zip").write_bytes(zip_bytes({f"{i:04}.png": b"x" for i in range(count)}))
        small, large = (opened(tmp_path / f"{count}.zip", **kept).train for count in (10, 1000))
        assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 10
        copy = pickle.loads(pickle.dumps(large))
        assert not copy.index["ranges"].flags.owndata
        assert [copy.describe(i) for i in range(1000)] == [large.describe(i) for i in range(1000)]


class TestKept:
    def test_the_table_is_read_once(self, tmp_path, kept, scans):
        for name in ("a", "b"):
            (tmp_path / f"{name}.tar").write_bytes(tar_bytes(images(f"{name}0.png", f"{name}1.png")))
        first = opened(tmp_path, **kept).train
        assert len(scans) == 2
        second = opened(tmp_path, **kept).train
        assert len(scans) == 2
        assert contents(second) == contents(first)
        assert first.fingerprint() == second.fingerprint()
        check_consistent(second)

    @pytest.mark.parametrize("change", ["size", "time", "added", "removed"])
    def test_a_changed_archive_is_read_again(self, tmp_path, kept, scans, change):
        for name in ("a", "b"):
            (tmp_path / f"{name}.zip").write_bytes(zip_bytes(images(f"{name}0.png")))
        first = opened(tmp_path, **kept).train
        times = os.stat(tmp_path / "a.zip").st_mtime_ns
        if change == "size":
            (tmp_path / "a.zip").write_bytes(zip_bytes(images("new.png", "new2.png")))
            os.utime(tmp_path / "a.zip", ns=(times, times))
        elif change == "time":
            os.utime(tmp_path / "a.zip", ns=(times, times + 1))
        elif change == "added":
            (tmp_path / "c.zip").write_bytes(zip_bytes(images("c.png")))
        else:
            (tmp_path / "b.zip").unlink()
        scans.clear()
        second = opened(tmp_path, **kept).train
        assert {path.name for path in scans} == {path.name for path in tmp_path.glob("*.zip")}
        assert len(second) == {"size": 3, "time": 2, "added": 3, "removed": 1}[change]
        assert second.fingerprint() != first.fingerprint()

    @pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "gone"])
    def test_a_damaged_table_is_read_again(self, tmp_path, kept, scans, damage):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png", "b.png")))
        wanted = contents(opened(tmp_path / "x.zip", **kept).train)
        for file in (tmp_path / "cache").rglob("*.npy"):
            whole = file.read_bytes()
            if damage == "gone":
                file.unlink()
            else:
                file.unlink()  # not in place: it may be mapped
                file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "foreign": b"hello" * 99}[damage])
        scans.clear()
        for _ in range(2):
            assert contents(opened(tmp_path / "x.zip", **kept).train) == wanted
        assert len(scans) == 1

    def test_an_unfinished_table_is_not_removed(self, tmp_path, kept, scans):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        opened(tmp_path / "x.zip", **kept)
        (place,) = (tmp_path / "cache" / "archives").iterdir()
        (place / ".new").mkdir()
        (place / ".new" / "blob.npy").write_bytes(b"half")
        opened(tmp_path / "x.zip", **kept)
        assert (place / ".new" / "blob.npy").read_bytes() == b"half"
        assert len(scans) == 1

    def test_a_cache_that_cannot_be_written(self, tmp_path, kept):
        (tmp_path / "cache").write_text("a file")
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        assert len(opened(tmp_path / "x.zip", **kept).train) == 1

    def test_small_archives_leave_nothing_behind(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        opened(tmp_path / "x.zip", cache_dir=str(tmp_path / "cache"))
        assert not (tmp_path / "cache").exists()

    def test_only_a_long_listing_is_announced(self, tmp_path, monkeypatch, capfd):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        opened(tmp_path / "x.zip")
        assert capfd.readouterr() == ("", "")
        clock = iter(range(0, 1000, 10))
        monkeypatch.setattr(index.time, "monotonic", lambda: next(clock))
        opened(tmp_path / "x.zip")
        monkeypatch.undo()
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("listing the images in")
        assert len(err.replace("\n", "")) < len(str(tmp_path)) + 40
