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

from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.knn import exact_matmul

CHUNK_VALUES = 1 << 26
"""Logits at a time: 0.5 GB in float64. N does not matter."""
TOLERANCE = 1e-6
"""Largest entry of the gradient of the objective divided by c N, at which both solvers stop."""


@dataclass(frozen=True)
class Classifier:
    """Weights (D, K) and intercepts (K,)."""

    weights: Tensor
    biases: Tensor
    converged: bool = True
    """False where the most iterations came before the tolerance."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """(N, K), where the weights are."""
        with exact_matmul(self.weights.device):
            return features_ND.to(self.weights) @ self.weights + self.biases


def objective(classifier: Classifier, features_ND: Tensor, labels_N: Tensor, *, c: float) -> Tensor:
    """The value that is minimized."""
    entropy = F.cross_entropy(classifier.logits(features_ND), labels_N.to(classifier.biases.device), reduction="sum")
    return c * entropy + 0.5 * classifier.weights.square().sum()


def fit(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    num_classes: int,
    c: float,
    max_iterations: int,
    device: torch.device,
    start: Classifier | None = None,
) -> Classifier:
    """L-BFGS, in float64 on a CPU and float32 elsewhere. `start` saves iterations; there is one minimum only.

    The device holds the features once and a few chunks of logits.
    """
    # Accelerators compute in float64 at a fraction of their speed, some not at all.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    x_ND, y_N = features_ND.to(device, dtype), labels_N.to(device)
    weight_DK = torch.zeros(x_ND.shape[1], num_classes, device=device, dtype=dtype, requires_grad=True)
    bias_K = torch.zeros(num_classes, device=device, dtype=dtype, requires_grad=True)
    if start is not None:
        weight_DK.data.copy_(start.weights)
        bias_K.data.copy_(start.biases)
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

    # Autograd would keep the logits of all images.
    with torch.no_grad(), exact_matmul(device):
        optimizer.step(closure)  # type: ignore[arg-type]
    taken = optimizer.state[weight_DK]["n_iter"]
    return Classifier(weight_DK.detach(), bias_K.detach(), converged=taken < max_iterations)


def _value_and_gradient(
    weight_DK: Tensor, bias_K: Tensor, x_ND: Tensor, y_N: Tensor, *, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective and gradient divided by c N: a tolerance then means the same for every c and N."""
    penalty = 1 / (c * len(x_ND))
    value = 0.5 * penalty * weight_DK.square().sum()
    slope_DK, slope_K = penalty * weight_DK, torch.zeros_like(bias_K)
    rows = max(1, CHUNK_VALUES // len(bias_K))
    for x_nD, y_n in zip(x_ND.split(rows), y_N.split(rows), strict=True):
        log_p_nK = torch.addmm(bias_K, x_nD, weight_DK).log_softmax(dim=1)
        value = value + F.nll_loss(log_p_nK, y_n, reduction="sum") / len(x_ND)
        error_nK = log_p_nK.exp_()
        error_nK[torch.arange(len(y_n), device=y_n.device), y_n] -= 1
        slope_DK.addmm_(x_nD.T, error_nK, alpha=1 / len(x_ND))
        slope_K.add_(error_nK.sum(dim=0), alpha=1 / len(x_ND))
    return value, slope_DK, slope_K


def fit_sklearn(
    features_ND: Tensor, labels_N: Tensor, *, num_classes: int, c: float, max_iterations: int
) -> Classifier:
    """The same by scikit-learn, on the CPU; classes that no image has get an intercept of minus infinity."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(
            "eval.solver=sklearn needs scikit-learn: pip install 'dino-lightning[sklearn]', or set eval.solver=device."
        ) from error
    x_ND, y_N = features_ND.double().cpu().numpy(), labels_N.cpu().numpy()
    present = np.unique(y_N)
    weight_DK = torch.zeros(x_ND.shape[1], num_classes, dtype=torch.float64)
    bias_K = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    if len(present) == 1:
        bias_K[int(present[0])] = 0.0
        return Classifier(weight_DK, bias_K)
    # Of two classes scikit-learn fits the difference w alone and charges ||w||^2 / 2; -w / 2 and w / 2 would cost half.
    model = LogisticRegression(C=2 * c if len(present) == 2 else c, max_iter=max_iterations, tol=TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x_ND, y_N)
    weights, biases = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    if len(present) == 2:
        weights, biases = torch.cat([-weights, weights], 1) / 2, torch.cat([-biases, biases]) / 2
    weight_DK[:, present], bias_K[present] = weights, biases
    return Classifier(weight_DK, bias_K, converged=int(np.max(model.n_iter_)) < max_iterations)


def stratified_folds(labels_N: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """The fold (0 ... folds - 1) of each image: each class is dealt out evenly, in an order drawn by seed."""
    generator, fold_N = np.random.default_rng(seed), np.empty(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        members = generator.permutation(np.flatnonzero(labels_N == label))
        fold_N[members] = np.arange(len(members)) % folds
    return fold_N
