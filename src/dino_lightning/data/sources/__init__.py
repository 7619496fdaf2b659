"""Sources of images: `open_sources` opens the training and validation images of a data configuration."""

from dino_lightning.config import DataConfig
from dino_lightning.data.sources.base import ImageSource, ImageStream, Splits, hold_out
from dino_lightning.data.sources.registry import register_source, source_for

__all__ = ["ImageSource", "ImageStream", "Splits", "open_sources", "register_source"]


def open_sources(config: DataConfig, *, seed: int) -> Splits:
    """Open the images of `config`; `seed` selects the images that are held out if there is no validation split."""
    opened = source_for(config)(config)
    train = opened.train
    if opened.val is not None or not isinstance(train, ImageSource) or train.labels is None:
        return opened
    return hold_out(opened, share=config.holdout, seed=seed)
