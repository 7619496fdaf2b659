"""Propagates the masks of a video with the original's functions and ours on the same features; prints the differences.

    python benchmarks/video.py --original DIR --data DAVIS                  untrained ViT-S/16, minutes on 2 CPU cores
    python benchmarks/video.py --original DIR --data DAVIS --checkpoint teacher.safetensors --sequences 3

DIR is a checkout of facebookresearch/dino (the figures in docs/fidelity.md: commit 7c446df), DAVIS a folder in the
benchmark's layout. The compared functions of the original are `label_propagation`, `norm_mask`, `read_seg`, and
`read_frame` if OpenCV is installed; without a GPU, `.cuda()` does nothing.
"""

import argparse
import importlib
import queue
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.checkpoints import load_network
from dino_lightning.config import DavisData, VideoEval
from dino_lightning.data.benchmarks.davis import Sequence, open_davis
from dino_lightning.evaluation.video.frames import Frames, frame_size, resize_labels
from dino_lightning.evaluation.video.propagation import Propagation, label_maps, one_hot_labels
from dino_lightning.evaluation.video.tracking import frames_std
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import patch_size, patch_tokens

CONFIG = VideoEval()


@dataclass
class Result:
    """The results of one side for a sequence."""

    soft: list[Tensor] = field(default_factory=list)
    """Soft labels (h, w, C) of frames 1, 2, ..."""
    maps: list[Tensor] = field(default_factory=list)
    """Label maps (H, W) at the input size of the network."""
    seconds: float = 0.0
    """Duration of the propagation, without enlarging the maps and the original's loop that builds the neighborhood."""


def main() -> None:
    """Run both sides on each sequence and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of facebookresearch/dino")
    parser.add_argument("--data", required=True, help="unpacked DAVIS folder")
    parser.add_argument("--checkpoint", default="untrained:vit_small", help="a ViT, as for dino eval")
    parser.add_argument("--sequences", type=int, default=1, help="number of sequences, from the start of the list")
    parser.add_argument("--frames", type=int, default=25, help="maximum number of frames of each sequence")
    parser.add_argument(
        "--dtype", choices=["float64", "float32"], default="float32", help="precision of the propagation"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = original_module(options.original, on_cpu=device.type == "cpu")
    network = load_network(options.checkpoint, key="teacher", seed=0)
    network.backbone.to(device)
    sequences = open_davis(DavisData(path=options.data)).sequences[: options.sequences]
    print(f"{network.name} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("sequence            frames  |d frame|  |d soft|  different pixels  original s  ours s  speedup")
    for sequence in sequences:
        count = min(options.frames, len(sequence))
        compare(module, network, sequence, frames=count, device=device, dtype=getattr(torch, options.dtype))


def original_module(checkout: Path, *, on_cpu: bool) -> Any:
    """Import the original's script; without OpenCV only its `read_frame` does not work."""
    sys.path.insert(0, str(checkout))
    for name in ("cv2", "tqdm"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].tqdm = iter  # type: ignore[attr-defined]
    if on_cpu:
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    module: Any = importlib.import_module("eval_video_segmentation")
    module.args = types.SimpleNamespace(size_mask_neighborhood=CONFIG.neighborhood, topk=CONFIG.top)
    return module


def compare(
    module: Any, network: FrozenNetwork, sequence: Sequence, *, frames: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare one sequence and print a row."""
    patch = patch_size(network.backbone)
    size = frame_size(sequence.size, shorter=CONFIG.image_size or network.size, patch=patch)
    read = Frames([sequence], sizes=[size], bad_images=Path("bad_images.txt"))
    images = torch.stack([read[0, index][0] for index in range(frames)]).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.mean, frames_std(network.std, CONFIG)))
    images = (images - mean) / std
    frame_difference = "no OpenCV"
    if hasattr(module.cv2, "imread"):
        theirs = [module.read_frame(str(path))[0] for path in sequence.frames[:frames]]
        frame_difference = f"{max((a - b).abs().max().item() for a, b in zip(theirs, images, strict=True)):.2e}"
    features = [patch_tokens(network.backbone, image.unsqueeze(0).to(device))[0].to(dtype) for image in images]
    h, w, _ = features[0].shape
    small = torch.from_numpy(resize_labels(sequence.labels(0), size=(h, w)).copy())
    first_hwC = one_hot_labels(small, count=sequence.objects + 1).to(device)
    theirs_1Chw, _ = module.read_seg(str(sequence.masks[0]), patch)
    assert torch.equal(theirs_1Chw[0].permute(1, 2, 0), first_hwC.cpu())
    original = run_original(module, features, theirs_1Chw.to(dtype), patch=patch)
    ours = run_ours(features, first_hwC.to(dtype), size=size)
    soft = max((a - b).abs().max().item() for a, b in zip(original.soft, ours.soft, strict=True))
    pixels = sum(int((a != b).sum()) for a, b in zip(original.maps, ours.maps, strict=True))
    total = sum(labels.numel() for labels in ours.maps)
    print(
        f"{sequence.name:18s} {frames:7d} {frame_difference:>10s} {soft:9.1e} {pixels:5d} of {total:.1e} "
        f"{original.seconds:8.2f} {ours.seconds:7.2f} {original.seconds / ours.seconds:10.1f}",
        flush=True,
    )


class StoredFeatures:
    """Replaces the original's network: returns features that were extracted earlier."""

    def __init__(self, features: list[Tensor], *, patch: int) -> None:
        self.features = features
        self.patch_embed = types.SimpleNamespace(patch_size=patch)

    def get_intermediate_layers(self, frame_13HW: Tensor, n: int) -> list[Tensor]:
        """Features of the frame whose index is in the pixels, after an empty class token."""
        tokens_1ND = self.features[int(frame_13HW.flatten()[0])].flatten(0, 1).unsqueeze(0)
        return [torch.cat([torch.zeros_like(tokens_1ND[:, :1]), tokens_1ND], dim=1)]


def run_original(module: Any, features: list[Tensor], first_1Chw: Tensor, *, patch: int) -> Result:
    """Run the loop of `eval_video_tracking_davis` with the original's functions."""
    model, result = StoredFeatures(features, patch=patch), Result()
    h, w, _ = features[0].shape
    numbered = [torch.full((3, h * patch, w * patch), float(number)) for number in range(len(features))]
    first_Dn = module.extract_feature(model, numbered[0]).T
    near = module.restrict_neighborhood(h, w).to(first_Dn.dtype).unsqueeze(0)
    context: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue(CONFIG.last_frames)
    with torch.no_grad():
        for frame in numbered[1:]:
            previous = list(context.queue)
            started = now(first_Dn)
            soft_1Chw, feature_Dn, _ = module.label_propagation(
                module.args,
                model,
                frame,
                [first_Dn, *(feature for feature, _ in previous)],
                [first_1Chw, *(soft for _, soft in previous)],
                near,
            )
            result.seconds += now(first_Dn) - started
            if context.full():
                context.get()
            context.put((feature_Dn, soft_1Chw.clone()))
            result.soft.append(soft_1Chw[0].permute(1, 2, 0).cpu())
            large = F.interpolate(soft_1Chw, scale_factor=patch, mode="bilinear", align_corners=False)[0]
            result.maps.append(module.norm_mask(large).max(dim=0).indices.cpu())
    return result


def run_ours(features: list[Tensor], first_hwC: Tensor, *, size: tuple[int, int]) -> Result:
    """Run our `Propagation`."""
    result = Result()
    started = now(first_hwC)
    propagation = Propagation(
        features[0],
        first_hwC,
        last_frames=CONFIG.last_frames,
        neighborhood=CONFIG.neighborhood,
        top=CONFIG.top,
        temperature=CONFIG.temperature,
    )
    soft_ThwC = torch.stack([propagation.step(feature) for feature in features[1:]])
    result.seconds = now(first_hwC) - started
    result.soft = list(soft_ThwC.cpu())
    result.maps = list(label_maps(soft_ThwC, size=size).long().cpu())
    return result


def now(tensor: Tensor) -> float:
    """The clock in seconds, after the tensor's device has finished its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
