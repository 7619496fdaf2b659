"""Zip and tar files, written by the standard library, read in place and compared with the files that went in."""

import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from archive_cases import FORMS, LONG_NAME, by_class, contents, images, opened, tar_bytes, zip_bytes, zip_with_flags
from source_cases import check_consistent, png

from dino_lightning.config import FolderData
from dino_lightning.data.sources import archive, open_sources
from dino_lightning.errors import UserError


class TestReading:
    @pytest.mark.parametrize("form", FORMS)
    def test_bytes_names_labels_and_order_are_those_of_the_unpacked_folder(self, tmp_path, form):
        ending, pack = FORMS[form]
        files = images(
            "b/2.png", "b/10.png", "a/x/1.png", "a/x-y/1.png", "a/z.jpg", "c d/é日本.png", "a/0.JPEG", LONG_NAME
        )
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
    def test_ignored_members(self, tmp_path, form):
        ending, pack = FORMS[form]
        hidden = images("./a/0.png", "./b/1.png", "a/._2.png", ".git/3.png", "__MACOSX/a/4.png", "b/.cache/5.png")
        path = tmp_path / f"x{ending}"
        path.write_bytes(pack({**hidden, "notes.txt": b"x"}))
        assert by_class(opened(path).train) == {"a": ["0.png"], "b": ["1.png"]}

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    @pytest.mark.parametrize("form", ["stored", "gnu"])
    def test_the_later_of_two_members_with_one_name_counts(self, tmp_path, form):
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


class TestLayout:
    @pytest.mark.parametrize("top", ["", "dataset/"])
    def test_splits_inside(self, tmp_path, top):
        names = [f"{top}{name}" for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")]
        (tmp_path / "x.tar").write_bytes(tar_bytes(images(*names)))
        sources = opened(tmp_path / "x.tar")
        assert by_class(sources.train) == {"cat": ["0.png"], "dog": ["1.png"]}
        assert by_class(sources.val) == {"cat": ["2.png"], "dog": ["3.png"]}
        assert sources.remark is None
        assert sources.train.fingerprint() != sources.val.fingerprint()

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["a.png", "b.png"], "no class folders"),
            (["top/a.png", "top/b.png"], "no class folders"),
            (["top/cat/a.png", "top/cat/b.png"], "only one class folder"),
            (["cat/a.png", "dog/b.png", "c.png"], "contains images next to its folders"),
        ],
    )
    def test_no_labels(self, tmp_path, names, words):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images(*names)))
        sources = opened(tmp_path / "x.zip", holdout=0.1)
        assert (sources.train.labels, sources.train.classes, sources.val) == (None, None, None)
        assert words in sources.remark
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
        assert "held out" in sources.remark

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
        assert sources.remark is None
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
        assert "': val" in sources.remark
        assert len(sources.val) == 4

    def test_a_tar_in_a_tar_in_a_tar(self, tmp_path):
        files = {f"{name}.tar": images(f"{name}/0.png", f"{name}/deep/1.png") for name in ("cat", "dog")}
        inside = tar_bytes({name: tar_bytes(some) for name, some in files.items()})
        (tmp_path / "x.tar").write_bytes(tar_bytes({"notes.txt": bytes(2000), "train.tar": inside}))
        source = opened(tmp_path / "x.tar").train
        assert by_class(source) == {"cat": ["0.png", "1.png"], "dog": ["0.png", "1.png"]}
        assert [source.read(i) for i in range(4)] == [one for some in files.values() for one in some.values()]

    def test_unused_members_are_named(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(zip_bytes(images("train/a.png", "val/b.png", "extra/c.png")))
        assert "': extra, val" in opened(tmp_path / "x.zip").remark


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
            ("x.zip", zip_bytes(images("a.png"))[:-30], ["x.zip' is not a readable zip file"]),
            (
                "x.zip",
                zip_bytes(images("a.png")).replace(b"PK\3\4", b"PK\0\0"),
                ["'a.png' is not at its position"],
            ),
            ("x.zip", b"", ["x.zip' is not a readable zip file"]),
            ("x.tar", b"", ["x.tar' is not a readable tar file (empty file)"]),
            ("x.tar", b"hello" * 999, ["x.tar' is not a readable tar file"]),
            ("x.tar", tar_bytes(images("a.png", "b.png"))[:1600], ["x.tar' is not a readable tar file"]),
            ("x.tar", tar_bytes({"a.txt": b"x"}), ["contains no image"]),
            ("x.rar", b"x", ["x.rar' is not a .zip or .tar"]),
            ("x.zip", zip_bytes(images("val/a/1.png", "test/b/2.png")), ["has 'test' but no 'train'"]),
            (
                "x.zip",
                zip_bytes(images("train/cat/0.png", "train/dog/0.png", "val/cat/0.png")),
                ["'dog' is in 'train' but not in 'val'"],
            ),
            (
                "x.zip",
                zip_bytes(
                    images("train/a/0.png", "train/mouse/0.png", "val/mouse/0.png", "val/muose/0.png", "val/a/1.png")
                ),
                ["'muose' is in 'val' but not in 'train'", "did you mean 'mouse'"],
            ),
        ],
    )
    def test_one_sentence(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        for path in (tmp_path / name, tmp_path):
            if path == tmp_path and name == "x.rar":
                words = ["contains no .zip or .tar", "data=folder"]
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
        with pytest.raises(UserError, match=r"x\.tar' is not a readable tar file \(damaged at byte \d+\)"):
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
