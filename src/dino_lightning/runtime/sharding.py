"""Networks whose weights are spread over devices (FSDP2).

Each device keeps a slice of every parameter, its gradient and its optimizer state: a `DTensor`, mostly cut along the
first dimension. A block's weights are whole only while the block runs. What looks at weights in another place uses
`gathered` or `whole`, on all ranks together; all functions here leave ordinary networks and tensors as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dino_lightning.runtime.collectives import all_reduce_sum
from dino_lightning.runtime.precision import at_least_float32


def shard(network: nn.Module, *, mesh: DeviceMesh, in_parts: bool = True) -> None:
    """Spread the weights over `mesh`, in place; they must be equal on all ranks. Only once for each network.

    The network is gathered when it is called itself, not when a module around it is; `in_parts` part by part, each when
    it is called itself, else all at once, for a network that reads weights of its parts without calling them.
    """
    parts = _parts(network) if in_parts else []
    cut = partial(placement, ranks=mesh.size())
    for part in (*parts, network):
        # `reshard_after_forward` also at the top, where FSDP would keep the weights whole until the backward pass: a
        # teacher has none, and the moving average needs its slices.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, shard_placement_fn=cut)


def placement(parameter: nn.Parameter, *, ranks: int) -> Shard | None:
    """The dimension to cut along; None for the first.

    What has fewer rows than there are ranks is cut along another dimension where one divides evenly, which FSDP asks
    for: a slice of rows is padded to a whole row on every rank, so that of a position embedding, which is one row, each
    rank would receive as many copies as there are ranks.
    """
    if parameter.shape[0] >= ranks:
        return None
    return next((Shard(i) for i, size in enumerate(parameter.shape) if i and size % ranks == 0), None)


def _parts(network: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the blocks of a Vision Transformer, the stages of other networks."""
    blocks = getattr(network, "blocks", None)
    parent = blocks if isinstance(blocks, nn.Module) else network
    called = [child for child in parent.children() if not isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return [child for child in called if next(child.parameters(), None) is not None]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights on every rank within, so that ranks may call parts of it, and differently often.

    They must not be changed, and no gradient taken. All ranks enter and leave together.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank has a slice only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def global_norms(slices: list[Tensor], *, sharded: bool) -> Tensor:
    """L2 norms (n,) of n whole tensors, of which each rank has a slice where they are `sharded`."""
    norms = torch.stack(torch._foreach_norm(slices, 2))
    return all_reduce_sum(at_least_float32(norms).square()).sqrt() if sharded else norms


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor of all slices, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network as if it were not sharded, on the CPU of every rank."""
    return {name: full_tensor(tensor.detach()).cpu() for name, tensor in module.state_dict().items()}


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, whole and equal on all ranks, cut as `other` of the same shape is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    whole_here = tensor.to(other.device)
    return distribute_tensor(whole_here, other.device_mesh, other.placements, src_data_rank=None)
