"""What is learned from the crops: `method`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from dino_lightning.config.model import ViTConfig
from dino_lightning.config.ranges import AtLeast, Duration, OneOf, Pair, Positive, Share, ShareBelowOne
from dino_lightning.errors import UserError


@dataclass
class MethodConfig:
    """What is learned from the crops; one of the children below."""

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
    """Of every method whose targets come from a teacher, a second network that follows the student."""

    teacher_update: Annotated[str, OneOf("ema", "copy_each_step", "previous_step", "copy_each_epoch")] = "ema"
    """How the teacher follows: `ema`, a moving average; `copy_each_step`, the student itself; `previous_step`, the
    student of one step before; `copy_each_epoch`, the student of the last epoch's end."""
    teacher_momentum: Annotated[float, Share] = 0.996
    """With `ema`, momentum of the teacher's weights at the first step (use 0.9995 at a total batch of 256)."""
    teacher_momentum_end: Annotated[float, Share] = 1.0
    """With `ema`, momentum of the teacher's weights that the cosine goes towards."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "teacher"
    """Network that k-NN, pictures and the exported file are of: `teacher` or `student`."""


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
    """Number of prototypes K: width of the head's output."""
    head_layers: Annotated[int, AtLeast(1)] = 3
    """Linear layers of the head's MLP before the L2 bottleneck."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the MLP's hidden layers."""
    head_bottleneck_dim: Annotated[int, AtLeast(1)] = 256
    """Width of the L2-normalized bottleneck."""
    head_l2_bottleneck: bool = True
    """Normalize the bottleneck's output to length 1 before the prototypes."""
    head_batch_norm: bool = False
    """Batch normalization in the head's MLP (synchronized over devices by `trainer.sync_batchnorm`)."""
    head_activation: Annotated[str, OneOf("gelu", "relu")] = "gelu"
    """Activation in the head's MLP: `gelu` or `relu`."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit norm. False learns better but can be unstable."""
    freeze_last_layer: Annotated[str, Duration] = "1ep"
    """Duration at the start of the run in which the prototypes get no gradient (duration; whole epochs or steps)."""
    predictor: bool = False
    """Two further layers in the student alone, between the bottleneck and its normalization."""
    loss: Annotated[str, OneOf("cross_entropy", "mse")] = "cross_entropy"
    """`cross_entropy` between the two distributions, or `mse` between the outputs at length 1, as in BYOL; without
    temperatures then."""
    student_temperature: Annotated[float, Positive] = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: Annotated[float, Positive] = 0.04
    """Temperature of the teacher's softmax after its warm-up. Above 0.07 most runs collapse."""
    teacher_temperature_start: Annotated[float, Positive] = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    teacher_temperature_warmup: Annotated[str, Duration] = "0ep"
    """Linear warm-up of the teacher's temperature (duration; in `ep` it changes once an epoch, as in the original)."""
    centering: Annotated[str, OneOf("center", "sinkhorn", "softmax", "none")] = "center"
    """What keeps the teacher from giving everything to one prototype. `center` subtracts a running mean; `sinkhorn`
    shares the batch out evenly (Sinkhorn-Knopp); `softmax` does so in one iteration, a softmax over the batch; `none`
    leaves it."""
    center_momentum: Annotated[float, Share] = 0.9
    """With `center`, its momentum: share of the old center kept at each optimizer step."""
    sinkhorn_iterations: Annotated[int, AtLeast(1)] = 3
    """Iterations of `sinkhorn`."""
    koleo_weight: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the KoLeo regulariser, which spreads the student's features of the global crops (DINOv2: 0.1)."""
    patch_loss_weight: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the loss on masked patches of the global crops (iBOT; there 1). Needs a ViT of `conf/backbone`."""
    mask_p: Annotated[float, Share] = 0.5
    """Probability that a global crop is masked for the student, where `patch_loss_weight` is above 0."""
    mask_share: Annotated[list[float], Pair(1, of="shares of the image")] = field(default_factory=lambda: [0.1, 0.5])
    """Smallest and largest share of the patches of a masked crop that is masked."""

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
    """Linear layers of the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 4096
    """Width of the hidden layers of projector and predictor."""
    head_batch_norm: bool = True
    """Batch normalization in projector and predictor (synchronized over devices by `trainer.sync_batchnorm`)."""
    predictor: bool = True
    """Two further layers in the student alone. Without them the paper's run collapses."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "student"
    """Network that k-NN, pictures and the exported file are of: `teacher` or `student`."""


@dataclass
class MoCoConfig(TeacherConfig):
    """Momentum contrast (He et al. 2020; version 2: Chen et al. 2020; version 3: Chen et al., ICCV 2021)."""

    version: Annotated[int, OneOf(2, 3)] = 2
    """2 takes negatives from a queue, 3 from the batches of all devices and has a predictor. On the command line it
    sets the keys from `out_dim` to `symmetric` and the teacher's momentum, each of which can be set by itself."""
    temperature: Annotated[float, Positive] = 0.2
    """Temperature of the similarities."""
    out_dim: Annotated[int, AtLeast(2)] = 128
    """Width of the embedding."""
    head_layers: Annotated[int, AtLeast(1)] = 2
    """Linear layers of the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the hidden layers of projector and predictor."""
    head_batch_norm: bool = False
    """Batch normalization in projector and predictor (synchronized over devices by `trainer.sync_batchnorm`)."""
    predictor: bool = False
    """Two further layers in the student alone."""
    queue_length: Annotated[int, AtLeast(0)] = 65536
    """Embeddings of former batches that serve as negatives; 0 takes the other images of the batch."""
    symmetric: bool = False
    """Each global crop is compared with the teacher's other one; false: the first with the second only."""
    loss_scale: Annotated[float, Positive] = 1.0
    """Factor of the loss; version 3 has 2 x `temperature`."""
    freeze_patch_embedding: bool = False
    """Leave the patch projection of a ViT at its random start, which version 3 does for stability."""
    teacher_momentum: Annotated[float, Share] = 0.999
    """With `ema`, momentum of the teacher's weights at the first step."""
    teacher_momentum_end: Annotated[float, Share] = 0.999
    """With `ema`, momentum of the teacher's weights that the cosine goes towards."""
    evaluate: Annotated[str, OneOf("teacher", "student")] = "student"
    """Network that k-NN, pictures and the exported file are of: `teacher` or `student`."""

    def check(self, config: Any) -> None:
        """`freeze_patch_embedding` needs a backbone with patches."""
        if self.freeze_patch_embedding and getattr(config.backbone, "patch_size", None) is None:
            raise UserError("method.freeze_patch_embedding=true: this network has no patches; set it to false.")


MOCO_VERSIONS: dict[int, dict[str, float | int | bool]] = {
    2: {
        "out_dim": 128,
        "head_layers": 2,
        "head_hidden_dim": 2048,
        "head_batch_norm": False,
        "predictor": False,
        "queue_length": 65536,
        "symmetric": False,
        "loss_scale": 1.0,
        "teacher_momentum": 0.999,
        "teacher_momentum_end": 0.999,
    },
    3: {
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
    },
}
"""What `method.version` sets, through the interpolations of `conf/method/moco.yaml`."""


@dataclass
class SwAVConfig(MethodConfig):
    """Swapping assignments between views (Caron et al., NeurIPS 2020): clusters as targets, no teacher."""

    dependent_keys: ClassVar[dict[str, tuple[str, str | int]]] = {"queue_start": ("queue_length", 3840)}

    out_dim: Annotated[int, AtLeast(2)] = 3000
    """Number of prototypes K."""
    head_layers: Annotated[int, AtLeast(1)] = 2
    """Linear layers of the projector."""
    head_hidden_dim: Annotated[int, AtLeast(1)] = 2048
    """Width of the projector's hidden layers."""
    head_bottleneck_dim: Annotated[int, AtLeast(1)] = 128
    """Width of the L2-normalized embedding that is compared with the prototypes."""
    head_batch_norm: bool = True
    """Batch normalization in the projector (synchronized over devices by `trainer.sync_batchnorm`)."""
    temperature: Annotated[float, Positive] = 0.1
    """Temperature of the softmax over prototypes."""
    sinkhorn_epsilon: Annotated[float, Positive] = 0.05
    """Temperature of the assignments."""
    sinkhorn_iterations: Annotated[int, AtLeast(1)] = 3
    """Iterations of Sinkhorn-Knopp."""
    queue_length: Annotated[int, AtLeast(0)] = 0
    """Embeddings of former batches, over all devices, that take part in the assignment; for batches smaller than the
    number of prototypes (the original: 3840)."""
    queue_start: Annotated[str, Duration] = "8%"
    """Duration at the start of the run in which the queue stays empty (duration)."""
    freeze_prototypes: Annotated[str, Duration] = "1ep"
    """Duration at the start of the run in which the prototypes get no gradient (duration)."""


@dataclass
class SupervisedConfig(MethodConfig):
    """Classification with labels, on the same crops: the baseline of the paper's tables."""

    uses_labels: ClassVar[bool] = True

    label_smoothing: Annotated[float, ShareBelowOne] = 0.1
    """Share of the target that is spread over all classes."""
