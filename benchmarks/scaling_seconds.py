"""Duration of the parts of a step on many GPUs, computed from assumed rates."""

import dataclasses
import math

from flops import head_flops, model_flops
from scaling_bytes import FLOAT_BYTES, ddp_bytes, fsdp_bytes, numbers, trained

from dino_lightning.config import CropsConfig, DINOConfig, ViTConfig
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.flops import backbone_flops
from dino_lightning.methods.student_teacher import StudentTeacher

NODE_GPUS = 8
BUCKET_BYTES = 25 * 2**20
"""Size of a gradient bucket, DDP's default."""
HOP_S = 5e-6
"""Latency of a hop between two GPUs (assumed)."""
UPDATE_PASSES = 13
"""Reads and writes of all weights in the update: norm 1, clipping 2, AdamW 7 (4 reads, 3 writes), EMA 3."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Assumed rates, in bytes per second and direction unless stated otherwise."""

    matrix: float
    """Operations per second that a step sustains."""
    memory: float
    """Memory bandwidth of a GPU."""
    nvlink: float
    """NVLink bandwidth of a GPU."""
    node: float
    """Bandwidth of all network adapters of a node together."""
    attained: float
    """Share of `nvlink` and `node` that a collective attains."""

    def seconds(self, sent: float, *, gpus: int) -> float:
        """Duration of a ring in which every GPU sends this many bytes; the rings of a node share its adapters."""
        return sent / (self.attained * min(self.nvlink, self.node if gpus > NODE_GPUS else math.inf))


@dataclasses.dataclass(frozen=True)
class Step:
    """Duration of the parts of a step on one GPU in seconds, without communication."""

    teacher: float
    forward: float
    backward: float
    update: float

    @property
    def alone(self) -> float:
        """Duration of a step on a single GPU."""
        return self.teacher + self.forward + self.backward + self.update


def step_on(hardware: Hardware, backbone: ViTConfig, method: StudentTeacher, *, images: int, slices: int = 1) -> Step:
    """A step with this many images per GPU; the update is divided by `slices`."""
    crops, dino = CropsConfig(), DINOConfig()
    once = sum(backbone_flops(backbone, image_size=crops.global_size).values())
    teacher = GLOBAL_CROPS * (once + sum(head_flops(dino, features=backbone.width).values()))
    student = model_flops(backbone, crops=crops, method=dino) - teacher
    update = UPDATE_PASSES * FLOAT_BYTES * numbers(trained(method.student)) / slices / hardware.memory
    each = images / hardware.matrix
    return Step(teacher=each * teacher, forward=each * student / 3, backward=each * student * 2 / 3, update=update)


def ddp_seconds(hardware: Hardware, step: Step, method: StudentTeacher, *, gpus: int) -> tuple[float, float]:
    """Duration of sending the gradients, and of the exposed part, which does not overlap with computation.

    The exposed part is the last bucket and the time by which all buckets exceed the backward pass. Center and loss are
    small and overlap with the step.
    """
    buckets = math.ceil(FLOAT_BYTES * numbers(trained(method.student)) / BUCKET_BYTES)
    way = hardware.seconds(ddp_bytes(method.student, gpus=gpus), gpus=gpus)
    way += buckets * 2 * math.ceil(math.log2(gpus)) * HOP_S
    return way, way / buckets + max(0.0, way - way / buckets - step.backward)


def fsdp_seconds(
    hardware: Hardware, step: Step, backbone: ViTConfig, method: StudentTeacher, *, gpus: int
) -> tuple[float, float]:
    """The same for FSDP: the time by which the communication of each pass exceeds its computation, plus one part."""
    sent, parts = fsdp_bytes(method, gpus=gpus), backbone.depth + 2  # blocks, the rest of the backbone, head
    delay = parts * math.ceil(math.log2(gpus)) * HOP_S
    ways = {name: hardware.seconds(sent[name], gpus=gpus) + delay for name in sent if name != "norms"}
    overlapping = [
        (ways["teacher"], step.teacher),
        (ways["forward"], step.forward),
        (ways["backward"] + ways["gradients"], step.backward),
    ]
    exposed = sum(max(0.0, way - compute) for way, compute in overlapping)
    return sum(ways.values()), exposed + sum(ways.values()) / parts
