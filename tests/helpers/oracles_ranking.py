"""Slow reference implementation of average precision, from its definition."""

import math

AT = (1, 5, 10)
NOT_RETRIEVABLE = -math.inf
"""The similarity of an image that cannot be retrieved."""


def ranked(similarity: list[float]) -> list[int]:
    """Database indices by decreasing similarity; ties are ordered by index."""
    return sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))


def area(positions: list[int], *, total: int) -> float:
    """Area under the precision-recall curve with the trapezoidal rule between the recalls j / total."""
    area = 0.0
    for j, position in enumerate(positions):
        before = 1.0 if position == 0 else j / position
        area += (before + (j + 1) / (position + 1)) / 2 * (1 / total)
    return area


def definition(similarity: list[float], positives: list[int], junk: list[int]) -> tuple[float, list[float]]:
    """AP and the precisions at `AT` for one query."""
    if not positives:
        return math.nan, [math.nan] * len(AT)
    without_junk = [i for i in ranked(similarity) if i not in set(junk)]
    hits = {i for i in positives if similarity[i] != NOT_RETRIEVABLE}
    positions = [position for position, i in enumerate(without_junk) if i in hits]
    precisions = []
    for k in AT:
        upto = min(k, positions[-1] + 1) if positions else 1
        precisions.append(sum(position < upto for position in positions) / upto)
    return area(positions, total=len(positives)), precisions
