"""Automatic settings from the images and the machine: `auto`."""

from dataclasses import dataclass


@dataclass
class AutoConfig:
    """Settings that are chosen automatically. Keys on the command line always win."""

    data: bool = False
    """Set prototypes, momentum, temperature, learning rate and crops from the number and size of the images
    (docs/small_data.md)."""
    machine: bool = False
    """Set run length, batch size, loader processes, precision, the image cache and k-NN evaluation from this machine
    and the number of images (docs/small_data.md). A batch that does not fit into the GPU's memory is split into
    micro-batches. `data.path=…` without `data=` and `experiment=` turns this on."""
