"""Methods with a teacher: a second network that gives the targets and follows the student."""

from collections.abc import Callable, Sequence
from typing import Any

from dino_lightning.config import TeacherConfig
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.optim.ema import ema_update, follow
from dino_lightning.optim.schedules import Cosine


class StudentTeacher(Method):
    """A student trained by gradient and a teacher that follows it as `teacher_update` says."""

    teacher: MultiCropNetwork

    def __init__(
        self, config: TeacherConfig, student: MultiCropNetwork, teacher: MultiCropNetwork, **options: Any
    ) -> None:
        super().__init__(student, **options)
        self.teacher = follow(teacher, student)
        self.teacher_config = config

    @property
    def evaluated(self) -> MultiCropNetwork:
        """The network that `method.evaluate` names."""
        return self.teacher if self.teacher_config.evaluate == "teacher" else self.student

    @property
    def networks(self) -> tuple[MultiCropNetwork, ...]:
        """Both."""
        return self.student, self.teacher

    def seen(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """All, and the global ones."""
        return range(crops), range(GLOBAL_CROPS)

    def kind_schedules(self) -> dict[str, Callable[[int], float]]:
        """Share of the teacher's old weights that each step keeps: copies are a momentum of 0."""
        config, per_epoch = self.teacher_config, self.steps_per_epoch
        match config.teacher_update:
            case "copy_each_step" | "previous_step":
                return {"teacher_momentum": lambda step: 0.0}
            case "copy_each_epoch":
                return {"teacher_momentum": lambda step: 0.0 if (step + 1) % per_epoch == 0 else 1.0}
            case _:
                cosine = Cosine(config.teacher_momentum, config.teacher_momentum_end, self.total_steps)
                return {"teacher_momentum": cosine}

    def before_student(self, step: int) -> None:
        """`previous_step`: the teacher is what the student was before this step."""
        if self.teacher_config.teacher_update == "previous_step":
            self._move_teacher(step)

    def after_student(self, step: int) -> None:
        """Move the teacher. Also when mixed precision skipped the student's step, as in the original."""
        if self.teacher_config.teacher_update != "previous_step":
            self._move_teacher(step)

    def _move_teacher(self, step: int) -> None:
        ema_update(self.teacher, self.student, momentum=self.schedules["teacher_momentum"](step))
