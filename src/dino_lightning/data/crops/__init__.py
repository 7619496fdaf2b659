"""The multi-crop augmentation: parameters drawn in one place, and three back ends that apply them."""

from dino_lightning.data.crops.backends import CropBackend, CutCrops, crop_backend, without_colour
from dino_lightning.data.crops.pil import EvalView, denormalize

__all__ = ["CropBackend", "CutCrops", "EvalView", "crop_backend", "denormalize", "without_colour"]
