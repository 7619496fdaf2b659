"""Multinomial logistic regression with an L2 penalty, on the device.

    minimize over W (D, K), b (K):   c * sum_i cross_entropy(W' x_i + b, y_i) + ||W||^2 / 2

which is scikit-learn's objective: the intercept b is not penalized. N images, D width, K classes.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.evaluation.features.knn import exact_matmul

CHUNK_VALUES = 1 << 26
"""Number of logits in memory (0.5 GB in float64), independent of N."""
TOLERANCE = 1e-6
"""Both solvers stop when the largest entry of the gradient of (objective / (c N)) is below this."""


@dataclass(frozen=True)
class LogisticClassifier:
    """Weights (D, K) and intercepts (K,)."""

    weights: Tensor
    biases: Tensor
    converged: bool = True
    """False if the maximum number of iterations was reached before the tolerance."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """Logits (N, K), on the device of the weights."""
        with exact_matmul(self.weights.device):
            return features_ND.to(self.weights) @ self.weights + self.biases


def fit(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    num_classes: int,
    c: float,
    max_iterations: int,
    device: torch.device,
    initial: LogisticClassifier | None = None,
) -> LogisticClassifier:
    """Fit by L-BFGS, in float64 on a CPU and float32 elsewhere.

    `initial` saves iterations but does not change the result, since the minimum is unique. The device holds the
    features once and a few chunks of logits.
    """
    # Accelerators are slow in float64, or do not support it.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    x_ND, y_N = features_ND.to(device, dtype), labels_N.to(device)
    weight_DK = torch.zeros(x_ND.shape[1], num_classes, device=device, dtype=dtype, requires_grad=True)
    bias_K = torch.zeros(num_classes, device=device, dtype=dtype, requires_grad=True)
    if initial is not None:
        weight_DK.data.copy_(initial.weights)
        bias_K.data.copy_(initial.biases)
    optimizer = torch.optim.LBFGS(
        [weight_DK, bias_K],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.1 * torch.finfo(dtype).eps,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, weight_DK.grad, bias_K.grad = _value_and_gradient(weight_DK, bias_K, x_ND, y_N, c=c)
        return value

    # The gradient is computed by hand: autograd would keep the logits of all images.
    with torch.no_grad(), exact_matmul(device):
        optimizer.step(closure)  # type: ignore[arg-type]
    iterations = optimizer.state[weight_DK]["n_iter"]
    return LogisticClassifier(weight_DK.detach(), bias_K.detach(), converged=iterations < max_iterations)


def _value_and_gradient(
    weight_DK: Tensor, bias_K: Tensor, x_ND: Tensor, y_N: Tensor, *, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective and gradient divided by c N, so that the tolerance has the same meaning for every c and N."""
    penalty = 1 / (c * len(x_ND))
    value = 0.5 * penalty * weight_DK.square().sum()
    gradient_DK, gradient_K = penalty * weight_DK, torch.zeros_like(bias_K)
    chunk = max(1, CHUNK_VALUES // len(bias_K))
    for x_nD, y_n in zip(x_ND.split(chunk), y_N.split(chunk), strict=True):
        log_p_nK = torch.addmm(bias_K, x_nD, weight_DK).log_softmax(dim=1)
        value = value + F.nll_loss(log_p_nK, y_n, reduction="sum") / len(x_ND)
        error_nK = log_p_nK.exp_()
        error_nK[torch.arange(len(y_n), device=y_n.device), y_n] -= 1
        gradient_DK.addmm_(x_nD.T, error_nK, alpha=1 / len(x_ND))
        gradient_K.add_(error_nK.sum(dim=0), alpha=1 / len(x_ND))
    return value, gradient_DK, gradient_K


def fit_sklearn(
    features_ND: Tensor, labels_N: Tensor, *, num_classes: int, c: float, max_iterations: int
) -> LogisticClassifier:
    """The same with scikit-learn, on the CPU; classes without an image get an intercept of minus infinity."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x_ND, y_N = features_ND.double().cpu().numpy(), labels_N.cpu().numpy()
    present = np.unique(y_N)
    weight_DK = torch.zeros(x_ND.shape[1], num_classes, dtype=torch.float64)
    bias_K = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    if len(present) == 1:
        bias_K[int(present[0])] = 0.0
        return LogisticClassifier(weight_DK, bias_K)
    # For two classes scikit-learn fits their difference w with penalty ||w||^2 / 2, twice that of -w / 2 and w / 2.
    model = LogisticRegression(C=2 * c if len(present) == 2 else c, max_iter=max_iterations, tol=TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x_ND, y_N)
    weights, biases = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    if len(present) == 2:
        weights, biases = torch.cat([-weights, weights], 1) / 2, torch.cat([-biases, biases]) / 2
    weight_DK[:, present], bias_K[present] = weights, biases
    return LogisticClassifier(weight_DK, bias_K, converged=int(np.max(model.n_iter_)) < max_iterations)


def stratified_folds(labels_N: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """The fold (0 ... folds - 1) of each image; each class is distributed evenly, in an order drawn by seed."""
    generator, fold_N = np.random.default_rng(seed), np.empty(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        members = generator.permutation(np.flatnonzero(labels_N == label))
        fold_N[members] = np.arange(len(members)) % folds
    return fold_N
