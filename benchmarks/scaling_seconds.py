"""How long the parts of a step take on many GPUs, by rates that are assumed."""

import dataclasses
import math

from flops import head_flops, model_flops
from scaling_bytes import FLOAT, ddp_bytes, fsdp_bytes, numbers, trained

from dino_lightning.config import CropsConfig, DINOConfig, ViTConfig
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.flops import backbone_flops
from dino_lightning.methods.student_teacher import StudentTeacher

NODE, BUCKET, HOP = 8, 25 * 2**20, 5e-6
"""GPUs of a node; bytes of a gradient bucket (DDP's default); seconds of a hop from GPU to GPU (assumed)."""
PASSES_OF_UPDATE = 13
"""Reads and writes of a weight's size: norm 1, clip 2, AdamW 7 (4 read, 3 written), moving average 3."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Assumptions; rates in bytes per second and direction."""

    matrix: float
    """Operations per second that a step sustains."""
    memory: float
    nvlink: float
    """Of one GPU."""
    node: float
    """Of all network adapters of a node together."""
    attained: float
    """Share of `nvlink` and `node` that a collective attains."""

    def seconds(self, sent: float, *, gpus: int) -> float:
        """Of a ring whose every GPU sends this much; the rings of a node share its adapters."""
        return sent / (self.attained * min(self.nvlink, self.node if gpus > NODE else math.inf))


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step's parts on one GPU, without any network."""

    teacher: float
    forward: float
    backward: float
    update: float

    @property
    def alone(self) -> float:
        """On a single GPU."""
        return self.teacher + self.forward + self.backward + self.update


def step_on(hardware: Hardware, backbone: ViTConfig, method: StudentTeacher, *, images: int, slices: int = 1) -> Step:
    """A step over this many images; `slices` share the update."""
    crops, dino = CropsConfig(), DINOConfig()
    once = sum(backbone_flops(backbone, image_size=crops.global_size).values())
    teacher = GLOBAL_CROPS * (once + sum(head_flops(dino, features=backbone.width).values()))
    student = model_flops(backbone, crops=crops, method=dino) - teacher
    update = PASSES_OF_UPDATE * FLOAT * numbers(trained(method.student)) / slices / hardware.memory
    each = images / hardware.matrix
    return Step(teacher=each * teacher, forward=each * student / 3, backward=each * student * 2 / 3, update=update)


def ddp_seconds(hardware: Hardware, step: Step, method: StudentTeacher, *, gpus: int) -> tuple[float, float]:
    """Of the gradients' way, and of the part of it that nothing hides: the last bucket, and what outlasts the backward
    pass. Center and loss are small and have the whole step.
    """
    buckets = math.ceil(FLOAT * numbers(trained(method.student)) / BUCKET)
    way = hardware.seconds(ddp_bytes(method.student, gpus=gpus), gpus=gpus)
    way += buckets * 2 * math.ceil(math.log2(gpus)) * HOP
    return way, way / buckets + max(0.0, way - way / buckets - step.backward)


def fsdp_seconds(
    hardware: Hardware, step: Step, backbone: ViTConfig, method: StudentTeacher, *, gpus: int
) -> tuple[float, float]:
    """The same of the weights' and gradients' ways: per pass what outlasts it, and its first or last part."""
    sent, parts = fsdp_bytes(method, gpus=gpus), backbone.depth + 2  # blocks, what is around them, head
    delay = parts * math.ceil(math.log2(gpus)) * HOP
    ways = {name: hardware.seconds(sent[name], gpus=gpus) + delay for name in sent if name != "norms"}
    at_once = [
        (ways["teacher"], step.teacher),
        (ways["forward"], step.forward),
        (ways["backward"] + ways["gradients"], step.backward),
    ]
    exposed = sum(max(0.0, way - compute) for way, compute in at_once)
    return sum(ways.values()), exposed + sum(ways.values()) / parts
