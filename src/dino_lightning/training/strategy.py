"""How a run is spread over devices: whole networks on each (DDP), or slices of them (FSDP2).

Both are Lightning's strategies with settings of their own; `build_strategy` turns the names of `trainer.strategy` into
them.
"""

import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dino_lightning.config import TrainerConfig
from dino_lightning.errors import UserError
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.launcher import Launcher
from dino_lightning.runtime.sharding import full_tensor, like
from dino_lightning.runtime.watchdog import end_with_first_process

START_METHODS = {
    "ddp": "popen",
    "ddp_fork": "fork",
    "ddp_notebook": "fork",
    "ddp_find_unused_parameters_true": "popen",
}
"""How each of Lightning's names for DDP starts its processes. Not `ddp_spawn`: a run's callbacks cannot be pickled."""

TIMEOUT = timedelta(minutes=30)
"""As PyTorch has it."""

SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"  # its name up to PyTorch 2.12, deprecated since


def build_strategy(config: TrainerConfig, *, timeout: timedelta = TIMEOUT) -> Strategy | str:
    """What `trainer.strategy` means, for `lightning.Trainer`; a rank waits no longer than `timeout` for the others."""
    name = _chosen_by_lightning(config) if config.strategy == "auto" else config.strategy
    if name == "fsdp":
        return FullySharded(timeout=timeout)  # Lightning's own "fsdp" is FSDP1
    if name not in START_METHODS:
        return config.strategy
    unused = "find_unused_parameters" in name
    # PyTorch's static graph fails at the first backward pass where that is not reduced, as the first micro-batch of an
    # accumulated step is not ("expect_autograd_hooks_ INTERNAL ASSERT FAILED", pytorch/pytorch issue 143580).
    static = config.accumulate_grad_batches == 1 and not unused
    return DataParallel(
        start_method=START_METHODS[name], static_graph=static, find_unused_parameters=unused, timeout=timeout
    )


def cluster_plugins() -> list[SLURMEnvironment]:
    """SLURM's environment where Lightning would choose it, without its handler of the signal that ends a job.

    That one saves at once, within the signal, wherever the step is: with a student that has moved and a teacher that
    has not. `callbacks.leaving` waits for the end of the step.
    """
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(
            "the SLURM job has --ntasks without --ntasks-per-node: give --nodes and --ntasks-per-node, the "
            "number of trainer.devices (docs/clusters.md)."
        ) from error


def _chosen_by_lightning(config: TrainerConfig) -> str:
    """The name of the strategy that `auto` means with these devices."""
    quieten_libraries()  # this trainer has much to say about itself, and is gone in a moment
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        plugins=config.plugins,
        barebones=True,
    )
    if not isinstance(trainer.strategy, DDPStrategy):
        return "auto"
    launcher = trainer.strategy.launcher
    return "ddp_notebook" if launcher is not None and launcher.is_interactive_compatible else "ddp"


class DataParallel(DDPStrategy):
    """DDP whose gradients lie in its buckets, over a graph that is the same in every step.

    Prototypes that are frozen at the start of a run are no exception: they are in the graph, and lose their gradients
    after it has been reduced.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(gradient_as_bucket_view=True, **options)

    def _configure_launcher(self) -> None:
        if self._start_method == "popen":
            assert self.cluster_environment is not None
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        """Start the process group."""
        end_with_first_process()
        super().setup_environment()

    def configure_ddp(self) -> None:
        """Wrap the module; its buffers are copied from rank 0 at each forward pass only where ranks differ in them.

        The center is moved alike on all ranks, and synchronized batch norms see the same images on each.
        """
        assert self.model is not None
        self._ddp_kwargs[SYNC_BUFFERS] = has_separate_statistics(self.model)
        super().configure_ddp()


class SharedStatistics(LayerSync):
    """Batch norms that share their statistics over devices; Lightning's converter drops the activation that timm keeps
    inside some of its batch norms."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert all batch norms."""
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave them: in evaluation they are ordinary ones."""
        return model


def has_separate_statistics(module: nn.Module) -> bool:
    """Whether there are batch norms that see the images of their own rank only."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all devices; the module shards itself in `configure_model`.

    Its checkpoints are read by every other strategy, and it reads every other's. Lightning numbers the optimizer's
    state by the position in the module instead of in the optimizer, and refuses to resume while a parameter has no
    state yet, as frozen prototypes have none. Here the file is what one process would have written.
    """

    def __init__(self, *, timeout: timedelta = TIMEOUT) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Start the process group, now that the number of devices is known."""
        end_with_first_process()
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, on rank 0: the others take part in the gathering only."""
        keep = self.is_global_zero

        def on_rank_zero(tensor: Tensor) -> Tensor | None:
            full = full_tensor(tensor)
            return full.cpu() if keep else None

        return tree_map_only(Tensor, on_rank_zero, optimizer.state_dict())

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file as it is, on every rank."""
        # Past the parent, which would load weights and optimizer here.
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its slices."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its slices."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {
                    name: like(value, parameters[index]) if isinstance(value, Tensor) else value
                    for name, value in entry.items()
                }
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
