"""Where images come from: `open_sources` turns a data configuration into a training and a validation source."""

from dino_lightning.config import (
    ArchiveData,
    BuiltinData,
    DataConfig,
    FolderData,
    HuggingFaceData,
    LandmarksData,
    ListingData,
    ParquetData,
    TorchvisionData,
    WebDatasetData,
)
from dino_lightning.data.sources.base import ImageSource, ImageStream, Splits, hold_out
from dino_lightning.errors import UserError

__all__ = ["ImageSource", "ImageStream", "Splits", "open_sources"]


# Readers are imported where they are needed: some of their libraries take a second.
def open_sources(config: DataConfig, *, seed: int) -> Splits:
    """Open the images that `config` describes; `seed` picks the held-out ones where there is no validation split."""
    if not 0 <= config.holdout < 1:
        raise UserError(f"data.holdout={config.holdout} is not a share of the images; give 0 or more, below 1")
    match config:
        case BuiltinData():
            from dino_lightning.data.sources.builtin import open_builtin

            opened = open_builtin(config)
        case FolderData():
            from dino_lightning.data.sources.folder import open_folder

            opened = open_folder(config)
        case ListingData():
            from dino_lightning.data.sources.listing import open_listing

            opened = open_listing(config)
        case LandmarksData():
            from dino_lightning.data.sources.landmarks import open_landmarks

            opened = open_landmarks(config)
        case ArchiveData():
            from dino_lightning.data.sources.archive import open_archive

            opened = open_archive(config)
        case ParquetData():
            from dino_lightning.data.sources.parquet import open_parquet

            opened = open_parquet(config)
        case HuggingFaceData():
            from dino_lightning.data.sources.huggingface import open_huggingface

            opened = open_huggingface(config)
        case WebDatasetData():
            from dino_lightning.data.sources.webdataset import open_webdataset

            opened = open_webdataset(config)
        case TorchvisionData():
            from dino_lightning.data.sources.torchvision import open_torchvision

            opened = open_torchvision(config)
        case _:
            raise TypeError(f"no reader for {type(config).__name__}")
    train = opened.train
    if opened.val is not None or not isinstance(train, ImageSource) or train.labels is None:
        return opened
    return hold_out(opened, share=config.holdout, seed=seed)
