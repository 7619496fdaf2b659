"""How a training step is computed: `step`. Changes speed and memory; numbers only where a key says so."""

from dataclasses import dataclass
from typing import Annotated

from dino_lightning.config.ranges import AtLeast, OneOf


@dataclass
class ComputeConfig:
    """Speed and memory of a training step."""

    fused: bool = True
    """Tokens of all crops through each layer at once, activations recomputed where that is cheap, and head and loss in
    pieces. False computes layer by layer and keeps everything: the form to read and to compare with. Equal up to
    rounding."""
    loss_rows: Annotated[int, AtLeast(1)] = 160
    """Rows of logits over prototypes that are held at once (crops; K numbers each)."""
    attention: Annotated[str, OneOf("split", "varlen")] = "split"
    """`split` attends once per resolution; `varlen` in one call of PyTorch's kernel for sequences of several lengths (a
    GPU, half precision)."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again for the gradient: far less memory, about a third
    more time."""
    compile: bool = False
    """Compile the blocks by `torch.compile`; the first step waits for it. On a CPU it needs a C++ compiler."""
    channels_last: bool | None = None
    """Images and convolutions with channels last in memory; null for networks without patches. Equal up to rounding."""
    matmul_precision: Annotated[str, OneOf("highest", "high", "medium")] = "highest"
    """Of float32 matrix products: `highest` is float32 as in the original, `high` TF32 on GPUs that have it, `medium`
    bfloat16. Changes numbers."""
