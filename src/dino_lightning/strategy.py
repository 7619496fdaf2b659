"""Lightning's FSDP2 strategy with checkpoints that every other strategy reads, and that read every other's.

Lightning numbers the optimizer's state by the position in the module instead of in the optimizer, and refuses to
resume while a parameter has no state yet, as frozen prototypes have none. Here the file is what one process would have
written.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dino_lightning.sharding import like, whole


class FullySharded(ModelParallelStrategy):
    """Shards over all devices; the module does so itself in `configure_model`."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the process group, now that the number of devices is known."""
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, on rank 0: the others take part in the gathering only."""
        keep = self.is_global_zero

        def on_rank_zero(tensor: Tensor) -> Tensor | None:
            full = whole(tensor)
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
                index: {name: like(value, parameters[index]) if isinstance(value, Tensor) else value
                        for name, value in entry.items()}
                for index, entry in saved["state"].items()
            }  # fmt: skip
            optimizer.load_state_dict({**saved, "state": state})
