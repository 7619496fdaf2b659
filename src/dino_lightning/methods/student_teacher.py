"""Methods with a teacher: a second network that provides the targets and follows the student."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from dino_lightning.config import BYOLConfig, MoCoConfig, TeacherConfig
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.heads import MLPHead
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.optim.ema import ema_update, follow
from dino_lightning.optim.schedules import Cosine


class StudentTeacher(Method):
    """A student trained by gradient descent and a teacher that follows it as `teacher_update` says."""

    teacher: MultiCropNetwork

    def __init__(
        self,
        config: TeacherConfig,
        parts: MethodParts,
        *,
        heads: tuple[nn.Module, nn.Module],
        predictor: nn.Module | None = None,
    ) -> None:
        """`heads` are those of the student and of the teacher; only the student has the predictor."""
        super().__init__(parts, heads[0], predictor=predictor)
        self.teacher = follow(parts.teacher(heads[1]), self.student)
        self.teacher_config = config

    @property
    def evaluated_key(self) -> str:
        """The network that `method.evaluate` names."""
        return self.teacher_config.evaluate

    def views_of_networks(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """The student processes all crops, the teacher the global ones."""
        return range(crops), range(GLOBAL_CROPS)

    def extra_schedules(self) -> dict[str, Callable[[int], float]]:
        """The momentum of the teacher: the share of its old weights that each step keeps; 0 copies the student."""
        config, per_epoch = self.teacher_config, self.clock.steps_per_epoch
        match config.teacher_update:
            case "copy_each_step" | "previous_step":
                return {"teacher_momentum": lambda step: 0.0}
            case "copy_each_epoch":
                return {"teacher_momentum": lambda step: 0.0 if (step + 1) % per_epoch == 0 else 1.0}
            case _:
                cosine = Cosine(config.teacher_momentum, config.teacher_momentum_end, self.clock.total_steps)
                return {"teacher_momentum": cosine}

    def before_step(self, step: int) -> None:
        """`previous_step`: the teacher becomes what the student was before this step."""
        if self.teacher_config.teacher_update == "previous_step":
            self._update_teacher(step)

    def after_step(self, step: int) -> None:
        """Update the teacher. Also when mixed precision skipped the student's step, as in the original."""
        if self.teacher_config.teacher_update != "previous_step":
            self._update_teacher(step)

    def _update_teacher(self, step: int) -> None:
        ema_update(self.teacher, self.student, momentum=self.schedules["teacher_momentum"](step))


def projectors(config: BYOLConfig | MoCoConfig, feature_dim: int, *, last_norm: bool = False) -> dict[str, Any]:
    """The projectors of student and teacher as `heads`, and the two layers of `method.predictor`, if it is set."""
    norms = {"batch_norm": config.head_batch_norm, "last_norm": last_norm}
    mlp = partial(MLPHead, out_dim=config.out_dim, hidden_dim=config.head_hidden_dim, **norms)
    heads = mlp(feature_dim, layers=config.head_layers), mlp(feature_dim, layers=config.head_layers)
    return {"heads": heads, "predictor": mlp(config.out_dim, layers=2) if config.predictor else None}
