"""The two sides of `step.py`: the original's training loop and ours, each in a process of its own.

A side builds its networks and starts its real loop: `main_dino.train_one_epoch` (`step_original.py`), or Lightning's
trainer as `train.py` builds it. The loop's loader is a `Windows`: it waits for a command, hands out so many batches,
and tells how long the loop took from the first one until it asked for another.
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
from step_windows import EPOCHS, Setting, Windows, noise_crops, signal_workers

SIDES = ("ours", "original")


def serve(side: str, setting: Setting, checkout: str | None, pipe: Connection) -> None:
    """Be one side until the other end of the pipe says stop or is gone. Meant for a new process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            windows = Windows(pipe, setting)
            if side == "original":
                from step_original import run_original

                assert checkout is not None
                run_original(setting, windows, checkout=checkout)
            else:
                run_ours(setting, windows, folder=Path(folder))
    except (EOFError, BrokenPipeError):
        signal_workers(signal.SIGCONT)  # they could not end otherwise
    except BaseException as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        pipe.send(("out of memory", str(error)) if memory else ("failed", traceback.format_exc()))


def compose_ours(setting: Setting, *, output_dir: Path) -> Any:
    """The configuration of `train.py` for this setting, composed by Hydra."""
    from hydra import compose, initialize_config_dir

    from dino_lightning.cli.overrides import register_timm_networks
    from dino_lightning.config import register
    from dino_lightning.config.conf_dir import CONF

    data = ["data=builtin"]
    if setting.data is not None:
        data = ["data=folder", f"data.path={setting.data}", "data.holdout=0", f"data.cache_dir={output_dir}"]
    words = [
        "experiment=resnet50" if setting.convolutional else "experiment=vits16_100ep",
        f"backbone={setting.backbone}",
        *([] if setting.convolutional else [f"backbone.patch_size={setting.patch}"]),
        *data,
        f"data.batch_size_per_device={setting.batch}",
        f"data.num_workers={setting.workers}",
        "crops.backend=cpu",
        f"crops.local_count={setting.local_crops}",
        f"method.out_dim={setting.prototypes}",
        "method.freeze_last_layer=0ep",  # as in all epochs but the first
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
    register_timm_networks(words)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=words)


def configured(setting: Setting, *, output_dir: Path) -> Any:
    """The checked `TrainConfig`."""
    from dino_lightning.training import preflight

    config = preflight.typed_config(compose_ours(setting, output_dir=output_dir))
    preflight.check_combinations(config)
    return config


def run_ours(setting: Setting, windows: Windows, *, folder: Path) -> None:
    """Our LightningModule under the trainer that `train.py` would build."""
    from dino_lightning.training.build import build_data

    config = configured(setting, output_dir=folder)
    trainer, method = trainer_and_method(config)
    windows.facts["flops"] = model_flops(config.backbone, crops=config.crops, method=config.method)
    if setting.data is None:
        windows.batches = repeat(noise_crops(setting))
        trainer.fit(method, train_dataloaders=windows)
        return
    data = build_data(config)
    windows.batches = cast(Any, data.train_dataloader())
    data.train_dataloader = lambda: windows  # type: ignore[method-assign,return-value]
    trainer.fit(method, datamodule=data)


def trainer_and_method(config: Any) -> tuple[Any, Any]:
    """What `dino_lightning.training.run` builds, after the settings of the process that it makes."""
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
