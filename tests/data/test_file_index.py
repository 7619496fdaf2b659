"""The kept lists of large folders: `LARGE` is small here, and folders are trusted at once where a test says so."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dino_lightning.config import FolderData
from dino_lightning.data.sources import file_index as index
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.file_index import folder_contents, index_files
from dino_lightning.data.sources.mapped_arrays import UNUSED_DAYS, MappedArrays, Paths, pack_paths, store

FILES = [f"{name}/{number}.png" for name in ("a", "a/deep", "b") for number in range(4)]


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(index, "LARGE", 6)
    monkeypatch.setattr(index, "MIN_AGE_NS", 0)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the folders of images whose entries are read; clear it between two starts."""
    names, scandir = [], os.scandir

    def noted(path="."):
        if "/images" in str(path):
            names.append(os.path.basename(str(path).rstrip("/")))
        return scandir(path)

    monkeypatch.setattr(index.os, "scandir", noted)
    return names


@pytest.fixture
def root(tmp_path) -> Path:
    return fill(tmp_path / "images", FILES)


def fill(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path, *, below: tuple[str, ...] = ("a", "b")) -> list[tuple[str, int]]:
    """Path and group of each file, through the cache."""
    found = index_files(root, below=list(below), cache_dir=str(root.parent / "cache"))
    paths, groups = Paths(found.arrays), found.arrays["groups"].tolist()
    return [(paths[i], groups[i]) for i in range(len(paths))]


def walked(root: Path, *, below: tuple[str, ...] = ("a", "b")) -> list[tuple[str, int]]:
    """What `listed` must give, from a sorted `os.walk`."""
    return [
        (os.path.relpath(os.path.join(folder, name), root), group)
        for group, top in enumerate(below)
        for folder, _, names in sorted(os.walk(root / top, followlinks=True))
        for name in sorted(names)
    ]


def versions(root: Path) -> list[Path]:
    return sorted(path for path in (root.parent / "cache" / "indices").glob("*/*") if path.is_dir())


class TestKeptList:
    def test_a_second_start_reads_no_folder(self, root, read):
        first = listed(root)
        assert first == walked(root)
        assert [name for name, _ in first[:5]] == ["a/0.png", "a/1.png", "a/2.png", "a/3.png", "a/deep/0.png"]
        read.clear()
        assert listed(root) == first
        assert read == []
        assert len(versions(root)) == 1

    def test_a_second_start_reads_no_flat_folder(self, root, read):
        (root / "beside.png").touch()
        config = FolderData(path=str(root), cache_dir=str(root.parent / "cache"))
        first = open_sources(config, seed=0)
        assert set(read) == {"images", "a", "deep", "b"}
        read.clear()
        again = open_sources(config, seed=0)
        assert read == []
        assert again.remark == first.remark
        assert [again.train.describe(i) for i in range(13)] == [first.train.describe(i) for i in range(13)]

    @pytest.mark.parametrize(
        ("change", "again"),
        [
            (lambda root: (root / "b" / "00.png").touch(), ["b"]),
            (lambda root: (root / "b" / "2.png").unlink(), ["b"]),
            (lambda root: (root / "b" / "2.png").rename(root / "b" / "9.png"), ["b"]),
            (lambda root: (root / "b" / "2.png").rename(root / "a" / "deep" / "9.png"), ["deep", "b"]),
            (lambda root: fill(root / "a" / "deep" / "est", ["x.png", "y.png"]), ["deep", "est"]),
            (lambda root: fill(root / "b" / "new", ["x.png"]), ["b", "new"]),
            (lambda root: shutil.rmtree(root / "a" / "deep"), ["a"]),
            (lambda root: (root / "a" / "deep").rename(root / "a" / "depth"), ["a", "depth"]),
        ],
    )
    def test_only_changed_folders_are_read_again(self, root, read, change, again):
        listed(root)
        change(root)
        read.clear()
        found = listed(root)
        assert sorted(set(read)) == sorted(again)
        assert found == walked(root)
        read.clear()
        assert listed(root) == found
        assert read == []

    def test_a_new_class_and_a_removed_one(self, root, read):
        listed(root)
        fill(root / "c", ["0.png"])
        read.clear()
        found = listed(root, below=("a", "b", "c"))
        assert set(read) == {"c"}
        assert found == walked(root, below=("a", "b", "c"))
        assert listed(root, below=("b", "c")) == walked(root, below=("b", "c"))

    def test_a_file_added_under_an_old_time_is_seen(self, root):
        before = os.stat(root / "b")
        listed(root)
        (root / "b" / "late.png").touch()
        os.utime(root / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert ("b/late.png", 1) in listed(root)

    def test_a_folder_that_has_just_changed_is_read_again(self, root, read, monkeypatch):
        monkeypatch.setattr(index, "MIN_AGE_NS", 3600 * 10**9)
        first = listed(root)
        read.clear()
        assert listed(root) == first
        assert set(read) == {"a", "deep", "b"}
        assert len(versions(root)) == 1  # the same contents are in the same files

    def test_small_folders_leave_nothing_behind(self, tmp_path):
        root = fill(tmp_path / "images", FILES[:5])
        assert len(listed(root)) == 5
        assert not (tmp_path / "cache").exists()

    def test_links_are_followed_and_loops_are_reported(self, root):
        fill(root.parent / "elsewhere", ["0.png", "1.png"])
        (root / "a" / "link").symlink_to(root.parent / "elsewhere")
        (root / "b" / "loop").symlink_to(root / "b")
        (root / "b" / "up").symlink_to(root)
        for _ in range(2):  # walked, then from the cache
            opened = open_sources(FolderData(path=str(root), cache_dir=str(root.parent / "cache")), seed=0)
            assert len(opened.train) + len(opened.val) == len(FILES) + 2
            assert "left out, a link to a folder above it: 'b/loop' and 1 more" in opened.remark

    def test_unreadable_folders_are_reported(self, root, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if os.path.basename(path) == "deep":
                raise PermissionError(path)
            return scandir(path)

        monkeypatch.setattr(index.os, "scandir", refuse)
        for _ in range(2):
            found = index_files(root, below=["a", "b"], cache_dir=str(root.parent / "cache"))
            assert len(Paths(found.arrays)) == 8
            assert found.remark() == "left out, cannot be opened: 'a/deep'"

    def test_progress_is_shown_on_the_terminal(self, root, monkeypatch, capsys):
        monkeypatch.setattr(index, "PROGRESS_DELAY_S", -1.0)
        monkeypatch.setenv("FORCE_COLOR", "1")
        listed(root)
        shown = capsys.readouterr()
        assert "images found in" in shown.err
        assert not shown.out


class TestBadCache:
    @pytest.mark.parametrize("name", ["blob.npy", "offsets.npy", "groups.npy", "folders.npz"])
    @pytest.mark.parametrize("harm", ["cut", "foreign", "gone", "objects"])
    def test_damaged_lists_are_written_again(self, root, read, name, harm):
        first = listed(root)
        file = versions(root)[0] / name
        match harm:
            case "cut":
                os.truncate(file, file.stat().st_size - 5)
            case "foreign":
                file.write_bytes(b"something else")
            case "gone":
                file.unlink()
            case "objects":
                np.save(file.with_suffix(".npy"), np.array([{}]), allow_pickle=True)
                if name == "folders.npz":
                    os.replace(file.with_suffix(".npy"), file)
        assert listed(root) == first
        read.clear()
        assert listed(root) == first
        assert read == []

    def test_a_cache_that_cannot_be_written_does_not_matter(self, root):
        (root.parent / "cache").write_text("a file")
        assert listed(root) == walked(root)

    def test_lists_that_nobody_used_for_long_are_removed(self, root):
        listed(root)
        old = versions(root)[0]
        os.utime(old, (0, 0))
        (root / "b" / "new.png").touch()
        listed(root)
        assert UNUSED_DAYS > 1
        assert old not in versions(root)
        assert len(versions(root)) == 1


class TestSharing:
    def test_a_list_pickles_by_name_and_survives_a_change(self, tmp_path):
        root = fill(tmp_path / "images", [f"{name}/{number:04d}.png" for name in "ab" for number in range(400)])
        config = FolderData(path=str(root), cache_dir=str(tmp_path / "cache"), holdout=0)
        source = open_sources(config, seed=0).train
        state = pickle.dumps(source)
        assert len(state) < 2000
        (root / "a" / "new.png").touch()
        assert len(open_sources(config, seed=0).train) == 801
        copy = pickle.loads(state)
        assert [copy.describe(i) for i in range(800)] == [source.describe(i) for i in range(800)]
        assert copy.labels.tolist() == source.labels.tolist() == [0] * 400 + [1] * 400

    def test_processes_that_start_together_write_one_list(self, root):
        context = multiprocessing.get_context("fork")
        gate, answers = context.Barrier(4), context.Queue()

        def start():
            gate.wait()
            answers.put(listed(root))

        processes = [context.Process(target=start) for _ in range(4)]
        for process in processes:
            process.start()
        seen = [answers.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        assert seen == [walked(root)] * 4
        assert len(versions(root)) == 1
        assert not list(root.parent.glob("cache/indices/*/.*"))

    def test_arrays_without_a_file_pickle_whole(self, tmp_path):
        arrays = MappedArrays(pack_paths([b"a", b"", "é".encode()]))
        copy = Paths(pickle.loads(pickle.dumps(arrays)))
        assert [copy[i] for i in range(len(copy))] == ["a", "", "é"]
        with pytest.raises(IndexError):
            copy[3]

    def test_cached_arrays_are_read_only(self, tmp_path):
        kept = store({"x": np.arange(4)}, under=tmp_path / "arrays")
        assert kept.folder is not None
        with pytest.raises(ValueError, match="read-only"):
            kept["x"][0] = 1


def test_contents_of_a_folder(tmp_path):
    fill(tmp_path / "data", ["b/x.txt", "a/x.txt", ".hidden/x.png", "readme.txt", ".png"])
    assert folder_contents(tmp_path / "data", cache_dir=str(tmp_path / "cache")) == (["a", "b"], False)
    (tmp_path / "data" / "x.PNG").touch()
    assert folder_contents(tmp_path / "data", cache_dir=str(tmp_path / "cache")) == (["a", "b"], True)
