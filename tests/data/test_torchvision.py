"""Torchvision's data sets, read from small archives in their own on-disk formats."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from source_cases import check_consistent, decoded, picture, png
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, Flowers102

from dino_lightning.config import TORCHVISION_NAMES, TorchvisionData
from dino_lightning.data.sources import Splits, open_sources
from dino_lightning.data.sources import torchvision as named
from dino_lightning.errors import UserError


def expect_files(monkeypatch, kind: type, folder: Path, *, meta: str | None) -> None:
    """Put the checksums of our small files in place of those of the real ones: the check itself still runs."""

    def checksum(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, checksum(name)] for name, _ in getattr(kind, attribute)])
    if meta is not None:
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum(meta)})


def write_cifar(folder: Path, kind: type, *, key: str, meta: str) -> None:
    """`kind`'s pickles, two pictures a file, numbered in the order of its lists."""
    folder.mkdir(parents=True)
    for position, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        rows = [np.asarray(picture(2 * position + i, size=32)).transpose(2, 0, 1).reshape(-1) for i in range(2)]
        (folder / name).write_bytes(pickle.dumps({"data": np.stack(rows), key: [0, 1]}))
    (folder / meta).write_bytes(pickle.dumps({kind.meta["key"]: ["cat", "dog"]}))


def write_images(folder: Path, names: list[str]) -> list[Path]:
    """Image files that hold the pictures 0, 1, …"""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return [folder / name for name in names]


def opened(name: str, path: Path) -> Splits:
    return open_sources(TorchvisionData(name=name, path=str(path), download=False), seed=0)


def check_files(sources: Splits, *, train: list[Path], val: list[Path]) -> None:
    for source, files in ((sources.train, train), (sources.val, val)):
        assert [source.describe(i) for i in range(len(source))] == [str(file) for file in files]
        assert [source.read(i) for i in range(len(source))] == [file.read_bytes() for file in files]
        check_consistent(source)
    assert sources.remark is None


class TestTorchvision:
    def test_every_name_has_a_reader(self):
        assert tuple(named.SPECS) == TORCHVISION_NAMES

    @pytest.mark.parametrize(
        ("name", "kind", "key", "meta", "count"),
        [("cifar10", CIFAR10, "labels", "batches.meta", 10), ("cifar100", CIFAR100, "fine_labels", "meta", 2)],
    )
    def test_cifar(self, tmp_path, monkeypatch, name, kind, key, meta, count):
        write_cifar(tmp_path / kind.base_folder, kind, key=key, meta=meta)
        expect_files(monkeypatch, kind, tmp_path / kind.base_folder, meta=meta)
        sources = open_sources(TorchvisionData(name=name, path=str(tmp_path), download=False), seed=0)
        assert (len(sources.train), len(sources.val)) == (count, 2)
        assert sources.train.classes == ["cat", "dog"]
        assert sources.train.labels.tolist() == [0, 1] * (count // 2)
        for source, first in ((sources.train, 0), (sources.val, count)):
            for i in range(len(source)):
                assert decoded(source, i).tobytes() == picture(first + i, size=32).tobytes()
            check_consistent(source)
        assert sources.val.describe(1) == f"{name} val row 1"
        assert sources.remark is None

    def test_stl10_trains_on_its_unlabeled_images_too(self, tmp_path, monkeypatch):
        folder = tmp_path / STL10.base_folder
        folder.mkdir()
        for name, first in (("train_X", 0), ("unlabeled_X", 2), ("test_X", 4)):
            pixels = np.stack([np.asarray(picture(first + i, size=96)) for i in range(2)])
            (folder / f"{name}.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())  # columns first
        for name in ("train_y", "test_y"):
            (folder / f"{name}.bin").write_bytes(bytes([1, 2]))
        expect_files(monkeypatch, STL10, folder, meta=None)
        config = TorchvisionData(name="stl10", path=str(tmp_path), download=False)
        sources = open_sources(config, seed=0)
        assert sources.train.labels.tolist() == [0, 1, -1, -1]
        assert sources.val.labels.tolist() == [0, 1]
        assert "2 of the 4 training images have no label" in sources.remark
        for i in range(4):
            assert decoded(sources.train, i).tobytes() == picture(i, size=96).tobytes()
        check_consistent(sources.train)
        assert sources.train.classes == ["0", "1"]
        (folder / "class_names.txt").write_text("cat\ndog\n")
        assert open_sources(config, seed=0).train.classes == ["cat", "dog"]

    def test_svhn(self, tmp_path, monkeypatch):
        savemat = pytest.importorskip("scipy.io").savemat
        known = dict(SVHN.split_list)
        for first, split in ((0, "train"), (3, "test")):
            file = tmp_path / f"{split}_32x32.mat"
            pixels = np.stack([np.asarray(picture(first + i, size=32)) for i in range(3)], axis=-1)
            savemat(file, {"X": pixels, "y": np.array([[1], [10], [2]])})  # 10 is the digit 0
            known[split] = [*known[split][:2], hashlib.md5(file.read_bytes()).hexdigest()]
        monkeypatch.setattr(SVHN, "split_list", known)
        sources = opened("svhn", tmp_path)
        for source, first in ((sources.train, 0), (sources.val, 3)):
            assert source.labels.tolist() == [1, 0, 2]
            assert source.classes == ["0", "1", "2"]
            for i in range(3):
                assert decoded(source, i).tobytes() == picture(first + i, size=32).tobytes()
            check_consistent(source)

    def test_food101(self, tmp_path):
        folder = tmp_path / "food-101"
        splits = {
            "train": {"pie": ["pie/1", "pie/3"], "cake": ["cake/2"]},
            "test": {"pie": ["pie/4"], "cake": ["cake/5"]},
        }
        files = {
            split: write_images(folder / "images", [f"{name}.jpg" for names in classes.values() for name in names])
            for split, classes in splits.items()
        }
        (folder / "meta").mkdir()
        for split, classes in splits.items():
            (folder / "meta" / f"{split}.json").write_text(json.dumps(classes))
        sources = opened("food101", tmp_path)
        assert (sources.train.classes, sources.train.labels.tolist()) == (["cake", "pie"], [1, 1, 0])
        check_files(sources, train=files["train"], val=files["test"])

    def test_flowers102_trains_on_its_validation_images_too(self, tmp_path, monkeypatch):
        savemat = pytest.importorskip("scipy.io").savemat
        folder = tmp_path / "flowers-102"
        files = write_images(folder / "jpg", [f"image_{number:05d}.jpg" for number in range(1, 7)])
        savemat(folder / "imagelabels.mat", {"labels": [[1, 102, 3, 3, 102, 1]]})
        savemat(folder / "setid.mat", {"trnid": [[6, 1]], "valid": [[2, 4]], "tstid": [[3, 5]]})
        known = {
            key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest() if key != "image" else checksum)
            for key, (name, checksum) in Flowers102._file_dict.items()
        }
        monkeypatch.setattr(Flowers102, "_file_dict", known)
        sources = opened("flowers102", tmp_path)
        assert sources.train.labels.tolist() == [0, 0, 101, 2]
        assert sources.val.labels.tolist() == [2, 101]
        assert sources.train.classes[101] == "blackberry lily"
        check_files(sources, train=[files[i] for i in (5, 0, 1, 3)], val=[files[i] for i in (2, 4)])

    def test_dtd_trains_on_its_validation_images_too(self, tmp_path):
        folder = tmp_path / "dtd" / "dtd"
        names = [f"{kind}/{kind}_{number}.jpg" for number in range(3) for kind in ("dotted", "banded")]
        files = write_images(folder / "images", names)
        (folder / "labels").mkdir()
        for number, split in enumerate(["train", "val", "test"]):
            text = "\n".join(names[2 * number : 2 * number + 2])
            (folder / "labels" / f"{split}1.txt").write_text(f"{text}\n")
        sources = opened("dtd", tmp_path)
        assert (sources.train.classes, sources.train.labels.tolist()) == (["banded", "dotted"], [1, 0, 1, 0])
        check_files(sources, train=files[:4], val=files[4:])
        (folder / "labels" / "test1.txt").write_text(f"{names[4]}\n")
        with pytest.raises(UserError, match=r"splits of dtd have different classes"):
            opened("dtd", tmp_path)
        (folder / "labels" / "test1.txt").unlink()
        with pytest.raises(UserError, match=r"no complete 'dtd' of dtd"):
            opened("dtd", tmp_path)

    def test_oxford_iiit_pet(self, tmp_path):
        folder = tmp_path / "oxford-iiit-pet"
        names = ["Abyssinian_1", "great_pyrenees_1", "Abyssinian_2", "great_pyrenees_2"]
        files = write_images(folder / "images", [f"{name}.jpg" for name in names])
        (folder / "annotations").mkdir()
        for split, some in (("trainval", names[:2]), ("test", names[2:])):
            rows = [f"{name} {number} 1 1" for number, name in enumerate(some, 1)]
            (folder / "annotations" / f"{split}.txt").write_text("\n".join(rows))
        sources = opened("oxford_iiit_pet", tmp_path)
        assert sources.train.classes == ["Abyssinian", "Great Pyrenees"]
        assert sources.val.labels.tolist() == [0, 1]
        check_files(sources, train=files[:2], val=files[2:])
        before = sources.train.fingerprint()
        files[0].write_bytes(png(30) + b"more")
        assert opened("oxford_iiit_pet", tmp_path).train.fingerprint() != before

    def test_without_scipy(self, tmp_path, monkeypatch):
        file = tmp_path / "train_32x32.mat"
        file.touch()
        known = [*SVHN.split_list["train"][:2], hashlib.md5(b"").hexdigest()]
        monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, "train": known})
        monkeypatch.setitem(sys.modules, "scipy", None)
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(UserError, match=r"data\.name=svhn needs scipy; .*pip install scipy\)"):
            opened("svhn", tmp_path)

    def test_files_in_another_layout(self, tmp_path):
        class Foreign:
            labels = ()

        with pytest.raises(UserError, match=r"Foreign of this torchvision .* has no attribute _image_files or _images"):
            named._attribute(Foreign(), "_image_files", "_images")

    @pytest.mark.parametrize("name", TORCHVISION_NAMES)
    def test_nothing_there(self, tmp_path, name):
        with pytest.raises(UserError, match=rf"data\.path=.* no complete '.*' of {name};"):
            opened(name, tmp_path)

    def test_missing_data_without_download(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.path=.* no complete 'cifar-10-batches-py'.*data\.download=true"):
            open_sources(TorchvisionData(name="cifar10", path=str(tmp_path / "x"), download=False), seed=0)

    def test_failed_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(CIFAR10, "url", (tmp_path / "absent" / "cifar-10-python.tar.gz").as_uri())
        with pytest.raises(UserError, match=r"data\.download=true: cifar10 cannot be downloaded"):
            open_sources(TorchvisionData(name="cifar10", path=str(tmp_path / "x")), seed=0)
