"""Projection heads: features (B, D) -> logits over prototypes (B, K)."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.kernels.dense import dense, gelu_dense


class Prototypes(nn.Module):
    """Weight-normalized linear layer without bias: row k of the weight is `weight_g[k] * weight_v[k] / |weight_v[k]|`.

    The two factors are separate parameters with the names of the original's checkpoints. They are trained, decayed and
    averaged into the teacher separately; the composed weight is never averaged.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        # nn.Linear's default: the original adds this layer after its trunc_normal initialization has run.
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The composed weight (K, D)."""
        return _WeightNorm.apply(self.weight_v, self.weight_g)  # type: ignore[return-value]

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits (B, K)."""
        return F.linear(x_BD, self.weight)


class _WeightNorm(torch.autograd.Function):
    """w = v g / |v|, row by row, with half as many passes over the K x D numbers as autograd would make.

    dg = <dw, v> / |v|;  dv = (g / |v|) (dw - v <dw, v> / |v|^2)
    """

    @staticmethod
    def forward(ctx: Any, v_KD: Tensor, g_K1: Tensor) -> Tensor:
        length_K1 = torch.linalg.vector_norm(v_KD, dim=1, keepdim=True)
        ctx.save_for_backward(v_KD, g_K1, length_K1)
        return v_KD * (g_K1 / length_K1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw_KD: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        v_KD, g_K1, length_K1 = ctx.saved_tensors
        along_K1 = torch.einsum("kd,kd->k", dw_KD, v_KD).unsqueeze(1)
        scale_K1 = g_K1 / length_K1
        dv_KD = torch.addcmul(dw_KD * scale_K1, v_KD, -scale_K1 * along_K1 / length_K1.square())
        return dv_KD, along_K1 / length_K1 if ctx.needs_input_grad[1] else None


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def initialize(layers: nn.Module) -> None:
    """Initialize linear layers as the original: weights of standard deviation 0.02, biases 0."""
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def mlp_layers(widths: list[int], *, batch_norm: bool, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Linear layers of these widths, with the activation and an optional batch norm before each but the first."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        if modules:
            modules += [nn.BatchNorm1d(fan_in), activation()] if batch_norm else [activation()]
        modules.append(nn.Linear(fan_in, fan_out))
    return modules


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
        activation: str = "gelu",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules = mlp_layers(widths, batch_norm=batch_norm, activation=ACTIVATIONS[activation])
        # A head of one layer is a bare Linear in the original: `mlp.weight` rather than `mlp.0.weight`.
        self.mlp = nn.Sequential(*modules) if layers > 1 else modules[0]
        initialize(self.mlp)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_norm=train_norm)

    def forward(self, x_BD: Tensor, *, factored: bool = False, predictor: nn.Module | None = None) -> Any:
        """Logits (B, K): cosine similarity to each prototype, times the prototype's norm.

        With `factored` they are returned as `FactoredLogits`. The predictor is applied before the normalization.
        """
        embeddings_BD = self._bottleneck(x_BD) if factored else self.mlp(x_BD)
        if predictor is not None:
            embeddings_BD = predictor(embeddings_BD)
        if self.normalize:
            embeddings_BD = F.normalize(embeddings_BD, dim=-1)
        return FactoredLogits(embeddings_BD, self.last_layer.weight) if factored else self.last_layer(embeddings_BD)

    def _bottleneck(self, x_BD: Tensor) -> Tensor:
        """`self.mlp(x_BD)`, but it saves less for the backward pass."""
        modules = [self.mlp] if isinstance(self.mlp, nn.Linear) else list(cast(nn.Sequential, self.mlp))
        for i, module in enumerate(modules):
            if isinstance(module, nn.Linear):
                x_BD = gelu_dense(x_BD, module) if i and isinstance(modules[i - 1], nn.GELU) else dense(x_BD, module)
            elif not isinstance(module, nn.GELU):
                x_BD = module(x_BD)
        return x_BD


class MLPHead(nn.Sequential):
    """Linear layers with batch norm and ReLU between them: the projectors and predictors of BYOL, MoCo and SwAV."""

    def __init__(
        self, in_dim: int, out_dim: int, *, layers: int, hidden_dim: int, batch_norm: bool, last_norm: bool = False
    ) -> None:
        """`last_norm` adds a batch norm without scale and shift at the end (MoCo v3)."""
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        modules = mlp_layers(widths, batch_norm=batch_norm, activation=partial(nn.ReLU, inplace=True))
        if last_norm:
            modules.append(nn.BatchNorm1d(out_dim, affine=False))
        super().__init__(*modules)
