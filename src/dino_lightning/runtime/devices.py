"""Properties of devices."""

import torch


def trains_on_cpu(accelerator: str) -> bool:
    """Whether Lightning's `accelerator` means the CPU on this machine."""
    other = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not other)


def is_asynchronous(device: torch.device) -> bool:
    """Whether this device runs asynchronously, so that reading a value from it stalls the program."""
    return device.type == "cuda"
