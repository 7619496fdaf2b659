"""What stands where in the view: sections from the top down, and their charts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer steps, or pictures with a slider over time."""

    title: str
    names: tuple[str, ...]
    """Names under which they are logged."""
    log: bool = False
    """Whether the vertical axis is logarithmic."""
    pictures: bool = False


@dataclass(frozen=True)
class Section:
    """Charts that belong together."""

    title: str
    charts: tuple[Chart, ...]
    is_open: bool = True
    """Whether the charts are shown before anybody asks for them."""


SECTIONS = (
    Section(
        "Loss and k-NN",
        (
            Chart("Loss", ("train/loss_epoch", "train/loss")),
            Chart("k-NN top-1 (%)", ("knn/top1",)),
            Chart("k-NN top-5 (%)", ("knn/top5",)),
        ),
    ),
    Section(
        "Schedules",
        (
            Chart("Learning rate", ("schedule/lr",)),
            Chart("Weight decay", ("schedule/weight_decay",)),
            Chart("Momentum of the teacher", ("schedule/teacher_momentum",)),
            Chart("Temperature of the teacher", ("schedule/teacher_temperature",)),
        ),
        is_open=False,
    ),
    Section(
        "Collapse",
        (
            Chart("Entropy of the teacher (nats)", ("collapse/mean_output_entropy", "collapse/teacher_entropy")),
            Chart("Teacher against student (nats)", ("collapse/teacher_student_kl",), log=True),
            Chart("Mean output against uniform (nats)", ("collapse/kl_to_uniform",)),
            Chart("Dead prototypes (share)", ("collapse/dead_prototypes",)),
            Chart("Spread of the features", ("collapse/feature_std",)),
            Chart("Effective rank of the features", ("collapse/effective_rank",)),
            Chart("Length of the centre", ("collapse/center_norm",)),
            Chart("Alarm", ("collapse/alarm",)),
        ),
    ),
    Section(
        "Speed",
        (
            Chart("Images per second", ("speed/images_per_second",)),
            Chart("Share of time spent waiting for data", ("speed/data_wait_share",)),
            Chart("Model FLOPs utilisation (share of the peak)", ("speed/mfu",)),
            Chart("GPU memory, most in use (GiB)", ("speed/gpu_memory_gib",)),
        ),
    ),
    Section(
        "Pictures",
        (
            Chart("Attention", ("pictures/attention",), pictures=True),
            Chart("Principal components of the patches", ("pictures/pca",), pictures=True),
            Chart("Nearest neighbours", ("pictures/neighbours",), pictures=True),
            Chart("Crops", ("pictures/crops",), pictures=True),
        ),
    ),
    Section(
        "Norms",
        (
            Chart("Gradient, before clipping", ("norm/gradient",), log=True),
            Chart("Weights", ("norm/student", "norm/teacher")),
            Chart("Steps that were not finite", ("nonfinite/steps",)),
            Chart("Loss scale of fp16", ("amp/scale",), log=True),
        ),
        is_open=False,
    ),
    Section(
        "System",
        (
            Chart("GPU in use (%)", ("system/gpu.0.gpu",)),
            Chart("GPU memory (%)", ("system/gpu.0.memoryAllocated",)),
            Chart("CPU (%)", ("system/cpu",)),
            Chart("Memory of the process (MB)", ("system/proc.memory.rssMB",)),
        ),
        is_open=False,
    ),
)
"""W&B itself logs `system/...`."""
