"""The multi-crop augmentation: `sampling` draws all random parameters, and three back ends apply them."""

from dino_lightning.data.crops.backends import CropBackend, RawCrops, crop_backend, without_color
from dino_lightning.data.crops.pil import EvalView, denormalize

__all__ = ["CropBackend", "EvalView", "RawCrops", "crop_backend", "denormalize", "without_color"]
