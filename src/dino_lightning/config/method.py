"""The training method: `method`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from dino_lightning.config.model import ViTConfig
from dino_lightning.config.ranges import AtLeast, Duration, OneOf, Pair, Positive, Share, ShareBelowOne
from dino_lightning.errors import UserError


@dataclass
class MethodConfig:
    """The training method; one of the classes below."""

    uses_labels: ClassVar[bool] = False
    """Whether batches have labels."""
    uses_loss_rows: ClassVar[bool] = False
    """Whether `compute.loss_rows` has an effect."""
    dependent_keys: ClassVar[dict[str, tuple[str, str | int]]] = {}
    """Key that has no effect by itself -> the key it depends on, and a value of that key with which it has one: for a
    string only this value, for a number every value above 0."""

    def check(self, config: Any) -> None:
        """Raise `UserError` if this method cannot be trained with the other settings of `config`, a `TrainConfig`."""


@dataclass
class TeacherConfig(MethodConfig):
    """A method whose targets come from a teacher, a second network that is updated from the student."""

    teacher_update: Annotated[str, OneOf("ema", "copy_each_step", "previous_step", "copy_each_epoch")] = "ema"
    """Teacher update rule: `ema` (moving average of the student), `copy_each_step` (the current student),
    `previous_step` (the student one step ago), or `copy_each_epoch` (the student at the end of the last epoch)."""
    teacher_momentum: Annotated[float, Share] = 0.996
    """Momentum of the teacher's weights at the first step, with `ema` (use 0.9995 for a total batch of 256)."""
    teacher_momentum_end: Annotated[float, Share] = 1.0
    """Final momentum of the teacher's weights, at the end of a cosine schedule, with `ema`."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "teacher"
    """Network that k-NN evaluation, pictures and exported files use."""


@dataclass
class DINOConfig(TeacherConfig):
    """Self-distillation with no labels (Caron et al., ICCV 2021)."""

    uses_loss_rows: ClassVar[bool] = True
    dependent_keys: ClassVar[dict[str, tuple[str, str | int]]] = {
        "center_momentum": ("centering", "center"),
        "sinkhorn_iterations": ("centering", "sinkhorn"),
        "mask_p": ("patch_loss_weight", 1),
        "mask_share": ("patch_loss_weight", 1),
    }

    out_dim: Annotated[int, AtLeast(2)] = 65536
    """Number of prototypes K, the width of the head's output."""
    head_layers: Annotated[int, AtLeast(1)] = 3
    """Number of linear layers in the head's MLP before the L2 bottleneck."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the MLP's hidden layers."""
    head_bottleneck_dim: Annotated[int, AtLeast(1)] = 256
    """Width of the L2-normalized bottleneck."""
    head_l2_bottleneck: bool = True
    """Normalize the bottleneck's output to length 1 before the prototypes."""
    head_batch_norm: bool = False
    """Use batch normalization in the head's MLP (`trainer.sync_batchnorm` synchronizes it over devices)."""
    head_activation: Annotated[str, OneOf("gelu", "relu")] = "gelu"
    """Activation function in the head's MLP."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit norm. False learns better but can be unstable."""
    freeze_last_layer: Annotated[str, Duration] = "1ep"
    """Time at the start of the run without a gradient for the prototypes (duration; whole epochs or steps)."""
    predictor: bool = False
    """Add two layers to the student, between the bottleneck and its normalization."""
    loss: Annotated[str, OneOf("cross_entropy", "mse")] = "cross_entropy"
    """`cross_entropy` between the two distributions, or `mse` between the L2-normalized outputs, as in BYOL and without
    temperatures."""
    student_temperature: Annotated[float, Positive] = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: Annotated[float, Positive] = 0.04
    """Temperature of the teacher's softmax after its warm-up. Above 0.07 most runs collapse."""
    teacher_temperature_start: Annotated[float, Positive] = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    teacher_temperature_warmup: Annotated[str, Duration] = "0ep"
    """Linear warm-up of the teacher's temperature (duration; in `ep` it changes once per epoch, as in the original)."""
    centering: Annotated[str, OneOf("center", "sinkhorn", "softmax", "none")] = "center"
    """How the teacher's logits are balanced over the prototypes: `center` subtracts a running mean; `sinkhorn` assigns
    the batch evenly (Sinkhorn-Knopp); `softmax` is its first iteration, a softmax over the batch; `none` does
    nothing."""
    center_momentum: Annotated[float, Share] = 0.9
    """Momentum of the center: share of the previous center that each optimizer step keeps, with `center`."""
    sinkhorn_iterations: Annotated[int, AtLeast(1)] = 3
    """Number of Sinkhorn-Knopp iterations, with `sinkhorn`."""
    koleo_weight: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the KoLeo regularizer, which spreads the student's features of the global crops (DINOv2 uses 0.1)."""
    patch_loss_weight: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the loss on masked patches of the global crops (iBOT uses 1). Needs a built-in ViT."""
    mask_p: Annotated[float, Share] = 0.5
    """Probability that a global crop of the student is masked, if `patch_loss_weight` is above 0."""
    mask_share: Annotated[list[float], Pair(1, of="shares of the image")] = field(default_factory=lambda: [0.1, 0.5])
    """Smallest and largest share of masked patches in a masked crop."""

    def check(self, config: Any) -> None:
        """Masked patches need a backbone that can replace patches."""
        if self.patch_loss_weight and not isinstance(config.backbone, ViTConfig):
            raise UserError(
                f"method.patch_loss_weight={self.patch_loss_weight} needs patch masking, which only the built-in ViTs "
                "support; set backbone=vit_small or method.patch_loss_weight=0."
            )


@dataclass
class BYOLConfig(TeacherConfig):
    """Bootstrap your own latent (Grill et al., NeurIPS 2020): predict the teacher's embedding of another view."""

    out_dim: Annotated[int, AtLeast(2)] = 256
    """Width of the embedding."""
    head_layers: Annotated[int, AtLeast(1)] = 2
    """Number of linear layers in the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 4096
    """Width of the hidden layers of projector and predictor."""
    head_batch_norm: bool = True
    """Use batch normalization in projector and predictor (`trainer.sync_batchnorm` synchronizes it over devices)."""
    predictor: bool = True
    """Add two layers to the student. Without them the paper's run collapses."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "student"
    """Network that k-NN evaluation, pictures and exported files use."""


@dataclass
class MoCoConfig(TeacherConfig):
    """Momentum contrast (He et al. 2020; version 2: Chen et al. 2020; version 3: Chen et al., ICCV 2021)."""

    version: Annotated[int, OneOf(2, 3)] = 2
    """Version 2 takes negatives from a queue; version 3 takes them from the batches of all devices and has a predictor.
    On the command line, the version sets the keys from `out_dim` to `loss_scale` and the teacher's momentum, each of
    which can also be set alone."""
    temperature: Annotated[float, Positive] = 0.2
    """Temperature of the softmax over similarities."""
    out_dim: Annotated[int, AtLeast(2)] = 128
    """Width of the embedding."""
    head_layers: Annotated[int, AtLeast(1)] = 2
    """Number of linear layers in the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the hidden layers of projector and predictor."""
    head_batch_norm: bool = False
    """Use batch normalization in projector and predictor (`trainer.sync_batchnorm` synchronizes it over devices)."""
    predictor: bool = False
    """Add two layers to the student."""
    queue_length: Annotated[int, AtLeast(0)] = 65536
    """Number of embeddings of previous batches used as negatives; 0 uses the other images of the batch."""
    symmetric: bool = False
    """Compare each global crop with the teacher's other one. False compares only the first with the second."""
    loss_scale: Annotated[float, Positive] = 1.0
    """Factor of the loss; version 3 uses 2 x `temperature`."""
    freeze_patch_embedding: bool = False
    """Keep the random initialization of a ViT's patch projection. Version 3 does so for stability."""
    teacher_momentum: Annotated[float, Share] = 0.999
    """Momentum of the teacher's weights at the first step, with `ema`."""
    teacher_momentum_end: Annotated[float, Share] = 0.999
    """Final momentum of the teacher's weights, at the end of a cosine schedule, with `ema`."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "student"
    """Network that k-NN evaluation, pictures and exported files use."""

    def check(self, config: Any) -> None:
        """`freeze_patch_embedding` needs a backbone with patches."""
        if self.freeze_patch_embedding and getattr(config.backbone, "patch_size", None) is None:
            raise UserError("method.freeze_patch_embedding=true: this network has no patches; set it to false.")


MOCO_3: dict[str, float | int | bool] = {
    "out_dim": 256,
    "head_layers": 3,
    "head_hidden_dim": 4096,
    "head_batch_norm": True,
    "predictor": True,
    "queue_length": 0,
    "symmetric": True,
    "loss_scale": 0.4,
    "teacher_momentum": 0.99,
    "teacher_momentum_end": 1.0,
}
"""Values that `method.version=3` sets, through the interpolations in `conf/method/moco.yaml`; the defaults are those
of version 2."""


@dataclass
class SwAVConfig(MethodConfig):
    """Swapping assignments between views (Caron et al., NeurIPS 2020): clusters as targets, no teacher."""

    dependent_keys: ClassVar[dict[str, tuple[str, str | int]]] = {"queue_start": ("queue_length", 3840)}

    out_dim: Annotated[int, AtLeast(2)] = 3000
    """Number of prototypes K."""
    head_layers: Annotated[int, AtLeast(1)] = 2
    """Number of linear layers in the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the projector's hidden layers."""
    head_bottleneck_dim: Annotated[int, AtLeast(1)] = 128
    """Width of the L2-normalized embedding that is compared with the prototypes."""
    head_batch_norm: bool = True
    """Use batch normalization in the projector (`trainer.sync_batchnorm` synchronizes it over devices)."""
    temperature: Annotated[float, Positive] = 0.1
    """Temperature of the softmax over prototypes."""
    sinkhorn_epsilon: Annotated[float, Positive] = 0.05
    """Temperature of the assignments (epsilon of Sinkhorn-Knopp)."""
    sinkhorn_iterations: Annotated[int, AtLeast(1)] = 3
    """Number of Sinkhorn-Knopp iterations."""
    queue_length: Annotated[int, AtLeast(0)] = 0
    """Number of embeddings of previous batches, over all devices, that take part in the assignment. For batches smaller
    than the number of prototypes (the original uses 3840)."""
    queue_start: Annotated[str, Duration] = "8%"
    """Time at the start of the run in which the queue stays empty (duration)."""
    freeze_prototypes: Annotated[str, Duration] = "1ep"
    """Time at the start of the run without a gradient for the prototypes (duration)."""


@dataclass
class SupervisedConfig(MethodConfig):
    """Classification with labels, on the same crops: the baseline of the paper's tables."""

    uses_labels: ClassVar[bool] = True

    label_smoothing: Annotated[float, ShareBelowOne] = 0.1
    """Share of the target that is spread over all classes."""
