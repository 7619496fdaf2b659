"""Every configuration key with its type, unit, default and allowed values, and the checks across keys.

Dataclasses say what exists; the YAML files under `conf/` say only what differs. The text below a field is its
documentation: `docs/configuration.md` is made from it. Defaults are those of the original DINO script (ViT-S/16, 100
epochs of ImageNet) wherever it has the option.

A *duration* is a string with a unit: `"10ep"` (epochs), `"500it"` (optimizer steps) or `"10%"` (of the run).
"""

import math
import os
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from dino_lightning.config.auto import AutoConfig
from dino_lightning.config.callbacks import (
    CallbacksConfig,
    CheckpointConfig,
    CollapseConfig,
    KNNConfig,
    NonfiniteConfig,
    PicturesConfig,
    PruningConfig,
)
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
from dino_lightning.config.embedding import EmbedConfig
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
from dino_lightning.config.export import ExportConfig
from dino_lightning.config.loggers import CSVLoggerConfig, LoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from dino_lightning.config.method import (
    MOCO_VERSIONS,
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


@dataclass
class TrainConfig:
    """One training run."""

    backbone: BackboneConfig = MISSING
    """The network."""
    method: MethodConfig = MISSING
    """What is learned."""
    crops: CropsConfig = field(default_factory=CropsConfig)
    """The augmentation."""
    data: DataConfig = MISSING
    """The images."""
    optim: OptimConfig = MISSING
    """Optimizer and schedules."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices, precision, length."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Speed and memory of a step."""
    logger: LoggerConfig = MISSING
    """Where metrics go besides `metrics.csv`."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Evaluation, checkpoints and pictures while training."""
    experiment: str = ""
    """Name of the experiment the settings come from (set by the file under `conf/experiment/`)."""
    imports: list[str] = field(default_factory=list)
    """Python files or modules with methods of your own (docs/new_method.md), imported first."""
    init_from: str | None = None
    """Start from the weights of a network: whatever `checkpoint` of an evaluation takes. It must be the network that
    `backbone` says; a position embedding for images of another size is resampled. The head starts anew."""
    init_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Which network of an `init_from` that holds several: `teacher` or `student`; null as for an evaluation."""
    auto: AutoConfig = field(default_factory=AutoConfig)
    """Settings chosen from the images and the machine."""
    output_dir: Annotated[str, FilePath] = MISSING
    """Folder of everything the run writes. With `--multirun`, the folder of the numbered runs."""
    seed: Annotated[int, Seed] = 0
    """Seed of weights, order of images, augmentation and drop path."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Threads of PyTorch where it trains on a CPU; null for all cores, but with crops below 96 pixels it leaves one to
    each loader process."""
    resume: Any = False
    """Go on from the last whole checkpoint in `output_dir`: `true`; `auto`, where there is one, and start otherwise.
    A run that SLURM, submitit or torchrun starts again is `auto` by itself."""
    collective_timeout_s: Annotated[int, AtLeast(1)] = 1800
    """Seconds that a rank waits for the others before it ends with an error."""


@dataclass
class EvaluateConfig:
    """One evaluation of one network: `dino eval`."""

    eval: EvaluationConfig = MISSING
    """What is measured."""
    checkpoint: str = MISSING
    """The network: a run's folder, its `.safetensors` or `.ckpt`, a `.pth` of the original, `timm:NAME` for
    timm's published weights, `hf:OWNER/NAME` or a folder for those of transformers, or `untrained:` before any of
    these, or before a file of `conf/backbone`, for fresh weights."""
    checkpoint_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Which network of a checkpoint that holds several: `teacher` or `student`; null for the one that the run
    evaluated, and for the teacher of files of another origin."""
    baseline: bool = False
    """Evaluate the same network with fresh weights, too."""
    data: ImagesConfig = MISSING
    """The images."""
    trainer: DevicesConfig = field(default_factory=DevicesConfig)
    """Devices and precision."""
    logger: LoggerConfig = MISSING
    """Where results go besides `results.jsonl`: `csv`, nowhere, or `wandb`."""
    output_dir: Annotated[str, FilePath] = MISSING
    """Folder of everything the evaluation writes; `results.jsonl` in it is appended to."""
    seed: Annotated[int, Seed] = 0
    """Seed of what is drawn: subsets, splits, fresh weights."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Threads of PyTorch on a CPU; null for one for each core, shared by the devices."""
    feature_cache: Annotated[str | None, FilePath] = "~/.cache/dino-lightning/features"
    """Folder in which extracted features are kept, by the content of weights and images; null keeps nothing."""


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
    """What a version sets, or less; an unknown version is refused with the other values."""
    return min(MOCO_VERSIONS.get(version, MOCO_VERSIONS[2])[key], at_most)


@cache  # once in a process: Hydra makes a copy of each schema
def register() -> None:
    """Put the dataclasses into Hydra's config store: as `GROUP/schema_OPTION`, from which files start, and as
    `GROUP/OPTION` if there is no such file; and the roots, such as `schema_evaluate`."""
    from dino_lightning.config.conf_dir import CONF  # imports this module

    OmegaConf.register_new_resolver("moco", of_moco_version, replace=True)
    OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)  # Hydra takes `~` for a name
    # Hydra copies the whole store, of which it copies again what it loads, for each configuration and for each group in
    # `--help`: a third of the time of the one, most of that of the other.
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
