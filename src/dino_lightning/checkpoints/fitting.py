"""A network for the weights of a file, refused where what the file says of it does not belong to them.

A file can claim anything: a million blocks, a width that no memory holds, weights that are views of a single number.
So the network is built without memory first, and its weights are compared, before it is built in earnest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dino_lightning.checkpoints.description import Description, build_seeded
from dino_lightning.checkpoints.original import Weights, check_names_and_shapes, shorten
from dino_lightning.errors import UserError

SPARE = 10, 1000
"""Parameters that a network may register for each weight of the file, and beyond: some are registered and replaced."""


def build_verified(weights: Weights, description: Description, *, file_bytes: int, source: str) -> nn.Module:
    """The described network with these weights, frozen and in eval mode, on the CPU.

    `file_bytes` is the size of the file that the weights come from, `source` names it in errors. Raises `UserError`
    where they do not fit each other.
    """
    _check_values(weights, file_bytes=file_bytes, source=source)
    with naming_source(source, f"describes a network, {description}, that cannot be built"):
        with torch.device("meta"), _at_most(SPARE[0] * len(weights) + SPARE[1]):
            outline = description.build()
        expected = outline.state_dict()
    check_names_and_shapes(expected, weights, source=source, taken_for=description)
    backbone = build_seeded(description.build, seed=0)
    with naming_source(source, f"holds weights that cannot be copied into {description}"):
        backbone.load_state_dict(weights, strict=False)
    return backbone


@contextmanager
def naming_source(source: str, what: str) -> Iterator[None]:
    """Whatever libraries raise at a file, which may hold anything, becomes a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"{source} {what}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} {what} ({type(error).__name__}{': ' * bool(reason)}{reason}).") from error


def _check_values(weights: Weights, *, file_bytes: int, source: str) -> None:
    """Refuse what no file of weights has: sparse tensors, views of a few numbers, more than the file could hold."""
    for name, tensor in weights.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or not tensor.nbytes <= tensor.untyped_storage().nbytes() <= file_bytes:
            raise UserError(
                f"{source} is damaged or no file of weights: the numbers of {shorten([str(name)])} are not in it."
            )


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stops building after so many parameters. Raises `ValueError`."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise ValueError(f"it has more than {parameters} parameters, and the file far fewer")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
