"""Distribution over devices: data parallel with complete networks (DDP) or with sharded ones (FSDP2).

Both are Lightning's strategies with our settings; `build_strategy` maps the names of `trainer.strategy` to them.
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

START_METHODS = {"ddp": "popen", "ddp_fork": "fork", "ddp_notebook": "fork", "ddp_find_unused_parameters_true": "popen"}
"""Lightning's names for DDP, and how each starts its processes. `ddp_spawn` would have to pickle the callbacks."""

SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"  # its name up to PyTorch 2.12


def build_strategy(config: TrainerConfig, *, timeout: timedelta = timedelta(minutes=30)) -> Strategy | str:
    """The strategy for `lightning.Trainer`; a rank waits at most `timeout` for the others."""
    name = _chosen_by_lightning(config) if config.strategy == "auto" else config.strategy
    if name == "fsdp":
        return FullySharded(timeout=timeout)  # Lightning's own "fsdp" is FSDP1
    if name not in START_METHODS:
        return config.strategy
    unused = "find_unused_parameters" in name
    # PyTorch's static graph fails if gradients are not reduced after the first backward pass, as with accumulation
    # ("expect_autograd_hooks_ INTERNAL ASSERT FAILED", pytorch/pytorch issue 143580).
    static = config.accumulate_grad_batches == 1 and not unused
    return DataParallel(
        start_method=START_METHODS[name], static_graph=static, find_unused_parameters=unused, timeout=timeout
    )


def cluster_plugins() -> list[SLURMEnvironment]:
    """SLURM's environment if Lightning would choose it, but without its handler of the signal that ends a job.

    That handler saves immediately, even if the student is already updated and the teacher is not.
    `callbacks/preemption.py` waits for the end of the step.
    """
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(
            "the SLURM job has --ntasks without --ntasks-per-node: set --nodes, and --ntasks-per-node to the number of "
            "trainer.devices (docs/clusters.md)."
        ) from error


def _chosen_by_lightning(config: TrainerConfig) -> str:
    """The strategy that Lightning chooses for `auto` on these devices."""
    quieten_libraries()  # hides the messages of this temporary trainer
    machine = {key: getattr(config, key) for key in ("accelerator", "devices", "num_nodes", "plugins")}
    trainer = L.Trainer(**machine, barebones=True)
    if not isinstance(trainer.strategy, DDPStrategy):
        return "auto"
    launcher = trainer.strategy.launcher
    return "ddp_notebook" if launcher is not None and launcher.is_interactive_compatible else "ddp"


class DataParallel(DDPStrategy):
    """DDP whose gradients are views of its buckets, with a static graph unless gradients are accumulated.

    Prototypes that are frozen at the start of a run do not change the graph: they lose their gradients after reduction.
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
        """Wrap the module; buffers are broadcast from rank 0 before each forward pass only if ranks differ in them.

        The center and the statistics of synchronized batch norms are the same on all ranks.
        """
        assert self.model is not None
        self._ddp_kwargs[SYNC_BUFFERS] = has_separate_statistics(self.model)
        super().configure_ddp()


class SharedStatistics(LayerSync):
    """Synchronizes batch norms over devices; Lightning's converter drops the activations inside timm's batch norms."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert all batch norms to synchronized ones."""
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Keep them: in eval mode they behave like ordinary batch norms."""
        return model


def has_separate_statistics(module: nn.Module) -> bool:
    """Whether the module has batch norms that are not synchronized."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all devices; the module shards itself in `configure_model`.

    A checkpoint is what a single process would have written, so every strategy can resume from every other's. Lightning
    would index the optimizer's state by position in the module instead of the optimizer, and could not resume while a
    parameter has no state yet, such as frozen prototypes.
    """

    def __init__(self, *, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Start the process group; the number of devices is known only now."""
        end_with_first_process()
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The full state on rank 0; the other ranks only take part in gathering it."""

        def gather_on_rank_zero(tensor: Tensor) -> Tensor | None:
            full = full_tensor(tensor)
            return full.cpu() if self.is_global_zero else None

        return tree_map_only(Tensor, gather_on_rank_zero, optimizer.state_dict())

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the complete file on every rank."""
        # Not the parent's method, which would load weights and optimizer here.
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards."""
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
