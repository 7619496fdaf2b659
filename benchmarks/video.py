"""Propagate a video's masks by the original's functions and by ours on the same features, and print the differences.

    python benchmarks/video.py --original DIR --data DAVIS                  untrained ViT-S/16, minutes on 2 CPU cores
    python benchmarks/video.py --original DIR --data DAVIS --checkpoint teacher.safetensors --sequences 3

DIR is a checkout of facebookresearch/dino (the figures in docs/fidelity.md: commit 7c446df), DAVIS a folder in the
benchmark's layout. What runs of the original is `label_propagation`, `norm_mask`, `read_seg`, and where OpenCV is
installed `read_frame`, with `.cuda()` made a no-op where there is no GPU.
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
from dino_lightning.evaluation.video.frames import Frames, frame_size, resized_labels
from dino_lightning.evaluation.video.propagation import Propagation, label_maps, one_hot_labels
from dino_lightning.evaluation.video.tracking import frames_std
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import patch_size, patch_tokens

CONFIG = VideoEval()


@dataclass
class Run:
    """What one side made of a sequence."""

    soft: list[Tensor] = field(default_factory=list)
    """(h, w, C) of frames 1, 2, ..."""
    maps: list[Tensor] = field(default_factory=list)
    """(H, W) at the size that the network saw."""
    seconds: float = 0.0
    """Of the propagation: not of enlarging the maps, nor of the original's loop that makes the neighborhood."""


def main() -> None:
    """Run both on each sequence and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of facebookresearch/dino")
    parser.add_argument("--data", required=True, help="DAVIS as it unpacks")
    parser.add_argument("--checkpoint", default="untrained:vit_small", help="as of dino eval; a ViT")
    parser.add_argument("--sequences", type=int, default=1, help="the first of the list")
    parser.add_argument("--frames", type=int, default=25, help="most frames of each")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float32", help="of the propagation")
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = original_module(options.original, on_cpu=device.type == "cpu")
    network = load_network(options.checkpoint, key="teacher", seed=0)
    network.backbone.to(device)
    sequences = open_davis(DavisData(path=options.data)).sequences[: options.sequences]
    print(f"{network.name} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("sequence            frames  |d frame|  |d soft|  pixels apart  original s  ours s  times faster")
    for sequence in sequences:
        count = min(options.frames, len(sequence))
        compare(module, network, sequence, frames=count, device=device, dtype=getattr(torch, options.dtype))


def original_module(checkout: Path, *, on_cpu: bool) -> Any:
    """The original's script as a module; without OpenCV it loads too, only its reading of frames does not work."""
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
    """Print a row."""
    patch = patch_size(network.backbone)
    size = frame_size(sequence.size, shorter=CONFIG.image_size or network.size, patch=patch)
    read = Frames([sequence], sizes=[size], bad_images=Path("bad_images.txt"))
    images = torch.stack([read[0, index][0] for index in range(frames)]).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.mean, frames_std(network.std, CONFIG)))
    images = (images - mean) / std
    apart = "no OpenCV"
    if hasattr(module.cv2, "imread"):
        theirs = [module.read_frame(str(path))[0] for path in sequence.frames[:frames]]
        apart = f"{max((a - b).abs().max().item() for a, b in zip(theirs, images, strict=True)):.2e}"
    features = [patch_tokens(network.backbone, image.unsqueeze(0).to(device))[0].to(dtype) for image in images]
    h, w, _ = features[0].shape
    small = torch.from_numpy(resized_labels(sequence.labels(0), size=(h, w)).copy())
    first_hwC = one_hot_labels(small, count=sequence.objects + 1).to(device)
    theirs_1Chw, _ = module.read_seg(str(sequence.masks[0]), patch)
    assert torch.equal(theirs_1Chw[0].permute(1, 2, 0), first_hwC.cpu())
    original = run_original(module, features, theirs_1Chw.to(dtype), patch=patch)
    ours = run_ours(features, first_hwC.to(dtype), size=size)
    soft = max((a - b).abs().max().item() for a, b in zip(original.soft, ours.soft, strict=True))
    pixels = sum(int((a != b).sum()) for a, b in zip(original.maps, ours.maps, strict=True))
    of = sum(each.numel() for each in ours.maps)
    print(
        f"{sequence.name:18s} {frames:7d} {apart:>10s} {soft:9.1e} {pixels:5d} of {of:.1e} {original.seconds:8.2f} "
        f"{ours.seconds:7.2f} {original.seconds / ours.seconds:10.1f}",
        flush=True,
    )


class Features:
    """Stands for the original's network: gives features that were extracted before."""

    def __init__(self, features: list[Tensor], *, patch: int) -> None:
        self.features = features
        self.patch_embed = types.SimpleNamespace(patch_size=patch)

    def get_intermediate_layers(self, frame_13HW: Tensor, n: int) -> list[Tensor]:
        """Of the frame whose number its pixels hold, with an empty class token in front."""
        tokens_1ND = self.features[int(frame_13HW.flatten()[0])].flatten(0, 1).unsqueeze(0)
        return [torch.cat([torch.zeros_like(tokens_1ND[:, :1]), tokens_1ND], dim=1)]


def run_original(module: Any, features: list[Tensor], first_1Chw: Tensor, *, patch: int) -> Run:
    """The loop of `eval_video_tracking_davis` around the original's own functions."""
    model, run = Features(features, patch=patch), Run()
    h, w, _ = features[0].shape
    numbered = [torch.full((3, h * patch, w * patch), float(number)) for number in range(len(features))]
    first_Dn = module.extract_feature(model, numbered[0]).T
    near = module.restrict_neighborhood(h, w).to(first_Dn.dtype).unsqueeze(0)
    before: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue(CONFIG.last_frames)
    with torch.no_grad():
        for frame in numbered[1:]:
            kept = list(before.queue)
            started = now(first_Dn)
            soft_1Chw, feature_Dn, _ = module.label_propagation(
                module.args,
                model,
                frame,
                [first_Dn, *(feature for feature, _ in kept)],
                [first_1Chw, *(soft for _, soft in kept)],
                near,
            )
            run.seconds += now(first_Dn) - started
            if before.full():
                before.get()
            before.put((feature_Dn, soft_1Chw.clone()))
            run.soft.append(soft_1Chw[0].permute(1, 2, 0).cpu())
            large = F.interpolate(soft_1Chw, scale_factor=patch, mode="bilinear", align_corners=False)[0]
            run.maps.append(module.norm_mask(large).max(dim=0).indices.cpu())
    return run


def run_ours(features: list[Tensor], first_hwC: Tensor, *, size: tuple[int, int]) -> Run:
    """The same by `Propagation`."""
    run = Run()
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
    run.seconds = now(first_hwC) - started
    run.soft = list(soft_ThwC.cpu())
    run.maps = list(label_maps(soft_ThwC, size=size).long().cpu())
    return run


def now(tensor: Tensor) -> float:
    """The clock when the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
