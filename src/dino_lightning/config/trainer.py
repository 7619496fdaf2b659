"""The arguments of `lightning.Trainer` (training) and `lightning.Fabric` (evaluation): `trainer`.

They are listed so that a typo is refused by name and each has its unit; a test compares them with the signature of the
installed Lightning. Left out on purpose are `logger` and `callbacks` (separate groups), `default_root_dir`
(`output_dir`) and `gradient_clip_val` / `gradient_clip_algorithm` (`optim.clip_grad` clips each tensor separately, as
in the original).
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
    """Type of device; `auto` uses a GPU if there is one."""
    devices: Any = "auto"
    """Devices per node: a number, a list of indices, or `auto` for all."""
    num_nodes: Annotated[int, AtLeast(1)] = 1
    """Number of machines."""
    strategy: Annotated[str, OneOf("auto", "ddp")] = "auto"
    """How several devices work together."""
    precision: Annotated[Any, OneOf("32", "32-true", "16-mixed", "bf16-mixed")] = "32"
    """Precision of the forward pass; features are always float32."""
    enable_progress_bar: bool = True
    """Show the progress bar."""


@dataclass
class TrainerConfig:
    """Devices, precision and length of the run, passed on to `lightning.Trainer`."""

    accelerator: Annotated[str, OneOf("auto", "cpu", "gpu", "cuda", "mps", "tpu", "hpu", "xpu")] = "auto"
    """Type of device; `auto` uses a GPU if there is one."""
    devices: Any = "auto"
    """Devices per node: a number, a list of indices, or `auto` for all."""
    num_nodes: Annotated[int, AtLeast(1)] = 1
    """Number of machines."""
    strategy: Annotated[str, OneOf("auto", "ddp", "ddp_notebook", "ddp_find_unused_parameters_true", "fsdp")] = "auto"
    """How several devices work together; `fsdp` distributes the weights over the devices, for networks that are too
    large for one (with `precision` `bf16-mixed` or `32`)."""
    precision: Annotated[Any, OneOf("32", "32-true", "16-mixed", "bf16-mixed", "64", "64-true")] = "16-mixed"
    """Precision of the forward and backward pass; weights are never in half precision."""
    max_epochs: int | None = 100
    """Length of the run (epochs), which the schedules span; -1 if `max_steps` gives the length."""
    max_steps: int = -1
    """Largest number of optimizer steps; the run ends there before `max_epochs`. -1 sets no limit."""
    min_epochs: int | None = None
    """Minimum number of epochs; overrides early stopping."""
    min_steps: int | None = None
    """Minimum number of optimizer steps; overrides early stopping."""
    max_time: Any = None
    """Time limit (`DD:HH:MM:SS`), which does not change the schedules."""
    accumulate_grad_batches: Annotated[int, AtLeast(1)] = 1
    """Number of micro-batches per optimizer step."""
    sync_batchnorm: bool = True
    """Synchronize batch-norm statistics over devices, as the original does."""
    use_distributed_sampler: bool = True
    """Divide the images of an epoch among the devices."""
    limit_train_batches: Annotated[Any, Batches] = None
    """Largest number of micro-batches per epoch and device, or a share as a float."""
    limit_val_batches: Any = None
    """Largest number of validation batches (for your own methods; k-NN evaluation has its own limits)."""
    limit_test_batches: Any = None
    """Largest number of test batches (for your own methods)."""
    limit_predict_batches: Any = None
    """Largest number of prediction batches (for your own methods)."""
    overfit_batches: Annotated[Any, BatchesOrNone] = 0.0
    """Train only on this number or share of fixed batches, for debugging."""
    val_check_interval: Any = None
    """Batches between validations (for your own methods)."""
    check_val_every_n_epoch: int | None = 1
    """Epochs between validations (for your own methods)."""
    num_sanity_val_steps: int | None = None
    """Validation batches before training (for your own methods)."""
    reload_dataloaders_every_n_epochs: int = 0
    """Epochs after which the loaders are rebuilt; 0 never rebuilds them."""
    log_every_n_steps: Annotated[int, AtLeast(1)] = 10
    """Optimizer steps between log rows."""
    fast_dev_run: Annotated[Any, DevRun] = False
    """Run only this number of batches, for debugging."""
    enable_checkpointing: bool = True
    """Write `checkpoints/`."""
    enable_progress_bar: bool = True
    """Show the progress bar."""
    enable_model_summary: bool = False
    """Print Lightning's model summary."""
    deterministic: Annotated[Any, OneOf(True, False, "warn")] = None
    """Use only deterministic kernels; `warn` warns if there is none."""
    benchmark: bool | None = True
    """Let cuDNN measure which kernels are fastest, as the original does."""
    inference_mode: bool = True
    """Evaluate in `torch.inference_mode`."""
    detect_anomaly: bool = False
    """Enable PyTorch's anomaly detection (slow)."""
    profiler: str | None = None
    """Lightning profiler: `simple`, `advanced` or `pytorch`."""
    plugins: Any = None
    """Names of Lightning plugins."""
    barebones: bool = False
    """Disable logs, progress bar and checkpoints, to measure their overhead."""
    enable_autolog_hparams: bool = True
    """Let Lightning log hyperparameters (the complete configuration is always logged)."""
    model_registry: str | None = None
    """Name in Lightning's model registry."""
