"""Zip and tar files, written by the standard library, read in place and compared with the files that went in."""

import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import check_consistent, png

from dino_lightning.config import ArchiveData, FolderData
from dino_lightning.data.sources import archive, members, open_sources
from dino_lightning.data.sources.base import Sources
from dino_lightning.errors import UserError

LONG = f"{'a long folder name ' * 8}/{'and a long file name ' * 8}.png"
Files = dict[str, bytes]


def images(*names: str) -> Files:
    """Distinct images, padded so that lengths differ too."""
    return {name: png(number) + bytes(37 * number) for number, name in enumerate(names)}


def tar_bytes(files: Files, *, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(files: Files, *, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def zip_with_extra_fields(files: Files) -> bytes:
    """The field stands before the data only, not in the table."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.extra = b"UT\x05\x00\x01abcd"
            packed.writestr(entry, content)
        for entry in packed.infolist():
            entry.extra = b""
    return buffer.getvalue()


def zip_with_flags(files: Files, *, flip: int) -> bytes:
    """With other flags than Python writes, of the one entry, before its data and in the table."""
    whole = bytearray(zip_bytes(files))
    for magic, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        begin = whole.index(magic) + place
        flags = int.from_bytes(whole[begin : begin + 2], "little") ^ flip
        whole[begin : begin + 2] = flags.to_bytes(2, "little")
    return bytes(whole)


FORMS: dict[str, tuple[str, Callable[[Files], bytes]]] = {
    "stored": (".zip", zip_bytes),
    "deflated": (".zip", lambda files: zip_bytes(files, method=zipfile.ZIP_DEFLATED)),
    "extra": (".zip", zip_with_extra_fields),
    "prefixed": (".ZIP", lambda files: b"#!/bin/sh\n" + zip_bytes(files)),
    "pax": (".tar", tar_bytes),
    "gnu": (".tar", lambda files: tar_bytes(files, form=tarfile.GNU_FORMAT)),
}


def opened(path: Path, **options) -> Sources:
    return open_sources(ArchiveData(path=str(path), **{"holdout": 0, **options}), seed=0)


def contents(source) -> Files:
    return {source.describe(i): source.read(i) for i in range(len(source))}


def by_class(source) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for i, label in enumerate(source.labels.tolist()):
        found.setdefault(source.classes[label], []).append(os.path.basename(source.describe(i)))
    return found


@pytest.fixture
def kept(tmp_path, monkeypatch) -> dict:
    """Tables are kept whatever their size; gives the option for `opened` that says where."""
    monkeypatch.setattr(members, "KEPT_FROM", 0)
    return {"cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def scans(monkeypatch) -> list[Path]:
    """The archives that were scanned so far."""
    done: list[Path] = []
    scan = members._folders

    def counted(path, **options):
        done.append(path)
        return scan(path, **options)

    monkeypatch.setattr(members, "_folders", counted)
    return done


class TestReading:
    @pytest.mark.parametrize("form", FORMS)
    def test_bytes_names_labels_and_order_are_those_of_the_unpacked_folder(self, tmp_path, form):
        ending, pack = FORMS[form]
        files = images("b/2.png", "b/10.png", "a/x/1.png", "a/x-y/1.png", "a/z.jpg", "c d/é日本.png", "a/0.JPEG", LONG)
        path = tmp_path / f"some images{ending}"
        path.write_bytes(pack({**files, "a/readme.txt": b"no image", "a/empty.txt": b""}))
        for name, content in files.items():
            (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "unpacked" / name).write_bytes(content)
        ours = opened(path).train
        theirs = open_sources(FolderData(path=str(tmp_path / "unpacked"), holdout=0), seed=0).train
        assert ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.labels.dtype == np.int64
        assert [ours.describe(i).removeprefix(str(path)) for i in range(8)] == [
            theirs.describe(i).removeprefix(str(tmp_path / "unpacked")) for i in range(8)
        ]
        assert contents(ours) == {f"{path}/{name}": content for name, content in files.items()}
        check_consistent(ours)

    @pytest.mark.parametrize("form", ["stored", "pax"])
    def test_what_does_not_count(self, tmp_path, form):
        ending, pack = FORMS[form]
        hidden = images("./a/0.png", "./b/1.png", "a/._2.png", ".git/3.png", "__MACOSX/a/4.png", "b/.cache/5.png")
        path = tmp_path / f"x{ending}"
        path.write_bytes(pack({**hidden, "notes.txt": b"x"}))
        assert by_class(opened(path).train) == {"a": ["0.png"], "b": ["1.png"]}

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    @pytest.mark.parametrize("form", ["stored", "gnu"])
    def test_of_two_members_with_one_name_the_later_counts_as_when_unpacking(self, tmp_path, form):
        ending, pack = FORMS[form]
        path = tmp_path / f"x{ending}"
        path.write_bytes(pack(images("a.png", "b.png")))
        with zipfile.ZipFile(path, "a") if ending == ".zip" else tarfile.open(path, "a") as packed:
            (tmp_path / "new.png").write_bytes(png(9))
            (packed.write if ending == ".zip" else packed.add)(tmp_path / "new.png", "a.png")
        source = opened(path).train
        assert (len(source), source.read(0), source.read(1)) == (2, png(9), images("a.png", "b.png")["b.png"])

    def test_links_in_a_tar(self, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            (tmp_path / "a.png").write_bytes(png(1))
            os.link(tmp_path / "a.png", tmp_path / "b.png")
            os.symlink("a.png", tmp_path / "c.png")
            for name in "abc":
                tar.add(tmp_path / f"{name}.png", f"{name}.png")
        assert list(contents(opened(tmp_path / "x.tar").train).values()) == [png(1), png(1)]

    def test_backslashes_and_links_in_a_zip(self, tmp_path):
        files = {f"{name[0]}\\{name[1]}.png": png(number) for number, name in enumerate(["a0", "a1", "b2"])}
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
            link = zipfile.ZipInfo("a/3.png")
            link.external_attr = 0o120777 << 16
            packed.writestr(link, "0.png")
        assert by_class(opened(tmp_path / "x.zip").train) == {"a": ["0.png", "1.png"], "b": ["2.png"]}

    def test_a_name_in_utf8_that_is_not_marked_as_such(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(zip_with_flags(images("é日本.png"), flip=0x800))
        assert opened(tmp_path / "x.zip").train.describe(0) == f"{tmp_path}/x.zip/é日本.png"

    def test_descriptors_are_bounded_and_closed(self, tmp_path, monkeypatch):
        bounded = archive.lru_cache(maxsize=3)(archive.opened.__wrapped__)
        monkeypatch.setattr(archive, "opened", bounded)
        for number in range(12):
            (tmp_path / f"{number}.zip").write_bytes(zip_bytes({f"{number}.png": png(number)}))
        source = opened(tmp_path).train
        before = len(os.listdir("/dev/fd"))
        for i in [*range(12), *range(12)]:
            assert source.read(i) == png(int(source.classes[source.labels[i]]))
        assert len(os.listdir("/dev/fd")) - before == 3
        bounded.cache_clear()
        assert len(os.listdir("/dev/fd")) == before

    def test_threads_while_descriptors_come_and_go(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archive, "opened", archive.lru_cache(maxsize=1)(archive.opened.__wrapped__))
        for number in range(6):
            (tmp_path / f"{number}.tar").write_bytes(tar_bytes({f"{number}.png": png(number)}))
        source = opened(tmp_path).train
        wrong: list[object] = []

        def read(seed: int) -> None:
            for i in np.random.default_rng(seed).integers(6, size=300).tolist():
                try:
                    if source.read(i) != png(i):
                        wrong.append(i)
                except OSError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


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
        assert not copy.members["places"].flags.owndata
        assert [copy.describe(i) for i in range(1000)] == [large.describe(i) for i in range(1000)]


class TestLayout:
    @pytest.mark.parametrize("top", ["", "dataset/"])
    def test_splits_inside(self, tmp_path, top):
        names = [f"{top}{name}" for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")]
        (tmp_path / "x.tar").write_bytes(tar_bytes(images(*names)))
        sources = opened(tmp_path / "x.tar")
        assert by_class(sources.train) == {"cat": ["0.png"], "dog": ["1.png"]}
        assert by_class(sources.val) == {"cat": ["2.png"], "dog": ["3.png"]}
        assert sources.notice is None
        assert sources.train.fingerprint() != sources.val.fingerprint()

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["a.png", "b.png"], "no class folders"),
            (["top/a.png", "top/b.png"], "no class folders"),
            (["top/cat/a.png", "top/cat/b.png"], "one folder only"),
            (["cat/a.png", "dog/b.png", "c.png"], "images lie beside the folders"),
        ],
    )
    def test_no_labels(self, tmp_path, names, words):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images(*names)))
        sources = opened(tmp_path / "x.zip", holdout=0.1)
        assert (sources.train.labels, sources.train.classes, sources.val) == (None, None, None)
        assert words in sources.notice
        assert len(sources.train) == len(names)
        check_consistent(sources.train)

    def test_each_archive_of_a_folder_is_a_class_and_some_are_held_out(self, tmp_path):
        files = {"n02": images("n02_0.JPEG", "n02_1.JPEG"), "n01": images("n01/n01_0.JPEG", "n01/n01_1.JPEG")}
        for name, inside in files.items():
            (tmp_path / f"{name}.tar").write_bytes(tar_bytes(inside))
        (tmp_path / "words.txt").touch()
        whole = opened(tmp_path).train
        assert by_class(whole) == {"n01": ["n01_0.JPEG", "n01_1.JPEG"], "n02": ["n02_0.JPEG", "n02_1.JPEG"]}
        check_consistent(whole)
        sources = opened(tmp_path, holdout=0.5)
        assert sorted(by_class(sources.train)) == sorted(by_class(sources.val)) == ["n01", "n02"]
        assert "held out" in sources.notice

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            (["train.zip"], "val.zip"),
            (["ILSVRC2012_img_train.zip"], "ILSVRC2012_img_val.zip"),
            (["train-0.zip", "train-1.zip"], "test.zip"),
            (["train2017.zip"], "validation.zip"),
        ],
    )
    def test_archives_named_like_splits(self, tmp_path, train, val):
        for number, name in enumerate(train):
            (tmp_path / name).write_bytes(zip_bytes(images(f"cat/{number}a.png", f"dog/{number}b.png")))
        (tmp_path / val).write_bytes(zip_bytes(images("val/cat/0.png", "val/dog/1.png")))
        sources = opened(tmp_path)
        assert sources.notice is None
        count = range(len(train))
        assert by_class(sources.train) == {
            "cat": [f"{number}a.png" for number in count],
            "dog": [f"{number}b.png" for number in count],
        }
        assert by_class(sources.val) == {"cat": ["0.png"], "dog": ["1.png"]}

    def test_imagenet_as_it_is_distributed(self, tmp_path):
        classes = {f"n0{c}": {f"n0{c}_{i}.JPEG": png(3 * c + i) + bytes(700 * i) for i in range(3)} for c in range(4)}
        inside = {f"{name}.tar": tar_bytes(files) for name, files in classes.items()}
        path = tmp_path / "ILSVRC2012_img_train.tar"
        path.write_bytes(tar_bytes(inside))
        (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(images("ILSVRC2012_val_0.JPEG")))
        for where in (path, tmp_path):
            source = opened(where).train
            assert by_class(source) == {name: sorted(files) for name, files in classes.items()}
            assert contents(source) == {
                f"{path}/{name}/{file}": content for name, files in classes.items() for file, content in files.items()
            }
        sources = opened(tmp_path, holdout=0.4)
        assert "not used: val" in sources.notice
        assert len(sources.val) == 4

    def test_a_tar_in_a_tar_in_a_tar(self, tmp_path):
        files = {f"{name}.tar": images(f"{name}/0.png", f"{name}/deep/1.png") for name in ("cat", "dog")}
        inside = tar_bytes({name: tar_bytes(some) for name, some in files.items()})
        (tmp_path / "x.tar").write_bytes(tar_bytes({"notes.txt": bytes(2000), "train.tar": inside}))
        source = opened(tmp_path / "x.tar").train
        assert by_class(source) == {"cat": ["0.png", "1.png"], "dog": ["0.png", "1.png"]}
        assert [source.read(i) for i in range(4)] == [one for some in files.values() for one in some.values()]

    def test_what_is_not_used_is_named(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("train/a.png", "val/b.png", "extra/c.png")))
        assert "not used: extra, val" in opened(tmp_path / "x.zip").notice


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

    def test_a_table_that_is_being_written_is_left_alone(self, tmp_path, kept, scans):
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

    def test_a_long_listing_says_so_and_a_short_one_is_silent(self, tmp_path, monkeypatch, capfd):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("a.png")))
        opened(tmp_path / "x.zip")
        assert capfd.readouterr() == ("", "")
        clock = iter(range(0, 1000, 10))
        monkeypatch.setattr(members.time, "monotonic", lambda: next(clock))
        opened(tmp_path / "x.zip")
        monkeypatch.undo()
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("listing the images in")
        assert len(err.replace("\n", "")) < len(str(tmp_path)) + 40


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("x.tar.gz", b"\x1f\x8b\x08rest", ["x.tar.gz' is compressed", "gunzip"]),
            ("x.tgz", b"\x1f\x8b\x08rest", ["x.tgz' is compressed", "gunzip"]),
            ("x.tar.xz", b"\xfd7zXZ\0rest", ["x.tar.xz' is compressed", "unxz"]),
            ("x.tar", b"\x1f\x8b\x08rest", ["x.tar' is compressed", "gunzip"]),
            ("x.zip", zip_with_flags(images("a.png"), flip=1), ["x.zip' is encrypted", "data=folder"]),
            ("x.zip", zip_bytes(images("a.png"), method=zipfile.ZIP_LZMA), ["method 14", "zip -0"]),
            ("x.zip", zip_bytes(images("a.png"))[:-30], ["x.zip' is not a zip file that can be read"]),
            (
                "x.zip",
                zip_bytes(images("a.png")).replace(b"PK\3\4", b"PK\0\0"),
                ["'a.png' is not where its table says"],
            ),
            ("x.zip", b"", ["x.zip' is not a zip file that can be read"]),
            ("x.tar", b"", ["x.tar' is not a tar file that can be read (empty file)"]),
            ("x.tar", b"hello" * 999, ["x.tar' is not a tar file that can be read"]),
            ("x.tar", tar_bytes(images("a.png", "b.png"))[:1600], ["x.tar' is not a tar file that can be read"]),
            ("x.tar", tar_bytes({"a.txt": b"x"}), ["holds no image"]),
            ("x.rar", b"x", ["x.rar' is no .zip or .tar"]),
            ("x.zip", zip_bytes(images("val/a/1.png", "test/b/2.png")), ["has 'test' but no 'train'"]),
            (
                "x.zip",
                zip_bytes(images("train/cat/0.png", "train/dog/0.png", "val/cat/0.png")),
                ["'dog' is in 'train' but not in 'val'"],
            ),
            (
                "x.zip",
                zip_bytes(
                    images(
                        "train/a/0.png", "train/dog/0.png", "val/a/0", "val/dog/0.png", "val/dgo/0.png", "val/a/1.png"
                    )
                ),
                ["'dgo' is in 'val' but not in 'train'", "did you mean 'dog'"],
            ),
        ],
    )
    def test_one_sentence(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        for path in (tmp_path / name, tmp_path):
            if path == tmp_path and name == "x.rar":
                words = ["holds no .zip or .tar", "data=folder"]
            with pytest.raises(UserError) as caught:
                opened(path)
            message = str(caught.value)
            assert message.startswith("data.path")
            assert "\n" not in message
            for word in words:
                assert word in message

    def test_a_damaged_header_in_the_middle_of_a_tar(self, tmp_path):
        whole = bytearray(tar_bytes(images("a.png", "b.png", "c.png")))
        whole[whole.index(b"b.png") + 3] ^= 1
        (tmp_path / "x.tar").write_bytes(whole)
        with pytest.raises(UserError, match=r"x\.tar' is not a tar file that can be read \(damaged at byte \d+\)"):
            opened(tmp_path / "x.tar")

    def test_a_wrong_name(self, tmp_path):
        (tmp_path / "photos.zip").touch()
        with pytest.raises(UserError, match=r"did you mean 'photos\.zip'"):
            opened(tmp_path / "photo.zip")

    def test_an_archive_that_changes_under_a_run(self, tmp_path):
        path = tmp_path / "x.zip"
        path.write_bytes(zip_bytes(images("a.png", "b.png")))
        source = opened(path).train
        path.write_bytes(zip_bytes(images("b.png", "a.png", "c.png")))
        with pytest.raises(OSError, match="has changed since"):
            source.read(0)

    def test_damaged_packed_data_raises_when_read(self, tmp_path):
        whole = bytearray(zip_bytes({"a.png": png(0), "b.png": bytes(1000)}, method=zipfile.ZIP_DEFLATED))
        whole[40] ^= 255
        (tmp_path / "x.zip").write_bytes(whole)
        source = opened(tmp_path / "x.zip").train
        with pytest.raises(OSError, match="damaged in the archive"):
            source.read(0)
        assert source.read(1) == bytes(1000)
