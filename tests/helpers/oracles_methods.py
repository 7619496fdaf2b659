"""Slow reference implementations of BYOL, MoCo, SwAV and DINO's optional parts, from the equations of their papers.

They do not import the package. Shapes: V views of the student, T of the teacher, B images, N candidates or rows of an
assignment, E embedding, K prototypes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from oracles import Weights
from torch import Tensor

Crops = list[Tensor]


# ------------------------------------------------------------------------------------------------------------ losses


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True))


def byol_loss(predicted_VBE: Tensor, target_TBE: Tensor) -> Tensor:
    """BYOL's equation 2 in both directions: each target compared with the predictions from the other crops."""
    total = torch.zeros((), dtype=torch.float64)
    for t, target_BE in enumerate(target_TBE):
        others = [predicted for v, predicted in enumerate(predicted_VBE) if v != t]
        for predicted_BE in others:
            distances = [((unit(q) - unit(z)) ** 2).sum() for q, z in zip(predicted_BE, target_BE, strict=True)]
            total = total + sum(distances) / len(distances) / len(others)
    return total


def info_nce(query_BE: Tensor, positive_BE: Tensor, others: Sequence[Tensor], *, temperature: float) -> Tensor:
    """MoCo's equation 1; `others` has the negatives (N, E) of each query."""
    terms = []
    for query, key, negatives in zip(query_BE, positive_BE, others, strict=True):
        positive = torch.exp((query * key).sum() / temperature)
        scores = [torch.exp((query * negative).sum() / temperature) for negative in negatives]
        terms.append(-torch.log(positive / (positive + sum(scores))))
    return sum(terms) / len(terms)  # type: ignore[return-value]


def in_batch(keys_NE: Tensor) -> list[Tensor]:
    """For each key, all other keys of the batch."""
    return [torch.stack([key for j, key in enumerate(keys_NE) if j != i]) for i in range(len(keys_NE))]


def sinkhorn(scores_NK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """SwAV's algorithm: each iteration normalizes the prototypes (rows), then the images (columns)."""
    Q = torch.exp(scores_NK / epsilon).T
    K, N = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = torch.stack([row / row.sum() / K for row in Q])
        Q = torch.stack([column / column.sum() / N for column in Q.T]).T
    return (Q * N).T


def softmax_over_batch(scores_NK: Tensor, *, temperature: float) -> Tensor:
    """Table 15 of DINO: exponentials normalized over images, then over prototypes."""
    e_NK = torch.exp(scores_NK / temperature)
    over_images_NK = torch.stack([column / column.sum() for column in e_NK.T]).T
    return torch.stack([row / row.sum() for row in over_images_NK])


def pairs_entropy(logits_VBK: Tensor, targets_TBK: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy between each target and the softmax of each other view, averaged over pairs and images."""
    terms = []
    for t, target_BK in enumerate(targets_TBK):
        for v, logits_BK in enumerate(logits_VBK):
            if v != t:
                rows = zip(target_BK, logits_BK, strict=True)
                terms.append(sum(-(p * F.log_softmax(s / temperature, dim=0)).sum() for p, s in rows) / len(target_BK))
    return sum(terms) / len(terms)  # type: ignore[return-value]


def koleo(features_BD: Tensor) -> Tensor:
    """Negative mean of the log distance to the nearest other feature on the unit sphere."""
    x_BD, terms = unit(features_BD), []
    for i, feature in enumerate(x_BD):
        terms.append(-torch.log(min(torch.sqrt(((feature - x) ** 2).sum()) for j, x in enumerate(x_BD) if j != i)))
    return sum(terms) / len(terms)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------- networks


def batch_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Batch norm in training mode, without running statistics."""
    centered = x - x.mean(dim=0)
    normed = centered / torch.sqrt((centered * centered).mean(dim=0) + 1e-5)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"] if f"{name}.weight" in weights else normed


def mlp(weights: Weights, x: Tensor, *, activation: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """The numbered layers in order: those with a matrix are linear, the others are batch norms.

    The activation comes before every linear layer except the first.
    """
    numbers = sorted({int(name.split(".")[0]) for name in weights})
    for i in numbers:
        if f"{i}.weight" in weights and weights[f"{i}.weight"].ndim == 2:
            x = oracles.linear(x if i == numbers[0] else activation(x), weights, str(i))
        else:
            x = batch_norm(x, weights, str(i))
    return x


def part(weights: Weights, name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def crop_features(weights: Weights, crop: Tensor) -> Tensor:
    return oracles.vit(part(weights, "backbone"), crop, patch=8, heads=2)[0]


def outputs(weights: Weights, crops: Crops, *, predictor: Weights | None = None) -> Tensor:
    """Outputs of backbone, projector and predictor (V, B, E); batch norms use all crops together."""
    x = mlp(part(weights, "head"), torch.cat([crop_features(weights, crop) for crop in crops]))
    return (mlp(predictor, x) if predictor else x).unflatten(0, (len(crops), -1))


# ---------------------------------------------------------------------------------------------------------- training


@dataclass
class Training:
    """Training of a method: student, predictor, AdamW, teacher, and the state of the method.

    A step has a list of micro-batches whose gradients are averaged. Weights have the names of the module's state dict.
    """

    state: Weights
    """Weights `student.…`, `predictor.…`, `teacher.…` and buffers."""
    lr: np.ndarray
    weight_decay: np.ndarray
    clip: float
    momentum: np.ndarray | None = None
    trained: Callable[[str], bool] = lambda name: True
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = {name: value.detach().clone() for name, value in self.state.items()}
        names = [name for name in self.state if name.startswith(("student.", "predictor."))]
        real = [name for name in names if "running" not in name and "num_batches" not in name]
        self.adam = {name: oracles.AdamW() for name in real if self.trained(name)}

    def loss(self, weights: Weights, crops: Crops) -> Tensor:
        """The loss of one micro-batch."""
        raise NotImplementedError

    def after(self) -> None:
        """Update the state of the method."""

    def frozen(self, name: str, index: int) -> bool:
        """Whether a weight is frozen in this step."""
        return False

    def step(self, index: int, micro_batches: list[Crops]) -> None:
        leaves = {name: self.state[name].clone().requires_grad_() for name in self.adam}
        losses = [self.loss({**self.state, **leaves}, crops) for crops in micro_batches]
        loss = sum(losses) / len(losses)
        gradients = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
        clipped = oracles.clip_each(list(gradients), max_norm=self.clip)
        for (name, adam), gradient in zip(self.adam.items(), clipped, strict=True):
            if self.frozen(name, index):
                continue
            decayed = not name.endswith(".bias") and self.state[name].ndim > 1
            decay = float(self.weight_decay[index]) if decayed else 0.0
            self.state[name] = adam.step(self.state[name], gradient, lr=float(self.lr[index]), weight_decay=decay)
        if self.momentum is not None:
            self._move_teacher(float(self.momentum[index]))
        self.after()
        self.losses.append(loss.item())  # type: ignore[union-attr]

    def _move_teacher(self, m: float) -> None:
        for name, value in self.state.items():
            student = name.replace("teacher.", "student.", 1)
            if name.startswith("teacher.") and "running" not in name and "num_batches" not in name:
                self.state[name] = m * value + (1 - m) * self.state[student]

    def run(self, steps: list[list[Crops]]) -> "Training":
        for index, micro_batches in enumerate(steps):
            self.step(index, micro_batches)
        return self


@dataclass
class BYOL(Training):
    def loss(self, weights: Weights, crops: Crops) -> Tensor:
        targets = outputs(part(weights, "teacher"), crops[:2]).detach()
        return byol_loss(outputs(part(weights, "student"), crops, predictor=part(weights, "predictor")), targets)


@dataclass
class Queue:
    """A queue of the latest rows, first in, first out, initially filled with random rows."""

    rows: list[Tensor]
    arrived: int = 0
    waiting: list[Tensor] = field(default_factory=list)

    def commit(self) -> None:
        self.arrived += len(self.waiting)
        self.rows = (self.rows + self.waiting)[len(self.waiting) :]
        self.waiting = []

    @property
    def full(self) -> bool:
        return self.arrived >= len(self.rows)


@dataclass
class MoCo(Training):
    """Version 2: one direction, with a queue. Version 3: both directions, without queue, scaled by 2 T."""

    version: int = 2
    temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queue = Queue(list(self.state["queue.features"])) if self.version == 2 else None

    def loss(self, weights: Weights, crops: Crops) -> Tensor:
        student, teacher, predictor = (part(weights, name) for name in ("student", "teacher", "predictor"))
        if self.queue is not None:
            keys_BE = unit(outputs(teacher, crops[1:2])[0]).detach()
            query_BE = unit(outputs(student, crops[:1])[0])
            loss = info_nce(query_BE, keys_BE, [torch.stack(self.queue.rows)] * len(keys_BE), **self._options)
            self.queue.waiting += list(keys_BE)
            return loss
        keys_TBE = unit(outputs(teacher, crops[:2])).detach()
        queries_VBE = unit(outputs(student, crops, predictor=predictor))
        losses = [
            info_nce(queries_VBE[query], keys_TBE[key], in_batch(keys_TBE[key]), **self._options)
            for query, key in ((0, 1), (1, 0))
        ]
        return 2 * self.temperature * (losses[0] + losses[1])

    @property
    def _options(self) -> dict[str, float]:
        return {"temperature": self.temperature}

    def after(self) -> None:
        if self.queue is not None:
            self.queue.commit()


@dataclass
class SwAV(Training):
    temperature: float = 0.1
    epsilon: float = 0.05
    frozen_steps: int = 0
    queue_length: int = 0
    queue_start: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queues = [Queue([torch.zeros(1)] * self.queue_length) for _ in range(2 if self.queue_length else 0)]

    def loss(self, weights: Weights, crops: Crops) -> Tensor:
        prototypes_KE = weights["predictor.weight"]
        z_VBE = unit(outputs(part(weights, "student"), crops))
        scores_VBK = z_VBE @ prototypes_KE.T
        targets = []
        for view in range(2):
            rows_NE = z_VBE[view].detach()
            if self.queues and self.queues[view].full:
                rows_NE = torch.cat([rows_NE, torch.stack(self.queues[view].rows)])
            scores_NK = rows_NE @ prototypes_KE.detach().T
            targets.append(sinkhorn(scores_NK, epsilon=self.epsilon, iterations=3)[: len(crops[0])])
            if self.queues and self.steps >= self.queue_start:
                self.queues[view].waiting += list(z_VBE[view].detach())
        return pairs_entropy(scores_VBK, torch.stack(targets), temperature=self.temperature)

    def frozen(self, name: str, index: int) -> bool:
        return name.startswith("predictor.") and index < self.frozen_steps

    def after(self) -> None:
        self.state["predictor.weight"] = torch.stack([w / math.sqrt(w @ w) for w in self.state["predictor.weight"]])
        for queue in self.queues:
            queue.commit()
        self.steps += 1
