"""Trainings on two ranks, by `launch`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DoublePrecision
from ranks import on_ranks, results_of_ranks
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dino_lightning.config import AdamWConfig, LARSConfig, OptimConfig, SGDConfig, TrainerConfig
from dino_lightning.models.kernels import tiles
from dino_lightning.models.packed_block import compiled_pass
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.runtime.sharding import full_tensor, is_sharded, local
from dino_lightning.training.strategy import build_strategy

METHOD: dict[str, Any] = {"teacher_momentum": 0.9, "norm_last_layer": False, "freeze_last_layer": "6it"}
MIN_ELEMENTS = tiles.MIN_ELEMENTS
CLIP = 0.02
"""Larger than the norms of some gradients, smaller than others."""
STEPS, EPOCHS, RANKS, BATCH = 4, 2, 2, 8
SCHEDULE: dict[str, Any] = {"lr_warmup": "0ep", "clip_grad": CLIP}


@dataclass(frozen=True)
class Case:
    """A training on two ranks."""

    strategy: str
    optim: OptimConfig = field(default_factory=lambda: AdamWConfig(lr=0.032, **SCHEDULE))
    accumulate: int = 1
    checkpointed: bool = False
    depth: int = 1
    tiled: bool = False
    compiled: bool = False
    batch_norm: bool = False


CASES = {
    "ddp": Case("ddp"),
    "ddp, accumulated": Case("ddp", accumulate=2),
    "ddp, checkpointed": Case("ddp", checkpointed=True),
    "ddp, tiled": Case("ddp", depth=2, tiled=True),
    "ddp, compiled": Case("ddp", depth=2, compiled=True),
    "ddp, batch norms": Case("ddp", batch_norm=True),
    "ddp, unused": Case("ddp_find_unused_parameters_true"),
    "fsdp": Case("fsdp"),
    "fsdp, accumulated, tiled": Case("fsdp", accumulate=2, depth=2, tiled=True),
    "fsdp, checkpointed": Case("fsdp", checkpointed=True),
    "fsdp, sgd": Case("fsdp", SGDConfig(lr=3.2, **SCHEDULE)),
    "fsdp, lars": Case("fsdp", LARSConfig(lr=32.0, trust_coefficient=0.01, **SCHEDULE)),
}


class Watch(L.Callback):
    """The student's averaged gradients before clipping at each optimizer step, and what averages them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.storages: list[int] = []
        """Number of memory blocks that contain the gradients of each step."""
        self.graphs: list[int] = []
        """Number of compiled graphs after each micro-batch."""
        self.settings: dict[str, bool] = {}
        """DDP's buckets."""
        self.sent: list[dict[str, int]] = []
        """Bytes per micro-batch by collective of `torch.distributed`, and those of DDP's gradients."""
        self._seen: Counter[str] = Counter()

    def listen(self) -> None:
        """Count the bytes that this rank sends from now on; for a gather or sum over two ranks, those received."""
        counted = {
            "all_gather_single": 1,
            "all_gather_into_tensor": 1,
            "reduce_scatter_single": 0,
            "reduce_scatter_tensor": 0,
            "all_reduce": 0,
        }
        for name, argument in counted.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counting(name.removesuffix("_single"), getattr(dist, name), argument))

    def _counting(self, name: str, function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def count(*args: Any, **options: Any) -> Any:
            own = [*args, *options.values()][argument]
            self._seen[name] += own.numel() * own.element_size()
            return function(*args, **options)

        return count

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            self._seen["gradients"] = wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]
        self.sent.append(dict(self._seen))
        self._seen.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            names = ("static_graph", "gradient_as_bucket_view", "forward_sync_buffers", "broadcast_buffers")
            self.settings = {name: getattr(wrapped, name) for name in names if hasattr(wrapped, name)}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = {name: p.grad for name, p in pl_module.student.named_parameters() if p.grad is not None}
        self.gradients.append({name: gradient.clone() for name, gradient in named.items()})
        self.storages.append(len({local(gradient).untyped_storage().data_ptr() for gradient in named.values()}))


def module_and_batches(case: Case = CASES["ddp"]) -> tuple[Any, tiny.Batches]:
    """The same on every rank and in the test process."""
    torch.manual_seed(3)
    batch_size = BATCH // RANKS // case.accumulate
    module = tiny.dino(
        optim=case.optim, batch_size=batch_size, depth=case.depth, head_batch_norm=case.batch_norm, **METHOD
    )
    for block in (*module.student.backbone.blocks, *module.teacher.backbone.blocks):
        block.checkpointed = case.checkpointed
        block.pass_function = compiled_pass("aot_eager") if case.compiled else None  # without generating code
    tiles.MIN_ELEMENTS = 0 if case.tiled else MIN_ELEMENTS
    return module, tiny.batches(STEPS)


def launch(folder: Path, *cases: str) -> list[dict[str, dict[str, Any]]]:
    """Run both ranks; returns the results of each by case. They resume from `folder`/start.ckpt if it exists."""
    on_ranks(main, folder, *cases)
    return results_of_ranks(folder)


def train(case: Case, *, start: Path, end: Path) -> dict[str, Any]:
    """One training of this rank; returns its results."""
    module, batches = module_and_batches(case)
    trainer_config = TrainerConfig(
        accelerator="cpu", devices=RANKS, strategy=case.strategy, accumulate_grad_batches=case.accumulate
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=build_strategy(trainer_config),
        plugins=[DoublePrecision()],  # like precision="64-true", which Lightning refuses with FSDP
        accumulate_grad_batches=case.accumulate,
        max_epochs=EPOCHS,
        callbacks=[record := tiny.Record(), watch := Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    parts = tiny.split(batches, parts=RANKS * case.accumulate)
    own = [batch for index, batch in enumerate(parts) if index % RANKS == trainer.global_rank]
    loader = DataLoader(own, batch_size=None)  # type: ignore[arg-type]
    watch.listen()
    trainer.fit(module, loader, ckpt_path=start if start.exists() else None, weights_only=True)
    trainer.save_checkpoint(end)
    return {
        "losses": record.losses,
        "centers": record.centers,
        "student": gathered(record.students[-1]),
        "teacher": gathered(record.teachers[-1]),
        "gradients": [gathered(step) for step in watch.gradients],
        "storages": watch.storages,
        "settings": watch.settings,
        "graphs": watch.graphs,
        "sharded": [is_sharded(tensor) for tensor in module.parameters()],
        "sizes": {name: sizes(tensor) for name, tensor in all_tensors(module, trainer).items()},
        "sent": watch.sent,
        "rates": record.rates,
        "options": [
            {key: group[key] for key in ("fused", "foreach") if key in group}
            for group in trainer.optimizers[0].param_groups
        ],
    }


def all_tensors(module: Any, trainer: L.Trainer) -> dict[str, Tensor]:
    """Weights of student and teacher, last gradients, and the optimizer's state."""
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            tensors[f"gradient of {name}"] = parameter.grad
        for key, value in trainer.optimizers[0].state[parameter].items() if parameter.requires_grad else ():
            if value.ndim:
                tensors[f"{key} of {name}"] = value
    return tensors


def sizes(tensor: Tensor) -> tuple[list[int], int]:
    """The full shape, and the number of values on this rank."""
    return list(tensor.shape), local(tensor).numel()


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


def main(rank: int, folder: Path, *cases: str) -> None:
    start = folder / "start.ckpt"
    seen = {case: train(CASES[case], start=start, end=folder / f"{case}.ckpt") for case in cases}
    torch.save(seen, folder / f"rank{rank}.pt")
    leave_group()
