"""Features on disk: an interruption costs a block, a wrong or damaged file nothing, and no rank sees anything else."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation_tools import tiny_network, tiny_task
from lightning import Fabric
from PIL import Image
from ranks import on_ranks
from torch import Tensor

from dino_lightning.config import BuiltinData, DataConfig
from dino_lightning.data.sources.base import Subset
from dino_lightning.data.sources.builtin import BuiltinImages
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import EvalContext, Task
from dino_lightning.evaluation.features import cache as feature_cache
from dino_lightning.evaluation.features.cache import cached_features, feature_key
from dino_lightning.evaluation.features.images import ListedFiles, ViewedImages, center_view
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.collectives import leave_group

N, BLOCK = 50, 16
DATA = BuiltinData(num_workers=0)
Features = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def source() -> BuiltinImages:
    return BuiltinImages("train", images=N, image_size=32, draw_seed=0)


class Counted:
    """The network's features; counts the images, and may fail in the middle."""

    def __init__(self, network: FrozenNetwork, *, fail_after: int | None = None) -> None:
        self.network, self.fail_after, self.images = network, fail_after, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        if self.fail_after is not None and self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(images_BCHW)
        return self.network.backbone(images_BCHW)


def _task(folder: Path, *, cache: bool = True, network: FrozenNetwork | None = None, workers: int = 0) -> Task:
    data = replace(DATA, num_workers=workers)
    return tiny_task(folder, network or tiny_network(), data=data, cache=folder / "cache" if cache else None)


def _view(network: FrozenNetwork, source: Any, *, bad: Path | None = None, size: int = 32, **data: Any) -> ViewedImages:
    view = center_view(network, resize=32, size=size)
    return ViewedImages(source, view, blank=(3, size, size), config=DataConfig(**data), bad_images=bad)


def _features(
    task: Task, source: Any, forward: Callable | None = None, *, batch_size: int = 6, **options: Any
) -> Features:
    images = options.pop("images", None) or _view(task.network, source)
    options = {"label": "images", "kind": "cls", **options}
    return cached_features(task, forward or Counted(task.network), images, batch_size=batch_size, **options)


def _equal(got: Features, want: Features) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file())


def test_features_equal_those_of_single_images(tmp_path: Path, source: BuiltinImages) -> None:
    network = tiny_network()
    features_MD, labels_M, indices_M = _features(_task(tmp_path), source)
    images = _view(network, source)
    want = torch.cat([network.backbone(images[i][0][None]) for i in range(N)])
    # Matrix products of a batch and of one image round differently, in the last bits.
    torch.testing.assert_close(features_MD, want, rtol=1e-5, atol=1e-5)
    assert labels_M.tolist() == source.labels.tolist()
    assert indices_M.tolist() == list(range(N))
    assert len(_files(tmp_path)) == 4, "50 images in blocks of 16"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow_after_first(1)
def test_an_interrupted_run_continues(tmp_path: Path, source: BuiltinImages, workers: int) -> None:
    whole = _features(_task(tmp_path / "whole", cache=False), source)
    assert not _files(tmp_path / "whole")
    task = _task(tmp_path, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        _features(task, source, Counted(task.network, fail_after=BLOCK))
    assert [path.name for path in _files(tmp_path)] == ["000000.safetensors"], "a whole block is kept at once"
    # The second block of 6 + 6 + 4 images, and one batch of the third.
    with pytest.raises(KeyboardInterrupt):
        _features(task, source, Counted(task.network, fail_after=22))
    assert [path.name for path in _files(tmp_path)] == ["000000.safetensors", "000001.safetensors"]
    again = Counted(task.network)
    assert _equal(_features(task, source, again), whole)
    assert again.images == N - 2 * BLOCK
    third = Counted(task.network)
    assert _equal(_features(task, source, third), whole)
    assert third.images == 0


def test_a_chosen_part_in_any_order(tmp_path: Path, source: BuiltinImages) -> None:
    network, chosen = tiny_network(), [49, 3, 20, 8]
    got = _features(_task(tmp_path), source, indices=chosen)
    assert got[2].tolist() == [3, 8, 20, 49]
    assert got[1].tolist() == source.labels[[3, 8, 20, 49]].tolist()
    images = _view(network, source)
    torch.testing.assert_close(got[0][2], network.backbone(images[20][0][None])[0], rtol=1e-5, atol=1e-5)
    again = Counted(network)
    assert _equal(_features(_task(tmp_path), source, again, indices=sorted(chosen)), got)
    assert again.images == 0


def test_no_images(tmp_path: Path, source: BuiltinImages) -> None:
    features_MD, labels_M, indices_M = _features(_task(tmp_path), source, indices=[])
    assert features_MD.shape == (0, 0)
    assert len(labels_M) == len(indices_M) == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _another_block(path: Path) -> None:
    path.write_bytes(path.with_name("000000.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [_cut, _flip, _another_block, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_replaced(tmp_path: Path, source: BuiltinImages, damage: Callable[[Path], None]) -> None:
    task = _task(tmp_path)
    whole = _features(task, source)
    damaged = _files(tmp_path)[1]
    before = damaged.read_bytes()
    damage(damaged)
    again = Counted(task.network)
    assert _equal(_features(task, source, again), whole)
    assert again.images == BLOCK
    assert damaged.read_bytes() == before


def test_the_key_contains_everything_that_features_depend_on(tmp_path: Path, source: BuiltinImages) -> None:
    network = tiny_network()
    task, images = _task(tmp_path), _view(network, source)

    def key(task: Task = task, images: ViewedImages = images, kind: str = "cls", indices: Any = range(N)) -> str:
        return feature_key(task, images, kind=kind, indices=list(indices))

    half = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    relabeled = Subset(source, indices=np.arange(N))
    relabeled.labels = np.zeros(N, dtype=np.int64)
    keys = {
        "the same": key(),
        "weights": key(task=_task(tmp_path, network=tiny_network(seed=1))),
        "kind": key(kind="patches"),
        "precision": key(task=replace(task, context=EvalContext(half))),
        "view": key(images=_view(network, source, size=24)),
        "normalization": key(task=_task(tmp_path, network=replace(network, mean=[0.5, 0.5, 0.5]))),
        "source": key(images=_view(network, BuiltinImages("train", images=N, image_size=32, draw_seed=1))),
        "a part of the source": key(images=_view(network, Subset(source, indices=np.arange(N)))),
        "labels": key(images=_view(network, relabeled)),
        "decoding": key(images=_view(network, source, apply_exif_rotation=True)),
        "indices": key(indices=range(1, N)),
    }
    assert len(set(keys.values())) == len(keys), keys
    assert key() == key(task=_task(tmp_path), images=_view(tiny_network(), source)), "the same in another process"


def test_another_batch_size_uses_the_same_cache(tmp_path: Path, source: BuiltinImages) -> None:
    task = _task(tmp_path)
    _features(task, source)
    again = Counted(task.network)
    _features(task, source, again, batch_size=64)
    assert again.images == 0


def _folder_with_broken(folder: Path) -> ListedFiles:
    generator = np.random.default_rng(0)
    for i in range(20):
        path = folder / f"{i:02d}.png"
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        if i in (3, 17):
            path.write_bytes(path.read_bytes()[:60])
    return ListedFiles(sorted(folder.glob("*.png")))


def test_broken_images_are_named_left_out_and_not_tried_again(tmp_path: Path) -> None:
    files = _folder_with_broken(tmp_path)
    task = _task(tmp_path)
    for run in ("first", "second"):
        named = tmp_path / run / "bad_images.txt"
        images = _view(task.network, files, bad=named, max_bad_share=0.1)
        counted = Counted(task.network)
        features_MD, labels_M, indices_M = _features(task, files, counted, images=images)
        assert indices_M.tolist() == [i for i in range(20) if i not in (3, 17)]
        assert len(features_MD) == 18
        assert (labels_M == -1).all()
        assert counted.images == (20 if run == "first" else 0)
        assert [line.split("\t")[0][-6:] for line in named.read_text().splitlines()] == ["03.png", "17.png"]
    with pytest.raises(UserError, match="max_bad_share"):
        _features(task, files, images=_view(task.network, files, max_bad_share=0.05))


@pytest.mark.slow
def test_an_error_of_a_loader_process_is_one_sentence(tmp_path: Path) -> None:
    files = _folder_with_broken(tmp_path)
    task = _task(tmp_path, workers=1)
    with pytest.raises(UserError, match=r"^data\.on_error=raise: [^\n]*03\.png cannot be read [^\n]*$"):
        _features(task, files, images=_view(task.network, files, on_error="raise"))


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    files = _folder_with_broken(tmp_path)
    task = _task(tmp_path)
    _features(task, files, images=_view(task.network, files, max_bad_share=1))
    Image.new("RGB", (32, 32)).save(tmp_path / "03.png")
    files = ListedFiles(sorted(tmp_path.glob("*.png")))
    counted = Counted(task.network)
    _, _, indices_M = _features(task, files, counted, images=_view(task.network, files, max_bad_share=1))
    assert counted.images == 20
    assert len(indices_M) == 19


def test_features_without_a_writable_cache(tmp_path: Path, source: BuiltinImages, capsys) -> None:
    (tmp_path / "file").write_text("")
    task = replace(_task(tmp_path), cache=tmp_path / "file")
    assert _equal(_features(task, source), _features(_task(tmp_path, cache=False), source))
    assert capsys.readouterr().err.count("cannot write") == 1


def _run_rank(rank: int, world: int, folder: str) -> None:
    feature_cache.BLOCK = BLOCK
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    source = BuiltinImages("train", images=N, image_size=32, draw_seed=0)
    results = {}
    for name, chosen in {"all": None, "fewer blocks than ranks": [5, 9]}.items():
        counted = Counted(tiny_network())
        got = _features(_task(Path(folder)), source, counted, indices=chosen)
        results[name] = got, counted.images
    torch.save(results, f"{folder}/{world}_{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_ranks_share_the_cache(tmp_path: Path, source: BuiltinImages) -> None:
    alone = _features(_task(tmp_path / "alone"), source)
    few = _features(_task(tmp_path / "alone"), source, indices=[5, 9])
    # One block of four is there already, from a run of one rank.
    with pytest.raises(KeyboardInterrupt):
        _features(_task(tmp_path), source, Counted(tiny_network(), fail_after=BLOCK))
    on_ranks(_run_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2)]
    for result in ranks:
        assert _equal(result["all"][0], alone)
        assert _equal(result["fewer blocks than ranks"][0], few)
    assert [result["all"][1] for result in ranks] == [BLOCK, BLOCK + 2], "blocks 2, and 1 and 3"
    made = {os.path.relpath(path, tmp_path): path.read_bytes() for path in _files(tmp_path)}
    assert made == {os.path.relpath(path, tmp_path / "alone"): path.read_bytes() for path in _files(tmp_path / "alone")}
