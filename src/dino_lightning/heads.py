"""Projection heads: features (B, D) -> logits over prototypes (B, K)."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: row k of the weight is `weight_g[k] * weight_v[k] / |weight_v[k]|`.

    The two factors are parameters of their own under the names of the original's checkpoints. They are trained,
    decayed and averaged into the teacher separately, so the composed weight is never averaged.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        # nn.Linear's default: the original adds this layer after its trunc_normal initialisation has run.
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits (B, K)."""
        weight_KD = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(x_BD, weight_KD)


class DINOHead(nn.Module):
    """MLP, L2 bottleneck, prototypes: the head `h` of the paper's appendix C."""

    def __init__(
        self,
        in_dim: int,
        *,
        out_dim: int,
        layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
        train_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            if index:
                modules += [nn.BatchNorm1d(fan_in)] if batch_norm else []
                modules += [nn.GELU()]
            modules.append(nn.Linear(fan_in, fan_out))
        # A head of one layer is a bare Linear in the original: `mlp.weight` rather than `mlp.0.weight`.
        self.mlp = nn.Sequential(*modules) if layers > 1 else modules[0]
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_norm=train_norm)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits (B, K): cosine similarity to each prototype, times the prototype's norm."""
        return self.last_layer(F.normalize(self.mlp(x_BD), dim=-1))
