"""Slow reference implementations from the paper's equations and the original's documented behavior.

They do not import the package. They use Python loops over scalars if that is fast enough, and simple torch operations
on a dictionary of weights if gradients are needed. Shapes: V student views, T teacher views, B images, K prototypes, D
width, N tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


# --------------------------------------------------------------------------------------------------------- schedules


def cosine_schedule(base: float, final: float, total: int, warmup: int = 0) -> np.ndarray:
    """All values (total,): linear warm-up, then half a cosine whose last step is one before `final`."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(1, len(i))))
    return np.concatenate([np.linspace(0, base, warmup), cosine])


def temperature_schedule(start: float, final: float, *, warmup_epochs: int, epochs: int, per_epoch: int) -> np.ndarray:
    """The teacher's temperature at every step, with one value per epoch."""
    by_epoch = np.concatenate([np.linspace(start, final, warmup_epochs), np.full(epochs - warmup_epochs, final)])
    return np.repeat(by_epoch, per_epoch)


# -------------------------------------------------------------------------------------------------- loss and center


def dino_loss(student_VBK: Tensor, teacher_TBK: Tensor, *, tau_s: float, tau_t: float, center_K: Tensor) -> Tensor:
    """Equation 3, by pairs of different crops and by images."""
    terms = []
    for t, teacher_BK in enumerate(teacher_TBK):
        for v, student_BK in enumerate(student_VBK):
            if v == t:
                continue
            entropies = []
            for teacher_K, student_K in zip(teacher_BK, student_BK, strict=True):
                p_K = F.softmax((teacher_K - center_K) / tau_t, dim=0).detach()
                entropies.append(-(p_K * F.log_softmax(student_K / tau_s, dim=0)).sum())
            terms.append(sum(entropies) / len(entropies))
    assert len(terms) == len(teacher_TBK) * (len(student_VBK) - 1)
    return sum(terms) / len(terms)  # type: ignore[return-value]


def move_center(center_K: list[float], teacher_BK: list[list[float]], *, momentum: float) -> list[float]:
    """Equation 4: the center after a step."""
    B = len(teacher_BK)
    return [momentum * c + (1 - momentum) * sum(row[k] for row in teacher_BK) / B for k, c in enumerate(center_K)]


# ------------------------------------------------------------------------------------------------------------ optim


def clip_each(gradients: list[Tensor], *, max_norm: float) -> list[Tensor]:
    """Clip each gradient by its own norm."""
    clipped = []
    for gradient in gradients:
        norm = math.sqrt(sum(x * x for x in gradient.flatten().tolist()))
        clipped.append(gradient * min(1.0, max_norm / (norm + 1e-6)))
    return clipped


@dataclass
class AdamW:
    """AdamW for one tensor (Loshchilov and Hutter, algorithm 2)."""

    beta1: float = 0.9
    beta2: float = 0.999
    steps: int = 0
    m: Tensor | None = None
    v: Tensor | None = None

    def step(self, weight: Tensor, gradient: Tensor, *, lr: float, weight_decay: float) -> Tensor:
        m = torch.zeros_like(weight) if self.m is None else self.m
        v = torch.zeros_like(weight) if self.v is None else self.v
        self.steps += 1
        self.m = self.beta1 * m + (1 - self.beta1) * gradient
        self.v = self.beta2 * v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.steps)
        v_hat = self.v / (1 - self.beta2**self.steps)
        return weight - lr * weight_decay * weight - lr * m_hat / (v_hat.sqrt() + 1e-8)


def lars_step(
    weight: list[list[float]],
    gradient: list[list[float]],
    velocity: list[list[float]],
    *,
    matrix: bool,
    **options: float,
) -> tuple[list[list[float]], list[list[float]]]:
    """One LARS step for one tensor, given as rows; returns the new weight and velocity."""
    lr, decay, momentum, eta = (options[name] for name in ("lr", "weight_decay", "momentum", "trust_coefficient"))
    step = [
        [g + decay * w if matrix else g for g, w in zip(*rows, strict=True)]
        for rows in zip(gradient, weight, strict=True)
    ]
    norm_w, norm_s = (math.sqrt(sum(x * x for row in rows for x in row)) for rows in (weight, step))
    trust = eta * norm_w / norm_s if matrix and norm_w > 0 and norm_s > 0 else 1.0
    velocity = [
        [momentum * v + trust * s for v, s in zip(*rows, strict=True)] for rows in zip(velocity, step, strict=True)
    ]
    weight = [[w - lr * v for w, v in zip(*rows, strict=True)] for rows in zip(weight, velocity, strict=True)]
    return weight, velocity


# --------------------------------------------------------------------------------------------------------- networks


def cubic_kernel(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def cubic_row(side: int, size: int) -> list[list[float]]:
    """Interpolation weights (size, side) from `side` to `size` samples, with the scale (size + 0.1) / side."""
    rows = []
    for i in range(size):
        at = (i + 0.5) * side / (size + 0.1) - 0.5
        row = [0.0] * side
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            row[min(max(j, 0), side - 1)] += cubic_kernel(at - j)
        rows.append(row)
    return rows


def resample_positions(table_1ND: Tensor, h: int, w: int) -> Tensor:
    """The position embedding resampled to another grid; unchanged for its own grid."""
    side = math.isqrt(table_1ND.shape[1] - 1)
    if (h, w) == (side, side):
        return table_1ND
    down, across = cubic_row(side, h), cubic_row(side, w)
    mix = [[down[i][p] * across[j][q] for p in range(side) for q in range(side)] for i in range(h) for j in range(w)]
    patches_ND = torch.tensor(mix, dtype=table_1ND.dtype) @ table_1ND[0, 1:]
    return torch.cat([table_1ND[0, :1], patches_ND])[None]


def vit_tokens(weights: Weights, images_B3HW: Tensor, *, patch: int) -> Tensor:
    """Tokens before the first block (B, 1 + N, D)."""
    B, _, H, W = images_B3HW.shape
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    tokens = [
        images_B3HW[:, :, y : y + patch, x : x + patch].flatten(1) @ kernel.T + weights["patch_embed.proj.bias"]
        for y in range(0, H, patch)
        for x in range(0, W, patch)
    ]
    x_BND = torch.stack([weights["cls_token"][0, 0].expand(B, -1), *tokens], dim=1)
    return x_BND + resample_positions(weights["pos_embed"], H // patch, W // patch)


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def block(x_BND: Tensor, weights: Weights, name: str, *, heads: int) -> tuple[Tensor, list[Tensor]]:
    """One pre-norm transformer block; also returns the attention (B, N, N) of each head."""
    D = x_BND.shape[-1]
    q, k, v = linear(layer_norm(x_BND, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv").split(D, dim=-1)
    maps, values, d = [], [], D // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        maps.append((q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)).softmax(-1))
        values.append(maps[-1] @ v[..., part])
    x_BND = x_BND + linear(torch.cat(values, -1), weights, f"{name}.attn.proj")
    hidden = gelu(linear(layer_norm(x_BND, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
    return x_BND + linear(hidden, weights, f"{name}.mlp.fc2"), maps


def vit(weights: Weights, images_B3HW: Tensor, *, patch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Features (B, D) and the attention of the last block (B, heads, N, N)."""
    x_BND, maps = vit_tokens(weights, images_B3HW, patch=patch), []
    for i in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        x_BND, maps = block(x_BND, weights, f"blocks.{i}", heads=heads)
    return layer_norm(x_BND, weights, "norm")[:, 0], torch.stack(maps, dim=1)


def prototypes(g_K1: Tensor, v_KD: Tensor) -> Tensor:
    """Prototypes with weight normalization, by rows."""
    return torch.stack([g * v / torch.sqrt((v * v).sum()) for g, v in zip(g_K1, v_KD, strict=True)])


def head(weights: Weights, x_BD: Tensor) -> Tensor:
    """Logits (B, K): three linear layers with GELU in between, L2 norm, prototypes."""
    for i in (0, 2, 4):
        x_BD = linear(x_BD if i == 0 else gelu(x_BD), weights, f"mlp.{i}")
    x_BD = x_BD / torch.sqrt((x_BD * x_BD).sum(dim=1, keepdim=True))
    return x_BD @ prototypes(weights["last_layer.weight_g"], weights["last_layer.weight_v"]).T


# --------------------------------------------------------------------------------------------------------- training


@dataclass
class DINOTraining:
    """Algorithm 1 with full batches of crops and the details of the original; `run` trains."""

    student: Weights
    """Weights of the complete network, with the prefixes `backbone.` and `head.`."""
    patch: int
    heads: int
    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    temperature: np.ndarray
    """Temperature of the teacher at each step."""
    frozen_steps: int
    clip: float
    tau_s: float = 0.1
    center_momentum: float = 0.9
    trained: Callable[[str], bool] = lambda name: True
    losses: list[float] = field(default_factory=list)
    clipped: int = 0
    """Number of gradients that clipping has changed."""

    def __post_init__(self) -> None:
        self.student = {name: weight.detach().clone() for name, weight in self.student.items()}
        self.teacher = {name: weight.clone() for name, weight in self.student.items()}
        K = len(self.student["head.last_layer.weight_g"])
        self.center_K = torch.zeros(K, dtype=torch.float64)
        self.adam = {name: AdamW() for name in self.student if self.trained(name)}

    def logits(self, weights: Weights, crop: Tensor) -> Tensor:
        part = {kind: {n.removeprefix(f"{kind}."): w for n, w in weights.items()} for kind in ("backbone", "head")}
        return head(part["head"], vit(part["backbone"], crop, patch=self.patch, heads=self.heads)[0])

    def step(self, index: int, crops: list[Tensor]) -> None:
        leaves = {name: self.student[name].clone().requires_grad_() for name in self.adam}
        weights = {**self.student, **leaves}
        with torch.no_grad():
            teacher_TBK = torch.stack([self.logits(self.teacher, crop) for crop in crops[:2]])
        student_VBK = torch.stack([self.logits(weights, crop) for crop in crops])
        tau_t = float(self.temperature[index])
        loss = dino_loss(student_VBK, teacher_TBK, tau_s=self.tau_s, tau_t=tau_t, center_K=self.center_K)
        raw = list(torch.autograd.grad(loss, list(leaves.values())))
        clipped = clip_each(raw, max_norm=self.clip)
        self.clipped += sum(not torch.equal(a, b) for a, b in zip(raw, clipped, strict=True))
        for (name, adam), gradient in zip(self.adam.items(), clipped, strict=True):
            if "last_layer" in name and index < self.frozen_steps:
                continue
            decayed = not name.endswith(".bias") and self.student[name].ndim > 1
            decay = float(self.weight_decay[index]) if decayed else 0.0
            self.student[name] = adam.step(self.student[name], gradient, lr=float(self.lr[index]), weight_decay=decay)
        m = float(self.momentum[index])
        self.teacher = {name: m * self.teacher[name] + (1 - m) * self.student[name] for name in self.student}
        rows = teacher_TBK.flatten(0, 1).tolist()
        self.center_K = torch.tensor(
            move_center(self.center_K.tolist(), rows, momentum=self.center_momentum), dtype=torch.float64
        )
        self.losses.append(loss.item())

    def run(self, batches: list[list[Tensor]]) -> "DINOTraining":
        for index, crops in enumerate(batches):
            self.step(index, crops)
        return self
