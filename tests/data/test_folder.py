"""Image folders: files written with PIL, read as torchvision reads them."""

import os

import pytest
from source_cases import check_consistent, decoded, numbers, png, write
from torchvision.datasets import ImageFolder

from dino_lightning.config import FolderData
from dino_lightning.data.sources import open_sources
from dino_lightning.errors import UserError


class TestFolder:
    def test_class_folders_are_read_as_torchvision_reads_them(self, tmp_path):
        for number, name in enumerate(
            ["b/2.png", "b/10.png", "a/x/1.png", "a/x-y/1.png", "a/z.jpg", "c d/é.png", "a/0.JPEG"]
        ):
            write(tmp_path / "images" / name, number)
        theirs = ImageFolder(str(tmp_path / "images"))
        ours = open_sources(FolderData(path=str(tmp_path / "images"), holdout=0), seed=0)
        assert ours.val is None
        assert ours.train.classes == theirs.classes
        assert [(ours.train.describe(i), ours.train.labels[i]) for i in range(len(ours.train))] == theirs.samples
        assert [decoded(ours.train, i).tobytes() for i in range(7)] == [theirs[i][0].tobytes() for i in range(7)]
        check_consistent(ours.train)

    @pytest.mark.parametrize("val_name", ["val", "validation", "test"])
    def test_splits(self, tmp_path, val_name):
        for number, name in enumerate(
            ["train/cat/0.png", "train/dog/1.png", f"{val_name}/cat/2.png", f"{val_name}/dog/3.png"]
        ):
            write(tmp_path / name, number)
        sources = open_sources(FolderData(path=str(tmp_path)), seed=0)
        assert (numbers(sources.train), numbers(sources.val)) == ([0, 1], [2, 3])
        assert sources.train.classes == sources.val.classes == ["cat", "dog"]
        assert sources.val.labels.tolist() == [0, 1]
        assert sources.remark is None

    @pytest.mark.parametrize("top", ["", "train/"])
    def test_flat_folder_has_no_labels_and_no_holdout(self, tmp_path, top):
        for number, name in enumerate(["a.png", "b.png", "deep/er/c.png"]):
            write(tmp_path / "images" / f"{top}{name}", number)
        sources = open_sources(FolderData(path=str(tmp_path / "images")), seed=0)
        assert sources.train.labels is None
        assert sources.train.classes is None
        assert sources.val is None
        assert "no labels" in sources.remark
        assert numbers(sources.train) == [0, 1, 2]
        check_consistent(sources.train)

    def test_one_folder_is_no_class(self, tmp_path):
        write(tmp_path / "data" / "images" / "a.png")
        sources = open_sources(FolderData(path=str(tmp_path / "data")), seed=0)
        assert sources.train.labels is None
        assert "only one class folder" in sources.remark

    def test_unused_files_are_named(self, tmp_path):
        for name in ("train/a.png", "val/b.png", "extra/c.png"):
            write(tmp_path / "data" / name)
        sources = open_sources(FolderData(path=str(tmp_path / "data")), seed=0)
        assert sources.val is None
        assert "': extra, val" in sources.remark

    def test_hidden_files_and_other_endings_do_not_count(self, tmp_path):
        for number, name in enumerate(["a/0.png", "b/1.png", "a/._2.png", ".git/3.png", "b/.cache/4.png"]):
            write(tmp_path / "data" / name, number)
        (tmp_path / "data" / "a" / "notes.txt").write_text("no image")
        sources = open_sources(FolderData(path=str(tmp_path / "data"), holdout=0), seed=0)
        assert sources.train.classes == ["a", "b"]
        assert numbers(sources.train) == [0, 1]

    @pytest.mark.parametrize(
        ("files", "order"),
        [
            (["b.png", "z/a.png", "-x/c.png", "a.png"], ["a.png", "b.png", "-x/c.png", "z/a.png"]),
            (["d/x/1.png", "d/x-y/1.png", "d/z.png"], ["d/z.png", "d/x/1.png", "d/x-y/1.png"]),
        ],
    )
    def test_flat_folders_have_the_order_of_a_sorted_walk(self, tmp_path, files, order):
        for name in files:
            write(tmp_path / "data" / name)
        source = open_sources(FolderData(path=str(tmp_path / "data")), seed=0).train
        assert [os.path.relpath(source.describe(i), tmp_path / "data") for i in range(len(source))] == order

    def test_names_that_are_not_utf8_are_read(self, tmp_path):
        (tmp_path / "data").mkdir()
        name = os.path.join(os.fsencode(tmp_path / "data"), b"\xff\n.png")
        with open(name, "wb") as file:
            file.write(png(3))
        source = open_sources(FolderData(path=str(tmp_path / "data")), seed=0).train
        assert numbers(source) == [3]
        assert os.fsencode(source.describe(0)) == name

    def test_the_fingerprint_depends_on_the_files(self, tmp_path):
        def fingerprint():
            return open_sources(FolderData(path=str(tmp_path / "data")), seed=0).train.fingerprint()

        first = write(tmp_path / "data" / "a.png", 1)
        write(tmp_path / "data" / "b.png", 2)
        seen = [fingerprint(), fingerprint()]
        assert seen[0] == seen[1]
        os.utime(first, ns=(0, 0))
        seen.append(fingerprint())
        first.rename(tmp_path / "data" / "c.png")
        seen.append(fingerprint())
        (tmp_path / "data" / "c.png").write_bytes(b"other")
        os.utime(tmp_path / "data" / "c.png", ns=(0, 0))
        seen.append(fingerprint())
        assert len(set(seen)) == 4

    def test_home_folder_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "pictures" / "a.png")
        assert len(open_sources(FolderData(path="~/pictures"), seed=0).train) == 1

    def test_a_removed_file_is_named_when_it_is_read(self, tmp_path):
        path = write(tmp_path / "data" / "a.png")
        source = open_sources(FolderData(path=str(tmp_path / "data")), seed=0).train
        path.unlink()
        assert source.describe(0) == str(path)
        with pytest.raises(FileNotFoundError):
            source.read(0)

    @pytest.mark.parametrize(
        ("files", "path", "words"),
        [
            (["imagenet/a/0.png"], "imagnet/train", ["data.path=", "no 'imagnet'", "did you mean 'imagenet'"]),
            (["imagenet/a/0.png"], "imagenet/a/0.png", ["data.path=", "is a file"]),
            (["data/readme.txt"], "data", ["'{root}/data' contains no image", ".jpeg"]),
            (["data/a/0.png", "data/b/readme.txt"], "data", ["class folder '{root}/data/b' contains no image"]),
            (["train/a/0.png", "train/b/0.png", "val/a/0.png"], ".", ["class folder 'b' is in '{root}/train'"]),
            (
                ["train/cat/0.png", "train/mouse/0.png", "val/cat/0.png", "val/mouse/0.png", "val/muose/0.png"],
                ".",
                ["class folder 'muose' is in '{root}/val'", "did you mean 'mouse'"],
            ),
            (["train/a/0.png", "train/b/0.png", "val/0.png"], ".", ["'{root}/val' has none", "a, b"]),
            (["val/a/0.png", "val/b/0.png"], ".", ["'val/' but no 'train/'"]),
        ],
    )
    def test_wrong_folders_are_named(self, tmp_path, files, path, words):
        root = tmp_path / "root"
        for name in files:
            if name.endswith(".png"):
                write(root / name)
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
        with pytest.raises(UserError) as caught:
            open_sources(FolderData(path=str(root / path)), seed=0)
        for word in words:
            assert word.format(root=root) in str(caught.value)
