"""Torchvision's data sets, read from small archives in their own on-disk formats."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from pictures import check_consistent, picture
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from dino_lightning.config.images import TorchvisionData
from dino_lightning.data.sources import open_sources
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


class TestTorchvision:
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
                assert source[i][0].tobytes() == picture(first + i, size=32).tobytes()
            check_consistent(source)
        assert sources.val.describe(1) == f"{name} val row 1"
        assert sources.notice is None

    def test_stl10_trains_on_its_unlabelled_images_too(self, tmp_path, monkeypatch):
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
        assert "2 of the 4 training images have no label" in sources.notice
        for i in range(4):
            assert sources.train[i][0].tobytes() == picture(i, size=96).tobytes()
        check_consistent(sources.train)
        assert sources.train.classes == ["0", "1"]
        (folder / "class_names.txt").write_text("cat\ndog\n")
        assert open_sources(config, seed=0).train.classes == ["cat", "dog"]

    def test_missing_data_without_download(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.path=.* no complete 'cifar-10-batches-py'.*data\.download=true"):
            open_sources(TorchvisionData(name="cifar10", path=str(tmp_path / "x"), download=False), seed=0)

    def test_failed_download(self, tmp_path, monkeypatch):
        monkeypatch.setattr(CIFAR10, "url", (tmp_path / "absent" / "cifar-10-python.tar.gz").as_uri())
        with pytest.raises(UserError, match=r"data\.download=true could not bring cifar10"):
            open_sources(TorchvisionData(name="cifar10", path=str(tmp_path / "x")), seed=0)

    def test_wrong_name(self):
        with pytest.raises(UserError, match=r"data\.name=cifr10 .* did you mean 'cifar10'"):
            open_sources(TorchvisionData(name="cifr10"), seed=0)
