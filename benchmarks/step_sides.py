"""The two sides of `step.py`: the original's training loop and ours, each in its own process.

A side builds its networks and starts its real training loop: `main_dino.train_one_epoch` (`step_original.py`), or
Lightning's trainer as `train.py` builds it. The loop's data loader is a `TimedBatches`: it waits for a command, yields
the requested number of batches, and reports the time from the first of them until the loop asks for the next one.
"""

import contextlib
import io
import signal
import tempfile
import traceback
import warnings
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from flops import model_flops
from step_batches import EPOCHS, Setting, TimedBatches, noise_crops, signal_workers

SIDES = ("ours", "original")


def serve(side: str, setting: Setting, checkout: str | None, pipe: Connection) -> None:
    """Run one side in a new process until the other end of the pipe sends `stop` or is closed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            batches = TimedBatches(pipe, setting)
            if side == "original":
                from step_original import run_original

                assert checkout is not None
                run_original(setting, batches, checkout=checkout)
            else:
                run_ours(setting, batches, folder=Path(folder))
    except (EOFError, BrokenPipeError):
        signal_workers(signal.SIGCONT)  # stopped processes cannot exit
    except BaseException as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        pipe.send(("out of memory", str(error)) if memory else ("failed", traceback.format_exc()))


def compose_ours(setting: Setting, *, output_dir: Path) -> Any:
    """Compose the configuration of `train.py` for this setting."""
    from hydra import compose, initialize_config_dir

    from dino_lightning.cli.overrides import register_timm_networks
    from dino_lightning.config import register
    from dino_lightning.runtime.files import CONF

    data = ["data=builtin"]
    if setting.data is not None:
        data = ["data=folder", f"data.path={setting.data}", "data.holdout=0", f"data.cache_dir={output_dir}"]
    overrides = [
        "experiment=resnet50" if setting.convolutional else "experiment=vits16_100ep",
        f"backbone={setting.backbone}",
        *([] if setting.convolutional else [f"backbone.patch_size={setting.patch}"]),
        *data,
        f"data.batch_size_per_device={setting.batch}",
        f"data.num_workers={setting.workers}",
        "crops.backend=cpu",
        f"crops.local_count={setting.local_crops}",
        f"method.out_dim={setting.prototypes}",
        "method.freeze_last_layer=0ep",  # as in all epochs except the first
        f"trainer.accelerator={'gpu' if setting.device == 'cuda' else 'cpu'}",
        "trainer.devices=1",
        f"trainer.precision={'bf16-mixed' if setting.precision == 'bf16' else '32'}",
        f"trainer.max_epochs={EPOCHS}",
        "trainer.enable_progress_bar=false",
        "trainer.enable_checkpointing=false",
        "callbacks.knn.enabled=false",
        "callbacks.pictures.enabled=false",
        f"compute.matmul_precision={'high' if setting.precision == 'tf32' else 'highest'}",
        f"output_dir={output_dir}",
        *setting.overrides,
    ]
    register()
    register_timm_networks(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=overrides)


def configured(setting: Setting, *, output_dir: Path) -> Any:
    """The `TrainConfig` of this setting, after the checks of settings."""
    from dino_lightning.training import preflight

    config = preflight.typed_config(compose_ours(setting, output_dir=output_dir))
    preflight.check_combinations(config)
    return config


def run_ours(setting: Setting, batches: TimedBatches, *, folder: Path) -> None:
    """Train our LightningModule with the trainer that `train.py` builds."""
    from dino_lightning.training.build import build_data

    config = configured(setting, output_dir=folder)
    trainer, method = trainer_and_method(config)
    batches.facts["flops"] = model_flops(config.backbone, crops=config.crops, method=config.method)
    if setting.data is None:
        batches.source = repeat(noise_crops(setting))
        trainer.fit(method, train_dataloaders=batches)
        return
    data = build_data(config)
    batches.source = cast(Any, data.train_dataloader())
    data.train_dataloader = lambda: batches  # type: ignore[method-assign,return-value]
    trainer.fit(method, datamodule=data)


def trainer_and_method(config: Any) -> tuple[Any, Any]:
    """The trainer and the method of `dino_lightning.training.run`, with the same settings of the process."""
    from dino_lightning.runtime.console import quieten_libraries
    from dino_lightning.runtime.memory import keep_freed_memory
    from dino_lightning.training.build import build_method, build_trainer
    from dino_lightning.training.resources import trains_in_tiles

    quieten_libraries()
    torch.set_float32_matmul_precision(config.compute.matmul_precision)
    method = build_method(config)
    if config.trainer.accelerator == "cpu" and trains_in_tiles(config, method):
        keep_freed_memory()
    return build_trainer(config, hyperparameters={}), method
