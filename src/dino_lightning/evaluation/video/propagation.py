"""Propagation of labels from frame to frame of a video by the similarity of patches (section 4.2.2).

A patch takes its label from the most similar patches near its position in the first frame and in the last few frames.
Each frame depends on the previous ones; within a frame all patches are computed together.

h, w patches of a frame in rows and columns, D width, C labels; a frame is divided into G tiles of Q queries each, which
are compared with a window of S sources in each of the F context frames. K sources are selected.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 10
"""Maximum number of patches along the side of a tile. Larger tiles compute more similarities outside the neighborhood,
smaller ones have smaller matrices. The fastest value from 4 to 26 on a CPU, for patches of 8 and of 16 pixels."""
SPARE = 8
"""Additional sources beyond `top`, for scores that are equal to the last of them."""


@dataclass(frozen=True)
class TiledAxis:
    """Rows or columns of a frame: `count` tiles of `tile` patches, with windows that extend `reach` on both sides."""

    length: int
    count: int
    tile: int
    reach: int

    @property
    def window(self) -> int:
        """Patches of a window."""
        return self.tile + 2 * self.reach

    @property
    def padding(self) -> tuple[int, int]:
        """Padding before the first and after the last patch that the windows need."""
        return self.reach, self.reach + self.count * self.tile - self.length


def tile_axis(length: int, *, neighborhood: int) -> TiledAxis:
    """The tiles of an axis; a single one if a window would span the whole axis anyway."""
    count = math.ceil(length / TILE)
    tile = math.ceil(length / count)
    if tile + 2 * neighborhood >= length:
        return TiledAxis(length, count=1, tile=length, reach=0)
    return TiledAxis(length, count=math.ceil(length / tile), tile=tile, reach=neighborhood)


class Propagation:
    """The labels of successive frames, starting from those of the first.

    Source j of frame f has the weight exp(similarity / temperature) if it is among the `top` sources of all context
    frames together (including those equal to the last of them) and at most `neighborhood` rows and columns away (0:
    anywhere). Weights sum to 1. The context is the first frame and the `last_frames` frames before the current one.
    """

    def __init__(
        self,
        features_hwD: Tensor,
        labels_hwC: Tensor,
        *,
        last_frames: int,
        neighborhood: int,
        top: int,
        temperature: float,
    ) -> None:
        self.h, self.w, D = features_hwD.shape
        self.last_frames, self.top, self.temperature = last_frames, top, temperature
        self.rows, self.columns = (
            tile_axis(length, neighborhood=neighborhood or length) for length in (self.h, self.w)
        )
        self.excluded_GQS = ~_allowed(self.rows, self.columns, neighborhood=neighborhood or max(self.h, self.w))
        self.excluded_GQS = self.excluded_GQS.to(features_hwD.device)
        G, _, S = self.excluded_GQS.shape
        # The windows of a frame are computed once, for all frames that use it as context. Slot 0 is the first frame.
        self._features_GFSD = features_hwD.new_zeros(G, 1 + last_frames, S, D)
        self._labels_GFSC = labels_hwC.new_zeros(G, 1 + last_frames, S, labels_hwC.shape[-1])
        self._store(F.normalize(features_hwD, dim=-1), labels_hwC, slot=0)
        self._frames = 1

    @torch.no_grad()
    def step(self, features_hwD: Tensor) -> Tensor:
        """The labels (h, w, C) of the next frame: for each patch, weights that sum to 1."""
        normalized_hwD = F.normalize(features_hwD, dim=-1)
        context = min(self._frames, 1 + self.last_frames)
        scores_GQS = self._scores(normalized_hwD, context=context)
        values_GQK, sources_GQK = self._best(scores_GQS)
        weights_GQK = (values_GQK - values_GQK[..., :1]).exp()
        last = min(self.top, values_GQK.shape[-1])
        weights_GQK = weights_GQK * (values_GQK >= values_GQK[..., last - 1 : last])
        weights_GQK = weights_GQK / weights_GQK.sum(dim=-1, keepdim=True)
        labels_GSC = self._labels_GFSC[:, :context].flatten(1, 2)
        G, Q, K = sources_GQK.shape
        indices = sources_GQK.reshape(G, Q * K, 1).expand(-1, -1, labels_GSC.shape[-1])
        selected_GQKC = labels_GSC.gather(1, indices).unflatten(1, (Q, K))
        labels_hwC = self._untile((weights_GQK.unsqueeze(-1) * selected_GQKC).sum(dim=2))
        if self.last_frames:
            self._store(normalized_hwD, labels_hwC, slot=1 + (self._frames - 1) % self.last_frames)
        self._frames += 1
        return labels_hwC

    def _scores(self, normalized_hwD: Tensor, *, context: int) -> Tensor:
        """Similarities over temperature (G, Q, context frames x S), -inf outside the neighborhood."""
        queries_GQD = self._tile(normalized_hwD / self.temperature)
        sources_GSD = self._features_GFSD[:, :context].flatten(1, 2)
        scores_GQS = torch.bmm(queries_GQD, sources_GSD.transpose(1, 2))
        scores_GQS.unflatten(2, (context, -1)).masked_fill_(self.excluded_GQS.unsqueeze(2), -torch.inf)
        return scores_GQS

    def _best(self, scores_GQS: Tensor) -> tuple[Tensor, Tensor]:
        """At least the `top` largest scores, descending, and all that are equal to the last of them."""
        count = min(self.top + SPARE, scores_GQS.shape[-1])
        while True:
            values_GQK, sources_GQK = scores_GQS.topk(count)
            if count == scores_GQS.shape[-1]:
                return values_GQK, sources_GQK
            edge_GQ = values_GQK[..., -1]
            ties = (edge_GQ == values_GQK[..., self.top - 1]) & (edge_GQ > -torch.inf)
            # Repeated frames or patches of one color can have any number of ties.
            if not ties.any():
                return values_GQK, sources_GQK
            count = min(4 * count, scores_GQS.shape[-1])

    def _store(self, normalized_hwD: Tensor, labels_hwC: Tensor, *, slot: int) -> None:
        for stored_GFSX, new_hwX in ((self._features_GFSD, normalized_hwD), (self._labels_GFSC, labels_hwC)):
            padded = F.pad(new_hwX, (0, 0, *self.columns.padding, *self.rows.padding))
            rows, columns = self.rows, self.columns
            windows = padded.unfold(0, rows.window, rows.tile).unfold(1, columns.window, columns.tile)
            shape = (rows.count, columns.count, rows.window, columns.window, -1)
            stored_GFSX[:, slot].view(shape).copy_(windows.permute(0, 1, 3, 4, 2))

    def _tile(self, map_hwX: Tensor) -> Tensor:
        rows, columns = self.rows, self.columns
        missing = (0, 0, 0, columns.count * columns.tile - self.w, 0, rows.count * rows.tile - self.h)
        tiles = (
            F.pad(map_hwX, missing).unflatten(0, (rows.count, rows.tile)).unflatten(2, (columns.count, columns.tile))
        )
        return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def _untile(self, tiles_GQX: Tensor) -> Tensor:
        rows, columns = self.rows, self.columns
        tiles = tiles_GQX.unflatten(0, (rows.count, columns.count)).unflatten(2, (rows.tile, columns.tile))
        return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: self.h, : self.w]


def _allowed(rows: TiledAxis, columns: TiledAxis, *, neighborhood: int) -> Tensor:
    """Which sources of a window are in the neighborhood of each query: (G, Q, S)."""
    near = []
    for axis in (rows, columns):
        starts = torch.arange(axis.count)[:, None] * axis.tile
        queries = (starts + torch.arange(axis.tile))[:, :, None]
        sources = (starts - axis.reach + torch.arange(axis.window))[:, None, :]
        # Padded queries have no sources: their similarities, all 0, would be ties.
        inside = (sources >= 0) & (sources < axis.length) & (queries < axis.length)
        near.append(inside & ((queries - sources).abs() <= neighborhood))
    rows_RqS, columns_RqS = near
    both = rows_RqS[:, None, :, None, :, None] & columns_RqS[None, :, None, :, None, :]
    return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def one_hot_labels(labels_HW: Tensor, *, count: int) -> Tensor:
    """Labels 0 ... count - 1 as one-hot vectors (H, W, count), float32."""
    return F.one_hot(labels_HW.long(), count).float()


@torch.no_grad()
def label_maps(labels_BhwC: Tensor, *, size: tuple[int, int]) -> Tensor:
    """The label of each pixel (B, H, W), uint8, with H and W from `size`.

    The map of each label is upsampled bilinearly and scaled to 0 ... 1; a pixel gets the label with the largest value.
    """
    maps_BChw = labels_BhwC.permute(0, 3, 1, 2)
    maps_BCHW = F.interpolate(maps_BChw, size=size, mode="bilinear", align_corners=False)
    low, high = maps_BCHW.amin(dim=(2, 3), keepdim=True), maps_BCHW.amax(dim=(2, 3), keepdim=True)
    # A constant map above 0 becomes 0 / 0 = NaN, which is the largest value: a label that fills the frame keeps it.
    scaled = torch.where(high > 0, (maps_BCHW - low) / (high - low), maps_BCHW)
    return scaled.argmax(dim=1).to(torch.uint8)
