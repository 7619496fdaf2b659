"""Two ranks that read every kind of source, by `launch`."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from ranks import on_ranks, results_of_ranks

from dino_lightning.config import (
    ArchiveData,
    BuiltinData,
    CropsConfig,
    DataConfig,
    FolderData,
    HuggingFaceData,
    LandmarksData,
    ListingData,
    ParquetData,
    TorchvisionData,
    WebDatasetData,
)
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.runtime.collectives import leave_group

RANKS, WORKERS, BATCH, IMAGES = 2, 2, 3, 24
"""Each loader process makes two batches per epoch; together they contain every image once."""
STEP, SIDE = 10, 24
CROPS = CropsConfig(
    backend="cpu",
    global_size=16,
    local_size=8,
    local_count=2,
    jitter_p=0.0,
    grayscale_p=0.0,
    blur_p=[0.0] * 3,
    solarize_p=[0.0] * 3,
    mean=[0.0] * 3,
    std=[1.0] * 3,
)


def pixels(number: int, *, side: int = SIDE) -> np.ndarray:
    """Red is the image's index; green and blue encode the position of a crop."""
    rows, columns = np.mgrid[0:side, 0:side] * (250 // side)
    return np.stack([np.full((side, side), STEP * number), rows, columns], axis=-1).astype(np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, format="png")
    return buffer.getvalue()


def prepare(folder: Path) -> dict[str, DataConfig]:
    """Write the images for every source; returns their configurations."""
    common: dict[str, Any] = {"num_workers": WORKERS, "batch_size_per_device": BATCH, "holdout": 0.0}
    common |= {"cache_dir": str(folder / "cache")}
    files = {f"{'ab'[number % 2]}/{number:03}.png": png(number) for number in range(IMAGES)}
    for kind in ("classes", "flat"):
        for name, content in files.items():
            path = folder / kind / (name if kind == "classes" else f"deep/er/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in files))
    (folder / "list.csv").write_text("path,class\n" + "".join(f"{name},{name[0]}\n" for name in files))
    rows = {"image": [{"bytes": content, "path": None} for content in files.values()], "label": [0, 1] * 12}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for shard in range(4):
        part = table.shard(num_shards=4, index=shard)
        (folder / "parquet").mkdir(exist_ok=True)
        part.to_parquet(str(folder / "parquet" / f"train-{shard}.parquet"))
        write_tar(folder / "shards" / f"s-{shard}.tar", dict(list(files.items())[shard::4]))
        write_tar(folder / "tars" / f"n{shard}.tar", dict(list(files.items())[shard::4]))
    table.save_to_disk(str(folder / "saved"))
    write_tar(folder / "images.tar", files)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    write_landmarks(folder / "landmarks", list(files.values()))
    return {
        "folder": FolderData(path=str(folder / "classes"), **common),
        "folder, flat": FolderData(path=str(folder / "flat"), **common),
        "folder, disk cache": FolderData(path=str(folder / "classes"), cache="disk", **common),
        "folder, ram cache": FolderData(path=str(folder / "classes"), cache="ram", **common),
        "list": ListingData(path=str(folder / "list.txt"), root=str(folder / "classes"), **common),
        "table": ListingData(
            path=str(folder / "list.csv"), root=str(folder / "classes"), label_column="class", **common
        ),
        "zip": ArchiveData(path=str(folder / "images.zip"), **common),
        "tar": ArchiveData(path=str(folder / "images.tar"), **common),
        "imagenet22k": ArchiveData(path=str(folder / "tars"), **common),
        "gldv2": LandmarksData(path=str(folder / "landmarks"), **common),
        "parquet": ParquetData(path=str(folder / "parquet"), **common),
        "save_to_disk": ParquetData(path=str(folder / "saved"), **common),
        "huggingface": HuggingFaceData(name=str(folder / "parquet"), **common),
        "huggingface, streaming": HuggingFaceData(
            name=str(folder / "parquet"), streaming=True, images=IMAGES, shuffle_buffer=4, **common
        ),
        "webdataset": WebDatasetData(
            shards=str(folder / "shards" / "s-{0..3}.tar"), images=IMAGES, shuffle_buffer=4, **common
        ),
        "torchvision": TorchvisionData(
            name="food101", path=str(write_food(folder / "food", files)), download=False, **common
        ),
        "builtin": BuiltinData(train_images=IMAGES, val_images=2, **common),
    }


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_landmarks(folder: Path, contents: list[bytes]) -> None:
    rows = ["id,url,landmark_id"]
    for number, content in enumerate(contents):
        name = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
        path = folder / "train" / name[0] / name[1] / name[2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)  # PNG under this name: what counts is what is in the file
        rows.append(f"{name},http://nowhere,{number % 5}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")


def write_food(folder: Path, files: dict[str, bytes]) -> Path:
    """The layout of torchvision's Food-101, which needs names that end in jpg."""
    base = folder / "food-101"
    names: dict[str, list[str]] = {"a": [], "b": []}
    for name, content in files.items():
        path = base / "images" / Path(name).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names[name[0]].append(str(Path(name).with_suffix("")))
    (base / "meta").mkdir()
    for split, some in (("train", names), ("test", {"a": names["a"][:1], "b": names["b"][:1]})):
        (base / "meta" / f"{split}.json").write_text(json.dumps(some))
    return folder


def launch(folder: Path) -> list[dict[str, Any]]:
    """Run both ranks; returns the results of each by source."""
    torch.save(prepare(folder), folder / "configs.pt")
    on_ranks(main, folder, HF_DATASETS_CACHE=str(folder / "hf"), HF_HUB_OFFLINE="1")
    return results_of_ranks(folder)


def read(config: DataConfig, *, seed: int, epochs: int) -> list[list[list[list[float]]]]:
    """Epochs of batches of (index, values that identify its crops ...)."""
    loader = MultiCropDataModule(config, CROPS, seed=seed).train_dataloader()
    seen = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        seen.append([rows(batch) for batch in loader])
    return seen


def left_and_found(config: DataConfig) -> list[list[list[list[float]]]]:
    """Epoch 0, interrupted after its first batch and resumed by another loader."""
    first, second = (MultiCropDataModule(config, CROPS, seed=0).train_dataloader() for _ in range(2))
    before = [rows(next(iter(first)))]
    second.load_state_dict(first.state_dict())
    return [before + [rows(batch) for batch in second]]


def rows(views: list[torch.Tensor]) -> list[list[float]]:
    """For each image: its index, and green and blue of its crops' corners."""
    number = (views[0][:, 0].mean((1, 2)) * 255 / STEP).round()
    corners = [view[:, 1:, [0, -1], [0, -1]].flatten(1) for view in views]
    return torch.cat([number[:, None], *corners], dim=1).tolist()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, config in torch.load(folder / "configs.pt", weights_only=False).items():
        first, again = read(config, seed=0, epochs=2), read(config, seed=0, epochs=1)
        results[name] = {"epochs": first, "again": again, "other seed": read(config, seed=1, epochs=1)}
        if name in ("folder", "webdataset"):
            results[name]["resumed"] = left_and_found(config)
    torch.save(results, folder / f"rank{rank}.pt")
    leave_group()
