"""Features of many images for your own programs: `embed`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from dino_lightning.config import SCHEMAS, DataConfig, DevicesConfig, EmbedConfig, FolderData, HuggingFaceData
from dino_lightning.config.paths import usable_path
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.inputs import ImageInput, as_image_list
from dino_lightning.evaluation.embedding.output import Embeddings
from dino_lightning.evaluation.embedding.run import run_embedding

FEATURE_CACHE = EmbedConfig.feature_cache


def embed(
    images: str | Path | Sequence[ImageInput] | DataConfig,
    checkpoint: str | Path,
    *,
    output: str | Path | None = None,
    checkpoint_key: str | None = None,
    features: str = "class",
    n_last_blocks: int = 1,
    split: str = "all",
    image_size: int | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    accelerator: str = "auto",
    devices: Any = 1,
    precision: Any = "32",
    feature_cache: str | Path | None = FEATURE_CACHE,
    progress: bool = True,
    overwrite: bool = False,
) -> Embeddings:
    """Features (N, D), names and labels of images; unreadable images are left out and listed.

    `images` is a folder, a list (`.txt`, `.csv`, `.tsv`), a `.zip` or `.tar`, a folder of parquet files; a list of
    paths, PIL images or arrays (H, W, C) uint8; or a data configuration of the project, such as
    `ParquetData(path=DIR, label_column="class")`. `output` is a `.parquet`, or a `.npy` and a `.csv` of the same name.
    Features are cached in `feature_cache` in blocks of 1024 images, so the same call resumes after an interruption with
    a bit-identical result; None disables the cache. `devices`, `accelerator` and `precision` are those of
    `lightning.Fabric`; the other arguments are the keys of `dino embed` (docs/configuration.md). Raises `UserError` for
    wrong arguments.
    """
    data, inputs = _data(images)
    workers: dict[str, Any] = {} if num_workers is None else {"num_workers": num_workers}
    config = EmbedConfig(
        checkpoint=str(checkpoint),
        checkpoint_key=checkpoint_key,
        features=features,
        n_last_blocks=n_last_blocks,
        image_size=image_size,
        batch_size_per_device=batch_size,
        data=replace(data, **workers),
        split=split,
        trainer=DevicesConfig(
            accelerator=accelerator, devices=devices, precision=str(precision), enable_progress_bar=progress
        ),
        output="" if output is None else str(output),
        overwrite=overwrite,
        feature_cache=None if feature_cache is None else str(feature_cache),
    )
    return run_embedding(config, output=usable_path("output", str(output)) if output else None, inputs=inputs)


def _data(images: str | Path | Sequence[ImageInput] | DataConfig) -> tuple[DataConfig, list[ImageInput] | None]:
    """A data configuration, and the images themselves if they were passed as a list."""
    if isinstance(images, DataConfig):
        return images, None
    if isinstance(images, str | Path):
        return _data_of_path(str(images)), None
    if isinstance(images, Image.Image):
        images = [images]
    inputs = as_image_list(images)
    if not inputs:
        raise UserError("images: the list is empty; expected at least one image.")
    data = DataConfig(max_bad_share=1.0)
    if any(not isinstance(image, str | Path) for image in inputs):
        data.num_workers = 0  # loader processes would copy images that are already in memory
    return data, inputs


def _data_of_path(path: str) -> DataConfig:
    """The data configuration that reads the path, as `dino data` prints it."""
    file = existing_path(path, key="images", files=True)
    kind = cast(type[DataConfig], SCHEMAS["data"][detect_source(path)])
    if kind is FolderData and file.is_file():
        raise UserError(
            f"images={path} is a file of an unknown type; expected a folder, a .zip or .tar, a list (.csv, "
            ".tsv, .txt), or a list of paths, such as [path]."
        )
    options: dict[str, Any] = {"name" if kind is HuggingFaceData else "path": os.fspath(file)}
    return kind(max_bad_share=1.0, **options)
