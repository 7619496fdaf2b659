"""Builds the network for the weights of a file, after checking that the file's description fits the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dino_lightning.checkpoints.description import Description, build_seeded
from dino_lightning.checkpoints.original import Weights, check_names_and_shapes, shorten
from dino_lightning.errors import UserError


def build_verified(weights: Weights, description: Description, *, file_bytes: int, source: str) -> nn.Module:
    """The described network with these weights, frozen and in eval mode, on the CPU.

    The network is first built on the meta device, so that a wrong description cannot exhaust the memory. `file_bytes`
    is the size of the file with the weights, `source` names it in errors. Raises `UserError` if they do not fit.
    """
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A view (an expanded tensor) can claim more memory than the file contains.
        if not dense or not tensor.nbytes <= tensor.untyped_storage().nbytes() <= file_bytes:
            raise UserError(f"{source} is damaged: it does not contain the values of {shorten([str(name)])}.")
    with naming_source(source, f"describes a network that cannot be built ({description})"), torch.device("meta"):
        expected = description.build().state_dict()
    check_names_and_shapes(expected, weights, source=source, target=f"the detected architecture ({description})")
    backbone = build_seeded(description.build, seed=0)
    with naming_source(source, f"contains weights that cannot be copied into {description}"):
        backbone.load_state_dict(weights, strict=False)
    return backbone


@contextmanager
def naming_source(source: str, problem: str) -> Iterator[None]:
    """Convert any error that a library raises for a file's content into a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"{source} {problem}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} {problem} ({type(error).__name__}{': ' * bool(reason)}{reason}).") from error
