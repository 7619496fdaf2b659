"""A resumed loader gives the remaining batches of an uninterrupted one, with the same crops."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from source_cases import png
from torch import Tensor

from dino_lightning.config import BuiltinData, CropsConfig, DataConfig, HuggingFaceData, WebDatasetData
from dino_lightning.data.loader import EpochBatchSampler
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*has `__len__` defined")

IMAGES, BATCH = 24, 4
EPOCH = IMAGES // BATCH
Batches = list[list[Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams of uneven shards."""
    root = tmp_path_factory.mktemp("streams")
    for shard, some in enumerate((range(0, 9), range(9, 11), range(11, 24))):
        with tarfile.open(root / f"s-{shard}.tar", "w") as tar:
            for number in some:
                info = tarfile.TarInfo(f"{number:03}.png")
                info.size = len(png(number))
                tar.addfile(info, io.BytesIO(png(number)))
        rows = {"image": [{"bytes": png(number), "path": None} for number in some]}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        table.to_parquet(str(root / "parquet" / f"train-{shard}.parquet"))
    return root


def module(kind: str, folder: Path, *, workers: int = 0, backend: str = "cpu", seed: int = 0) -> MultiCropDataModule:
    common: dict[str, Any] = {"num_workers": workers, "batch_size_per_device": BATCH}
    stream = {"images": IMAGES, "shuffle_buffer": 5, **common}
    config: DataConfig
    match kind:
        case "builtin":
            config = BuiltinData(train_images=IMAGES, val_images=2, image_size=16, **common)
        case "webdataset":
            config = WebDatasetData(shards=str(folder / "s-{0..2}.tar"), **stream)
        case _:
            config = HuggingFaceData(name=str(folder / "parquet"), label_column=None, streaming=True, **stream)
    return MultiCropDataModule(
        config, CropsConfig(backend=backend, global_size=8, local_size=4, local_count=1), seed=seed
    )


def finished(data: MultiCropDataModule, batch: Any) -> list[Tensor]:
    return [view.clone() for view in data.on_after_batch_transfer(batch, 0)]


def run(data: MultiCropDataModule, *, epochs: int, loader: Any = None) -> Batches:
    loader = loader or data.train_dataloader()
    batches = []
    for epoch in range(loader.epoch, epochs):
        loader.set_epoch(epoch)
        batches += [finished(data, batch) for batch in loader]
    end(loader)
    return batches


def end(loader: Any) -> None:
    """End its processes, like Lightning. If the garbage collector ends them, PyTorch waits five seconds for each."""
    if loader.loader.num_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()


def check_equal(ours: Batches, expected: Batches) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["builtin", "webdataset", "huggingface"])
@pytest.mark.slow_after_first(2)
def test_a_resumed_loader_gives_the_remaining_batches(kind: str, workers: int, folder: Path) -> None:
    epochs = 3 if workers == 0 else 2
    whole = run(module(kind, folder, workers=workers), epochs=epochs)
    assert len(whole) == epochs * EPOCH
    for left_after in (0, 4, EPOCH, EPOCH + 3) if workers == 0 else (EPOCH + 2,):
        first = module(kind, folder, workers=workers)
        loader, seen = first.train_dataloader(), []
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader if len(seen) < left_after else ():
                seen.append(finished(first, batch))
                if len(seen) == left_after:
                    break
            if len(seen) == left_after:
                break
        check_equal(seen, whole[:left_after])
        kept = io.BytesIO()
        torch.save(loader.state_dict(), kept)
        second = module(kind, folder, workers=workers)
        again = second.train_dataloader()
        again.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
        rest = []
        # Like Lightning: the interrupted epoch, or the next one if it was complete.
        for epoch in range(left_after // EPOCH, epochs):
            again.set_epoch(epoch)
            rest += [finished(second, batch) for batch in again]
        check_equal(rest, whole[left_after:])
        end(loader)
        end(again)


@pytest.mark.parametrize("backend", ["pil", "device"])
def test_other_backends_resume(backend: str, folder: Path) -> None:
    data = module("builtin", folder, backend=backend)
    whole = run(data, epochs=1)
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "images": 3 * BATCH})
    check_equal(run(data, epochs=1, loader=loader), whole[3:])


def test_other_batch_sizes_and_ranks_resume_with_the_same_images() -> None:
    """A position is a number of images: after a change to twice the devices, each reads half the batches."""
    alone = [index for batch in EpochBatchSampler(48, batch_size=4, seed=1, rank=0, world_size=1) for _, index in batch]
    both = []
    for rank in range(2):
        order = EpochBatchSampler(48, batch_size=4, seed=1, rank=rank, world_size=2)
        order.start = 16 // (4 * 2)
        both += [index for batch in order for _, index in batch]
    assert sorted(both) == sorted(alone[16:])


def test_a_stream_read_by_another_number_of_processes_is_refused(folder: Path) -> None:
    state = module("webdataset", folder).train_dataloader().state_dict()
    with pytest.raises(UserError, match="written with 1 loader processes, but the run has 2"):
        module("webdataset", folder, workers=2).train_dataloader().load_state_dict(state)


def test_a_stream_in_another_order_is_refused(folder: Path) -> None:
    state = module("webdataset", folder).train_dataloader().state_dict()
    with pytest.raises(UserError, match="written with seed=0, but the run has seed=1"):
        module("webdataset", folder, seed=1).train_dataloader().load_state_dict(state)
    with pytest.raises(UserError, match=r"written with data\.shuffle_buffer=9, but the run has data\.shuffle_buffer=5"):
        module("webdataset", folder).train_dataloader().load_state_dict({**state, "shuffle_buffer": 9})


class Watcher(L.LightningModule):
    """Records the batches, and raises KeyboardInterrupt after one of them."""

    def __init__(self, *, stops_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Batches = []
        self.stops_after = stops_after

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if len(self.seen) == self.stops_after:
            raise KeyboardInterrupt
        self.seen.append([view.clone() for view in batch])
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(watcher: Watcher, data: MultiCropDataModule, root: Path, *, every: str, **options: Any) -> None:
    when: dict[str, Any] = {"every_n_train_steps": 1} if every == "step" else {"save_on_train_epoch_end": True}
    checkpoints = ModelCheckpoint(root, filename="last", enable_version_counter=False, **when)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=3,
        default_root_dir=root,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(watcher, datamodule=data, weights_only=True, **options)


@pytest.mark.parametrize(
    ("every", "stops_after", "kept"),
    [
        ("step", 2, 2),
        ("step", EPOCH, EPOCH),
        ("step", EPOCH + 5, EPOCH + 5),
        ("epoch", EPOCH + 2, EPOCH),
        ("epoch", 2 * EPOCH, 2 * EPOCH),
    ],
)
@pytest.mark.parametrize("kind", ["builtin", "webdataset"])
@pytest.mark.slow_after_first(4)
def test_lightning_resumes_at_the_position_of_its_checkpoint(
    kind: str, every: str, stops_after: int, kept: int, folder: Path, tmp_path: Path
) -> None:
    whole = run(module(kind, folder), epochs=3)
    first, second = Watcher(stops_after=stops_after), Watcher()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, module(kind, folder), tmp_path, every=every)
    check_equal(first.seen, whole[:stops_after])
    fit(second, module(kind, folder), tmp_path, every=every, ckpt_path=str(tmp_path / "last.ckpt"))
    check_equal(second.seen, whole[kept:])
