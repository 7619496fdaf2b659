"""TODO."""

import torch


def trains_on_cpu(accelerator: str) -> bool:
    """Whether Lightning's `accelerator` means the CPU on this machine."""
    other = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not other)


def is_asynchronous(device: torch.device) -> bool:
    """Whether a program that asks this device for a number waits for work that it could have added to meanwhile."""
    return device.type == "cuda"
