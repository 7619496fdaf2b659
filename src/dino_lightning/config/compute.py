"""How a training step is computed: `compute`. Changes speed and memory, and results only if a key says so."""

from dataclasses import dataclass
from typing import Annotated

from dino_lightning.config.ranges import AtLeast, OneOf


@dataclass
class ComputeConfig:
    """Speed and memory of a training step."""

    fused: bool = True
    """Process the tokens of all crops together in each layer, recompute cheap activations, and compute head and loss in
    chunks. False uses the plain reference implementation (slower, more memory), for reading and testing. Results are
    equal up to rounding."""
    loss_rows: Annotated[int, AtLeast(1)] = 160
    """Number of crops whose logits over the K prototypes are in memory at the same time."""
    attention: Annotated[str, OneOf("split", "varlen")] = "split"
    """`split` computes attention once per crop resolution; `varlen` calls PyTorch's kernel for sequences of several
    lengths once (needs a GPU and half precision)."""
    gradient_checkpointing: bool = False
    """Store only the input of each block and recompute the rest for the gradient: much less memory, about a third more
    time."""
    compile: bool = False
    """Compile the blocks with `torch.compile`, which delays the first step. On a CPU it needs a C++ compiler."""
    channels_last: bool | None = None
    """Use the channels-last memory format; null uses it for networks without patches. Results are equal up to
    rounding."""
    matmul_precision: Annotated[str, OneOf("highest", "high", "medium")] = "highest"
    """Precision of float32 matrix products: `highest` is float32 as in the original, `high` is TF32 on GPUs that
    support it, `medium` is bfloat16. Changes results."""
