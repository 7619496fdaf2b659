"""Every configuration key with its type, unit, default and allowed values, and the checks across keys.

Dataclasses declare the keys; the YAML files under `conf/` only change values. The text below a field is its
documentation, from which `docs/configuration.md` is generated. Defaults are those of the original DINO script
(ViT-S/16, 100 epochs of ImageNet) if it has the option.

A *duration* is a string with a unit: `"10ep"` (epochs), `"500it"` (optimizer steps) or `"10%"` (of the run).
"""

import math
import os
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from dino_lightning.config.callbacks import (
    CallbacksConfig,
    CheckpointConfig,
    CollapseConfig,
    KNNConfig,
    NonfiniteConfig,
    PicturesConfig,
    PruningConfig,
)
from dino_lightning.config.commands import EmbedConfig, EvaluateConfig, ExportConfig
from dino_lightning.config.compute import ComputeConfig
from dino_lightning.config.crops import CropsConfig
from dino_lightning.config.data import (
    TORCHVISION_NAMES,
    ArchiveData,
    BuiltinData,
    DataConfig,
    FolderData,
    HuggingFaceData,
    ImagesConfig,
    LandmarksData,
    ListingData,
    ParquetData,
    TorchvisionData,
    WebDatasetData,
)
from dino_lightning.config.evaluation import (
    AttentionEval,
    BenchmarkData,
    ClassificationEval,
    CopydaysData,
    CopyDetectionEval,
    DavisData,
    EvaluationConfig,
    FinetuneEval,
    KNNEval,
    LinearEval,
    LinearGridEval,
    LogisticEval,
    NeighborsEval,
    PicturesData,
    RetrievalEval,
    RevisitedData,
    VideoEval,
    VOCData,
)
from dino_lightning.config.loggers import CSVLoggerConfig, LoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from dino_lightning.config.method import (
    MOCO_3,
    BYOLConfig,
    DINOConfig,
    MethodConfig,
    MoCoConfig,
    SupervisedConfig,
    SwAVConfig,
    TeacherConfig,
)
from dino_lightning.config.model import (
    AdamWConfig,
    BackboneConfig,
    LARSConfig,
    OptimConfig,
    SGDConfig,
    TimmConfig,
    ViTConfig,
)
from dino_lightning.config.ranges import AtLeast, FilePath, OneOf, Seed
from dino_lightning.config.trainer import DevicesConfig, TrainerConfig
from dino_lightning.runtime.files import CONF


@dataclass
class AutoConfig:
    """Settings that are chosen automatically. Keys on the command line always win."""

    data: bool = False
    """Set prototypes, momentum, temperature, learning rate and crops from the number and size of the images
    (docs/small_data.md)."""
    machine: bool = False
    """Set run length, batch size, loader processes, precision, the image cache and k-NN evaluation from this machine
    and the number of images (docs/small_data.md). A batch that does not fit into the GPU's memory is split into
    micro-batches. `data.path=…` without `data=` and `experiment=` turns this on."""


@dataclass
class TrainConfig:
    """One training run."""

    backbone: BackboneConfig = MISSING
    """The network."""
    method: MethodConfig = MISSING
    """The training method."""
    crops: CropsConfig = field(default_factory=CropsConfig)
    """The augmentation."""
    data: DataConfig = MISSING
    """The images."""
    optim: OptimConfig = MISSING
    """Optimizer and schedules."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices, precision and length of the run."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Speed and memory of a training step."""
    logger: LoggerConfig = MISSING
    """Where metrics go besides `metrics.csv`."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Evaluation, checkpoints and pictures during training."""
    experiment: str = ""
    """Name of the experiment. The file under `conf/experiment/` sets it."""
    imports: list[str] = field(default_factory=list)
    """Python files or modules with your own methods (docs/new_method.md). They are imported first."""
    init_from: str | None = None
    """Network whose weights initialize the backbone, in any form that `checkpoint` of an evaluation accepts. It must
    have the architecture of `backbone`; a position embedding for another image size is resampled. The head is
    initialized randomly."""
    init_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Network to use if `init_from` contains both; null chooses as an evaluation does."""
    auto: AutoConfig = field(default_factory=AutoConfig)
    """Settings that are chosen automatically."""
    output_dir: Annotated[str, FilePath] = MISSING
    """Output folder of the run. With `--multirun`, the folder of the numbered runs."""
    seed: Annotated[int, Seed] = 0
    """Random seed of the weights, the order of the images, the augmentation and drop path."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Number of PyTorch threads for training on a CPU; null uses all cores, minus one per loader process if the crops
    are smaller than 96 pixels."""
    resume: Any = False
    """`true` continues from the latest valid checkpoint in `output_dir`; `auto` does so if there is one, and otherwise
    starts a new run. A run that SLURM, submitit or torchrun restarts uses `auto` without this setting."""
    collective_timeout_s: Annotated[int, AtLeast(1)] = 1800
    """Time that a rank waits for the others before it ends with an error (seconds)."""


SCHEMAS: dict[str, dict[str, Any]] = {
    "backbone": {"vit_small": ViTConfig, "timm": TimmConfig},
    "method": {
        "dino": DINOConfig,
        "byol": BYOLConfig,
        "moco": MoCoConfig,
        "swav": SwAVConfig,
        "supervised": SupervisedConfig,
    },
    "crops": {"pil": CropsConfig},
    "data": {
        "builtin": BuiltinData,
        "folder": FolderData,
        "listing": ListingData,
        "gldv2": LandmarksData,
        "archive": ArchiveData,
        "parquet": ParquetData,
        "huggingface": HuggingFaceData,
        "webdataset": WebDatasetData,
        "torchvision": TorchvisionData,
        "revisited": RevisitedData,
        "copydays": CopydaysData,
        "davis": DavisData,
        "voc": VOCData,
        "pictures": PicturesData,
    },
    "optim": {"adamw": AdamWConfig, "sgd": SGDConfig, "lars": LARSConfig},
    "trainer": {"default": TrainerConfig, "devices": DevicesConfig},
    "compute": {"default": ComputeConfig},
    "logger": {"csv": CSVLoggerConfig, "wandb": WandbLoggerConfig, "tensorboard": TensorBoardLoggerConfig},
    "callbacks": {"standard": CallbacksConfig},
    "eval": {
        "knn": KNNEval,
        "linear": LinearEval,
        "linear_grid": LinearGridEval,
        "logistic": LogisticEval,
        "finetune": FinetuneEval,
        "retrieval": RetrievalEval,
        "copy_detection": CopyDetectionEval,
        "video": VideoEval,
        "attention": AttentionEval,
        "neighbors": NeighborsEval,
    },
}
"""Group -> option -> dataclass. A file `conf/GROUP/OTHER.yaml` extends one with `defaults: [schema_OPTION]`."""


def of_moco_version(version: int, key: str, at_most: float = math.inf) -> float | int | bool:
    """The value that a version sets, at most `at_most`. The range check refuses an unknown version later."""
    return min(MOCO_3[key] if version == 3 else getattr(MoCoConfig, key), at_most)


@cache
def register() -> None:
    """Put the dataclasses into Hydra's config store: as `GROUP/schema_OPTION`, from which files start, and as
    `GROUP/OPTION` if there is no such file; and the roots, such as `schema_evaluate`."""
    OmegaConf.register_new_resolver("moco", of_moco_version, replace=True)
    OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)  # Hydra does not expand `~`
    # Hydra deep-copies the whole store for each configuration and for each group in `--help`, and copies again what it
    # loads. The first copy takes a third of the time of composing and most of the time of `--help`.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    store.store(name="schema_evaluate", node=EvaluateConfig)
    store.store(name="schema_export", node=ExportConfig)
    store.store(name="schema_embed", node=EmbedConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"schema_{name}", node=schema)
            if not (CONF / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node=schema)
