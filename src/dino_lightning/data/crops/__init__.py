"""The multi-crop augmentation: parameters drawn in one place, and three back ends that apply them."""

from dino_lightning.data.crops.backends import CropBackend, RawCrops, crop_backend, without_color
from dino_lightning.data.crops.pil import EvalView, denormalize

__all__ = ["CropBackend", "EvalView", "RawCrops", "crop_backend", "denormalize", "without_color"]
