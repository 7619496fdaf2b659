"""Sums, means and gathers over ranks that also work without a process group.

Without one (a single process, or before the group starts) there is one rank, and every function returns its argument's
values. None of them carries gradient: they serve statistics and evaluation, while gradients are averaged by the
strategy. All ranks must call the same functions in the same order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if _active() else 1


def leave_group() -> None:
    """Close the process group, if there is one; for the end of a process.

    Lightning does so for NCCL alone. A process that ended with a gloo group still open was seen to abort on its way out
    ("terminate called without an active exception"), although its work was done.
    """
    if _active():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a tensor of one shape; the argument keeps its values."""
    return all_reduce_sum_later(tensor)()


@torch.no_grad()
def all_reduce_sum_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a sum over ranks and return at once; the returned function waits and gives the sum, each time it is called.

    The values of now are summed, whatever becomes of the argument. Over NCCL it is the current stream that waits, not
    the program.
    """
    device = tensor.device
    if not _active():
        total = tensor.clone()
        return lambda: total
    sent = tensor.to(_group_device(tensor), copy=True).contiguous()
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        work.wait()
        return sent.to(device)

    return wait


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest value over ranks of each element of a tensor of one shape; the argument keeps its values."""
    if not _active():
        return tensor.clone()
    sent = tensor.to(_group_device(tensor), copy=True).contiguous()
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return sent.to(tensor.device)


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor of one shape; the argument keeps its values."""
    assert tensor.is_floating_point(), f"the mean of {tensor.dtype} would be cut to whole numbers"
    return all_reduce_sum(tensor) / world_size()


@torch.no_grad()
def all_gather_concat(tensor: Tensor) -> Tensor:
    """The rows of rank 0, then those of rank 1, ...: (n_0 + n_1 + ..., ...) on every rank.

    Ranks may hold different numbers of rows, none included, but the same dtype and row shape.
    """
    if not _active():
        return tensor.clone()
    device = _group_device(tensor)
    counts = _gather_equal(torch.tensor([len(tensor)], device=device))
    lengths = [int(count) for count in counts]
    # Collectives exchange equal shapes only: pad to the longest and cut again.
    padding = (0, 0) * (tensor.ndim - 1) + (0, max(lengths) - len(tensor))
    padded = F.pad(tensor.to(device), padding)
    rows = torch.cat([part[:n] for part, n in zip(_gather_equal(padded), lengths, strict=True)])
    return rows.to(tensor.device)


GLOO = ("gloo/transport/", "caused pair closure", "connectFullMesh failed")
LOST = (*GLOO, "wait timeout", "Socket Timeout", "remote process exit", "communicator was aborted")
"""Words of gloo, the store and NCCL in errors about another rank that is gone or silent."""


def another_rank_is_lost(error: BaseException) -> bool:
    """Whether an error of this rank only says that another one has ended or does not answer."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and world_size() > 1 and any(words in str(error) for words in LOST)


def _gather_equal(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def _group_device(tensor: Tensor) -> torch.device:
    """Where the group can exchange this tensor: NCCL reads GPU memory only, gloo that of the CPU."""
    match dist.get_backend():
        case "nccl":
            return tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())
        case "gloo":
            return torch.device("cpu")
        case _:
            return tensor.device


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, of plain types and tensors on the CPU, in the order of the ranks."""
    if not _active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool) -> bool:
    """Whether the condition holds on any rank; all ranks ask together."""
    return bool(all_reduce_max(torch.tensor(float(condition))))
