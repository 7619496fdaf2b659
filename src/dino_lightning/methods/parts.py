"""Everything that a method is built from besides its own configuration."""

from dataclasses import dataclass, field

from torch import nn

from dino_lightning.config import ComputeConfig, OptimConfig
from dino_lightning.models.multi_crop import MultiCropNetwork


@dataclass
class MethodParts:
    """The second argument of every method's constructor."""

    student_backbone: nn.Module
    """Images (B, C, H, W) -> features (B, D)."""
    feature_dim: int
    """Features per image, D."""
    optim: OptimConfig
    batch_size_per_device: int
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    teacher_backbone: nn.Module | None = None
    """A second backbone, for methods whose configuration derives from `TeacherConfig`."""
    num_classes: int = 0
    """Classes of labeled data; 0 without labels."""

    def student(self, head: nn.Module) -> MultiCropNetwork:
        """The student's backbone with this head."""
        return MultiCropNetwork(self.student_backbone, head, compute=self.compute)

    def teacher(self, head: nn.Module) -> MultiCropNetwork:
        """The teacher's backbone with this head."""
        assert self.teacher_backbone is not None, "only a method whose config derives from TeacherConfig has a teacher"
        return MultiCropNetwork(self.teacher_backbone, head, compute=self.compute)
