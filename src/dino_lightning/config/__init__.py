"""Every configuration key, its default and its unit: the one place where options are described.

Dataclasses say what exists; the YAML files under `conf/` say only what differs. The text below a field is its
documentation: `docs/configuration.md` is made from it. Defaults are those of the original DINO script (ViT-S/16, 100
epochs of ImageNet) wherever it has the option.

A *duration* is a string with a unit: `"10ep"` (epochs), `"500it"` (optimizer steps) or `"10%"` (of the run).
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dino_lightning.config.around import (
    CallbacksConfig,
    CheckpointConfig,
    CSVLoggerConfig,
    KNNConfig,
    LoggerConfig,
    PicturesConfig,
    TensorBoardLoggerConfig,
    WandbLoggerConfig,
)
from dino_lightning.config.crops import CropsConfig
from dino_lightning.config.data import (
    TORCHVISION_NAMES,
    ArchiveData,
    BuiltinData,
    DataConfig,
    FolderData,
    HuggingFaceData,
    LandmarksData,
    ListingData,
    ParquetData,
    TorchvisionData,
    WebDatasetData,
)
from dino_lightning.config.model import (
    AdamWConfig,
    BackboneConfig,
    DINOConfig,
    LARSConfig,
    MethodConfig,
    OptimConfig,
    SGDConfig,
    TimmConfig,
    ViTConfig,
)
from dino_lightning.config.trainer import TrainerConfig

__all__ = [
    "SCHEMAS",
    "TORCHVISION_NAMES",
    "AdamWConfig",
    "ArchiveData",
    "BackboneConfig",
    "BuiltinData",
    "CSVLoggerConfig",
    "CallbacksConfig",
    "CheckpointConfig",
    "CropsConfig",
    "DINOConfig",
    "DataConfig",
    "FolderData",
    "HuggingFaceData",
    "KNNConfig",
    "LARSConfig",
    "LandmarksData",
    "ListingData",
    "LoggerConfig",
    "MethodConfig",
    "OptimConfig",
    "ParquetData",
    "PicturesConfig",
    "SGDConfig",
    "TensorBoardLoggerConfig",
    "TimmConfig",
    "TorchvisionData",
    "TrainConfig",
    "TrainerConfig",
    "ViTConfig",
    "WandbLoggerConfig",
    "WebDatasetData",
    "register",
]


@dataclass
class TrainConfig:
    """One training run."""

    backbone: BackboneConfig = MISSING
    """The network."""
    method: MethodConfig = MISSING
    """What is learnt."""
    crops: CropsConfig = field(default_factory=CropsConfig)
    """The augmentation."""
    data: DataConfig = MISSING
    """The images."""
    optim: OptimConfig = MISSING
    """Optimizer and schedules."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Devices, precision, length."""
    logger: LoggerConfig = MISSING
    """Where metrics go besides `metrics.csv`."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Evaluation, checkpoints and pictures while training."""
    experiment: str = ""
    """Name of the experiment the settings come from (set by the file under `conf/experiment/`)."""
    output_dir: str = MISSING
    """Folder of everything the run writes. With `--multirun`, the folder of the numbered runs."""
    seed: int = 0
    """Seed of weights, order of images, augmentation and drop path."""
    cpu_threads: int | None = None
    """Threads of PyTorch where it trains on a CPU; null leaves a core to each loader process, of at least one."""
    resume: bool = False
    """Go on from the last checkpoint in `output_dir`."""


SCHEMAS: dict[str, dict[str, Any]] = {
    "backbone": {"vit": ViTConfig, "timm": TimmConfig},
    "method": {"dino": DINOConfig},
    "crops": {"multicrop": CropsConfig},
    "data": {
        "builtin": BuiltinData,
        "folder": FolderData,
        "listing": ListingData,
        "landmarks": LandmarksData,
        "archive": ArchiveData,
        "parquet": ParquetData,
        "huggingface": HuggingFaceData,
        "webdataset": WebDatasetData,
        "torchvision": TorchvisionData,
    },
    "optim": {"adamw": AdamWConfig, "sgd": SGDConfig, "lars": LARSConfig},
    "trainer": {"lightning": TrainerConfig},
    "logger": {"csv": CSVLoggerConfig, "wandb": WandbLoggerConfig, "tensorboard": TensorBoardLoggerConfig},
    "callbacks": {"standard": CallbacksConfig},
}
"""Group -> schema name -> dataclass. A file `conf/GROUP/x.yaml` starts from its schema by `defaults: [schema_NAME]`."""


def register() -> None:
    """Put the schemas into Hydra's config store as `GROUP/schema_NAME`, and the root as `schema`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"schema_{name}", node=schema)
