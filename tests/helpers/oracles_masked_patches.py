"""Slow reference implementations for masked patches, from the equations of iBOT."""

import oracles
import torch
from torch import Tensor


def slow_tokens(weights: oracles.Weights, crop_3HW: Tensor, hidden_hw: Tensor | None, registers: int = 0) -> Tensor:
    """Tokens of one crop after the last norm (1 + R + N, D); masked patches are the mask token plus their position."""
    x_1ND = oracles.vit_tokens({**weights, "pos_embed": _with_class(weights, registers)}, crop_3HW[None], patch=8)
    if hidden_hw is not None:
        position_ND = _with_class(weights, registers)[0]
        for i, hidden in enumerate(hidden_hw.flatten().tolist(), start=1):
            if hidden:
                x_1ND = torch.cat(
                    [x_1ND[:, :i], (weights["mask_token"][0] + position_ND[i])[None], x_1ND[:, i + 1 :]],
                    dim=1,
                )
    if registers:
        x_1ND = torch.cat([x_1ND[:, :1], weights["reg_token"], x_1ND[:, 1:]], dim=1)
    for name in sorted({name.split(".")[1] for name in weights if name.startswith("blocks.")}):
        x_1ND, _ = oracles.block(x_1ND, weights, f"blocks.{name}", heads=2)
    return oracles.layer_norm(x_1ND, weights, "norm")[0]


def _with_class(weights: oracles.Weights, registers: int) -> Tensor:
    table = weights["pos_embed"]
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1) if registers else table


class SlowTraining(oracles.DINOTraining):
    """Algorithm 1 with iBOT's patch loss, by crops; `hidden` has the masks (16, 4, 4) of each step."""

    hidden: list[Tensor]
    patch_losses: list[float]
    patch_center: Tensor
    weight: float
    """Weight of the patch loss."""

    def outputs(self, weights: oracles.Weights, crop_B3HW: Tensor, hidden_Bhw: Tensor | None) -> Tensor:
        part = {
            kind: {n.removeprefix(f"{kind}."): w for n, w in weights.items() if n.startswith(kind)}
            for kind in ("backbone", "head")
        }
        tokens = [
            slow_tokens(part["backbone"], crop, None if hidden_Bhw is None else hidden_Bhw[i])
            for i, crop in enumerate(crop_B3HW)
        ]
        return torch.stack([oracles.head(part["head"], tokens_TD) for tokens_TD in tokens])

    def step(self, index: int, crops: list[Tensor]) -> None:
        leaves = {name: self.student[name].clone().requires_grad_() for name in self.adam}
        hidden = self.hidden[index].split(8)
        with torch.no_grad():
            teacher = [self.outputs(self.teacher, crop, None) for crop in crops[:2]]
        views = [
            self.outputs({**self.student, **leaves}, crop, hidden[v] if v < 2 else None) for v, crop in enumerate(crops)
        ]
        tau = float(self.temperature[index])
        loss = oracles.dino_loss(
            torch.stack([view[:, 0] for view in views]),
            torch.stack([view[:, 0] for view in teacher]),
            tau_s=self.tau_s,
            tau_t=tau,
            center_K=self.center_K,
        )
        patch_loss, rows = torch.zeros((), dtype=torch.float64), []
        for student_BTK, teacher_BTK, hidden_Bhw in zip(views[:2], teacher, hidden, strict=True):
            for s_TK, t_TK, hidden_hw in zip(student_BTK, teacher_BTK, hidden_Bhw, strict=True):
                masked_tokens = [1 + n for n, masked in enumerate(hidden_hw.flatten().tolist()) if masked]
                for n in masked_tokens:
                    p_K = ((t_TK[n] - self.patch_center) / tau).softmax(0)
                    entropy = -(p_K * (s_TK[n] / self.tau_s).log_softmax(0)).sum()
                    patch_loss = patch_loss + entropy / len(masked_tokens) / 16
                rows += [t_TK[n].tolist() for n in masked_tokens]
        total = loss + self.weight * patch_loss
        raw = list(torch.autograd.grad(total, list(leaves.values())))
        clipped = oracles.clip_each(raw, max_norm=self.clip)
        for (name, adam), gradient in zip(self.adam.items(), clipped, strict=True):
            if "last_layer" in name and index < self.frozen_steps:
                continue
            decayed = not name.endswith(".bias") and self.student[name].ndim > 1
            decay = float(self.weight_decay[index]) if decayed else 0.0
            self.student[name] = adam.step(self.student[name], gradient, lr=float(self.lr[index]), weight_decay=decay)
        m = float(self.momentum[index])
        self.teacher = {name: m * self.teacher[name] + (1 - m) * self.student[name] for name in self.student}
        move = oracles.move_center
        classes = [row.tolist() for view in teacher for row in view[:, 0]]
        self.center_K = torch.tensor(move(self.center_K.tolist(), classes, momentum=0.9), dtype=torch.float64)
        if rows:
            self.patch_center = torch.tensor(move(self.patch_center.tolist(), rows, momentum=0.9), dtype=torch.float64)
        self.losses.append(total.item())
        self.patch_losses.append(patch_loss.item())
