"""The arguments of `lightning.Trainer` (training) and `lightning.Fabric` (evaluation): `trainer`.

They are written out so that a typo is refused by name and each has its unit; a test holds them against the signature
of the installed Lightning. Missing on purpose are `logger` and `callbacks` (groups of their own), `default_root_dir`
(it is `output_dir`) and `gradient_clip_val` / `gradient_clip_algorithm` (the original clips each tensor by itself:
`optim.clip_grad`).
"""

from dataclasses import dataclass
from typing import Annotated, Any

from dino_lightning.config.ranges import AtLeast, OneOf, Range

Batches = Range(
    "a number of batches of at least 1, or a share of them above 0 and up to 1",
    lambda value: isinstance(value, int | float) and value > 0 and (isinstance(value, int) or value <= 1),
)
BatchesOrNone = Range(
    f"0 for no limit, {Batches.expected}", lambda value: value in (0, False) or Batches.contains(value)
)
DevRun = Range("true, false or a number of batches", lambda value: isinstance(value, int) and value >= 0)


@dataclass
class DevicesConfig:
    """Devices and precision of an evaluation, passed on to `lightning.Fabric`."""

    accelerator: Annotated[str, OneOf("auto", "cpu", "gpu", "cuda", "mps")] = "auto"
    """`auto`, `cpu`, `gpu`, `mps` or another of Lightning's accelerators."""
    devices: Any = "auto"
    """Devices per node: a number, a list of indices or `auto`."""
    num_nodes: Annotated[int, AtLeast(1)] = 1
    """Machines."""
    strategy: Annotated[str, OneOf("auto", "ddp")] = "auto"
    """`auto` or `ddp`."""
    precision: Annotated[Any, OneOf("32", "32-true", "16-mixed", "bf16-mixed")] = "32"
    """`32`, `bf16-mixed` or `16-mixed`. Features are kept in float32."""
    enable_progress_bar: bool = True
    """Show the progress bar."""


@dataclass
class TrainerConfig:
    """Devices, precision and length of the run, passed on to `lightning.Trainer`."""

    accelerator: Annotated[str, OneOf("auto", "cpu", "gpu", "cuda", "mps", "tpu", "hpu", "xpu")] = "auto"
    """`auto`, `cpu`, `gpu`, `mps` or another of Lightning's accelerators."""
    devices: Any = "auto"
    """Devices per node: a number, a list of indices or `auto`."""
    num_nodes: Annotated[int, AtLeast(1)] = 1
    """Machines."""
    strategy: Annotated[str, OneOf("auto", "ddp", "ddp_notebook", "ddp_find_unused_parameters_true", "fsdp")] = "auto"
    """`auto`, `ddp`, `fsdp` (weights spread over the devices, for networks too large for one; with `precision`
    `bf16-mixed` or `32`) or another of Lightning's strategies."""
    precision: Annotated[Any, OneOf("32", "32-true", "16-mixed", "bf16-mixed", "64", "64-true")] = "16-mixed"
    """`32`, `bf16-mixed`, `16-mixed` or `64`; weights are never kept in half precision."""
    max_epochs: int | None = 100
    """Length of the run (epochs); the schedules span it. -1 for a run given in `max_steps`."""
    max_steps: int = -1
    """Length of the run (optimizer steps), where it ends before `max_epochs`; -1 for no limit."""
    min_epochs: int | None = None
    """Fewest epochs, whatever asks to stop earlier."""
    min_steps: int | None = None
    """Fewest optimizer steps, whatever asks to stop earlier."""
    max_time: Any = None
    """Time limit (`DD:HH:MM:SS`); the schedules do not know of it."""
    accumulate_grad_batches: Annotated[int, AtLeast(1)] = 1
    """Micro-batches per optimizer step."""
    sync_batchnorm: bool = True
    """Share batch-norm statistics over devices, as the original does where a network has batch norms."""
    use_distributed_sampler: bool = True
    """Give each device its own part of an epoch."""
    limit_train_batches: Annotated[Any, Batches] = None
    """Most micro-batches per epoch and device: a number, or a share as a float."""
    limit_val_batches: Any = None
    """Most validation batches (there are none in this package's methods; k-NN has its own limits)."""
    limit_test_batches: Any = None
    """Most test batches (for methods of your own)."""
    limit_predict_batches: Any = None
    """Most prediction batches (for methods of your own)."""
    overfit_batches: Annotated[Any, BatchesOrNone] = 0.0
    """Train on this many fixed batches only, for debugging: a number, or a share as a float."""
    val_check_interval: Any = None
    """Batches between validations (for methods of your own)."""
    check_val_every_n_epoch: int | None = 1
    """Epochs between validations (for methods of your own)."""
    num_sanity_val_steps: int | None = None
    """Validation batches tried before training (for methods of your own)."""
    reload_dataloaders_every_n_epochs: int = 0
    """Epochs between rebuilding the loaders; 0 never."""
    log_every_n_steps: Annotated[int, AtLeast(1)] = 10
    """Optimizer steps between rows of the logs."""
    fast_dev_run: Annotated[Any, DevRun] = False
    """Run this many batches and nothing else, for debugging."""
    enable_checkpointing: bool = True
    """Write `checkpoints/`."""
    enable_progress_bar: bool = True
    """Show the progress bar."""
    enable_model_summary: bool = False
    """Print Lightning's table of layers."""
    deterministic: Annotated[Any, OneOf(True, False, "warn")] = None
    """Only deterministic kernels: true, false or `warn`."""
    benchmark: bool | None = True
    """Let cuDNN pick its fastest kernels by trying them, as the original does."""
    inference_mode: bool = True
    """Evaluate under `torch.inference_mode`."""
    detect_anomaly: bool = False
    """PyTorch's anomaly detection (slow)."""
    profiler: str | None = None
    """`simple`, `advanced` or `pytorch`."""
    plugins: Any = None
    """Lightning plugins, by name."""
    barebones: bool = False
    """Lightning without logs, bar and checkpoints, to measure overhead."""
    enable_autolog_hparams: bool = True
    """Let Lightning log hyper-parameters (the whole configuration is logged in any case)."""
    model_registry: str | None = None
    """Lightning's model registry."""
