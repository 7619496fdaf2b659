"""`eval=attention` from images to figures, pictures and clips, on a small network."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation_tools import timm_network, tiny_network, tiny_task
from PIL import Image
from ranks import on_ranks
from test_attention_masks import slow_jaccard, slow_mask
from torchvision.transforms import InterpolationMode, Resize
from voc_cases import write_voc

from dino_lightning.config import AttentionEval, BuiltinData, FolderData, ImagesConfig, PicturesData, VOCData
from dino_lightning.errors import UserError
from dino_lightning.evaluation.attention.attention import checked_side, evaluate
from dino_lightning.evaluation.attention.images import FullImageView
from dino_lightning.evaluation.attention.pictures import picture_names
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import cls_attention
from dino_lightning.runtime.collectives import leave_group

BUILTIN = BuiltinData(train_images=12, val_images=13, num_workers=0)


def run(task: Task, **config: Any) -> dict[str, Result]:
    return {result.metric: result for result in evaluate(AttentionEval(**{"pictures": 2, **config}), task)}


def pictures_of(task: Task) -> list[str]:
    return sorted(path.name for path in (task.output / "pictures").iterdir())


def noise(path: Path, size: tuple[int, int], *, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


def refusal(network: FrozenNetwork, data: ImagesConfig, tmp_path: Path, **config: Any) -> str:
    """The error message, which comes before the network processes an image."""
    network.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(UserError) as caught:
        run(tiny_task(tmp_path, network, data=data), **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_full_view_resizes_and_crops(tmp_path: Path):
    network = tiny_network(patch_size=8)
    noise(tmp_path / "a.png", (50, 37))
    image = Image.open(tmp_path / "a.png")
    view = FullImageView(network, size=45)
    resized = Resize(45, InterpolationMode.BICUBIC)(image)
    assert resized.size == (60, 45)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[:, :40, :56] / 255
    expected = (pixels - torch.tensor(network.mean)[:, None, None]) / torch.tensor(network.std)[:, None, None]
    torch.testing.assert_close(view.image(image), expected)
    labels = np.arange(37 * 50).reshape(37, 50).astype(np.uint8)
    nearest = np.asarray(Image.fromarray(labels).resize((60, 45), Image.Resampling.NEAREST))[:40, :56]
    assert np.array_equal(view.labels(labels).numpy(), nearest)


def test_side_of_the_images():
    small, large = tiny_network(32), tiny_network(128)

    def side(network: FrozenNetwork, data: ImagesConfig, image_size: int | None = None) -> int:
        return checked_side(AttentionEval(image_size=image_size), tiny_task(Path(), network, data=data))

    folder, voc = FolderData(path="."), VOCData(path=".")
    assert [side(small, data) for data in (BUILTIN, folder, voc, PicturesData(path="."))] == [32, 32, 480, 480]
    assert [side(large, data) for data in (BUILTIN, folder, voc)] == [128, 480, 480]
    assert [side(small, data, 96) for data in (BUILTIN, folder, voc)] == [96, 96, 96]


def test_built_in_images_against_slow_loops(tmp_path: Path):
    network = tiny_network()
    task = tiny_task(tmp_path, network, data=BUILTIN)
    found = run(task, batch_size_per_device=4, masses=[0.6, 0.8])
    assert [name for name, result in found.items() if result.main] == ["jaccard_best_head_60", "jaccard_best_head_80"]
    assert next(iter(found)) == "jaccard_best_head_60"
    source: Any = task.splits.val
    for mass in (60, 80):
        best, heads = [], []
        for i in range(13):
            image = FullImageView(network, size=32).image(Image.fromarray(source.read(i)))
            maps = cls_attention(network.backbone, image[None])[0]  # type: ignore[arg-type]
            true, nothing = torch.from_numpy(source.mask(i)), torch.zeros(32, 32, dtype=torch.bool)
            masks = [
                torch.tensor(slow_mask(each.flatten().double().tolist(), mass / 100)).reshape(4, 4) for each in maps
            ]
            scores = [slow_jaccard(mask, true, nothing) for mask in masks]
            best.append(max(scores))
            heads.append(scores)
        assert found[f"jaccard_best_head_{mass}"].value == pytest.approx(100 * np.mean(best), abs=1e-9)
        mean = found[f"jaccard_mean_head_{mass}"]
        assert mean.value == pytest.approx(100 * np.mean(heads), abs=1e-9)
        assert mean.details["of_head"] == pytest.approx(list(100 * np.mean(heads, axis=0)), abs=1e-9)
        of_image = found[f"jaccard_best_head_{mass}"].details["of_image"]
        assert list(of_image.values()) == pytest.approx([100 * each for each in best], abs=1e-9)
        assert next(iter(of_image)) == source.describe(0)
    assert pictures_of(task) == ["attention.png", "heads.png", "pca.png"]


def test_pictures_of_untrained_networks_and_without_pca(tmp_path: Path):
    network = tiny_network()
    task = tiny_task(tmp_path, network.__class__(**{**vars(network), "trained": False}), data=BUILTIN)
    run(task, pca=False)
    assert pictures_of(task) == ["attention_untrained.png", "heads_untrained.png"]


def test_no_pictures(tmp_path: Path):
    task = tiny_task(tmp_path, tiny_network(), data=BUILTIN)
    assert run(task, pictures=0)
    assert not (task.output / "pictures").exists()


def _run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network, root = tiny_network(), Path(folder) / str(rank)
    # One frame more than two ranks share.
    kinds = {
        "builtin": BUILTIN,
        "clip": PicturesData(path=f"{folder}/clip.gif", num_workers=0),
        "voc": VOCData(path=f"{folder}/voc", num_workers=0),
    }
    found = {name: run(tiny_task(root / name, network, data=data), image_size=32) for name, data in kinds.items()}
    torch.save({name: results_of(each) for name, each in found.items()}, f"{folder}/{rank}.pt")
    leave_group()


def results_of(found: dict[str, Result]) -> dict[str, Any]:
    return {name: (each.value, each.details.get("of_image")) for name, each in found.items()}


def gif(path: Path, *, frames: int) -> None:
    shown = []
    for i in range(frames):
        noise(path.with_name("frame.png"), (48, 40), seed=i)
        shown.append(Image.open(path.with_name("frame.png")).convert("RGB"))
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=80)


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(tmp_path: Path):
    gif(tmp_path / "clip.gif", frames=5)
    write_voc(tmp_path / "voc", size=(40, 32))
    on_ranks(_run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    network = tiny_network()
    alone = results_of(run(tiny_task(tmp_path / "alone", network, data=BUILTIN), image_size=32))
    assert alone == first["builtin"]
    data = PicturesData(path=str(tmp_path / "clip.gif"), num_workers=0)
    areas = results_of(run(tiny_task(tmp_path / "one", network, data=data), image_size=32))
    assert {name: value for name, (value, _) in areas.items()} == pytest.approx(
        {name: value for name, (value, _) in first["clip"].items()}
    )


def test_voc_layout_with_a_broken_image(tmp_path: Path):
    root = write_voc(tmp_path / "voc", size=(40, 32))
    (root / "JPEGImages" / "2007_2.jpg").write_bytes(b"\xff\xd8\xff broken")
    task = tiny_task(tmp_path, tiny_network(), data=VOCData(path=str(root), num_workers=0))
    found = run(task, image_size=32)
    assert set(found) == {
        f"{kind}_{which}_head_{mass}"
        for kind in ("jaccard", "foreground")
        for which in ("best", "mean")
        for mass in (60, 80)
    }
    assert list(found["jaccard_best_head_60"].details["of_image"]) == ["2007_1", "2008_3"]
    assert (task.output / "bad_images.txt").read_text().startswith("2007_2\t")


def test_nothing_readable(tmp_path: Path):
    root = write_voc(tmp_path / "voc", names=("a",), size=(40, 32))
    (root / "SegmentationClass" / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 1 images is readable and has an object"):
        run(tiny_task(tmp_path, tiny_network(), data=VOCData(path=str(root), num_workers=0)))


def test_folder_of_training_images(tmp_path: Path):
    for i in range(6):
        noise(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", (40 + 8 * (i % 3), 32), seed=i)
    data = FolderData(path=str(tmp_path / "images"), cache_dir=str(tmp_path / "lists"), num_workers=0, holdout=0)
    task = tiny_task(tmp_path, tiny_network(), data=data)
    found = run(task, pictures=4, batch_size_per_device=3)
    assert list(found) == ["area_60", "area_80"]
    assert 0 < found["area_60"].value < found["area_80"].value < 100
    assert len(found["area_60"].details["images"]) == 4
    assert pictures_of(task) == ["attention.png", "heads.png", "pca.png"]
    assert "eval.pictures=0" in refusal(tiny_network(), data, tmp_path, pictures=0)


def test_every_image_of_a_folder_has_its_picture(tmp_path: Path):
    noise(tmp_path / "images" / "cat.png", (48, 36))
    noise(tmp_path / "images" / "cat.jpg", (36, 52))
    noise(tmp_path / "images" / "more" / "a dog.png", (64, 32))
    (tmp_path / "images" / "zero.png").touch()
    task = tiny_task(tmp_path, tiny_network(), data=PicturesData(path=str(tmp_path / "images"), num_workers=0))
    found = run(task, image_size=32)
    assert found["area_60"].main
    assert pictures_of(task) == ["attention.png", "cat.png", "cat_2.png", "heads.png", "more_a_dog.png", "pca.png"]
    assert "zero.png" in (task.output / "bad_images.txt").read_text()


def test_one_image_has_one_picture(tmp_path: Path):
    noise(tmp_path / "cat.png", (48, 36))
    task = tiny_task(tmp_path, tiny_network(), data=PicturesData(path=str(tmp_path / "cat.png"), num_workers=0))
    run(task, image_size=32, pca=False)
    assert pictures_of(task) == ["cat.png"]


def test_animation_becomes_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gif(tmp_path / "wave.gif", frames=5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    task = tiny_task(tmp_path, tiny_network(), data=PicturesData(path=str(tmp_path / "wave.gif"), num_workers=0))
    found = run(task, image_size=40, batch_size_per_device=2, frames_per_second=20.0)
    assert found["area_80"].details["video"].endswith("wave.webp")
    assert pictures_of(task) == ["attention.png", "heads.png", "pca.png", "wave.webp"]
    with Image.open(task.output / "pictures" / "wave.webp") as clip:
        assert getattr(clip, "n_frames", 1) == 5
        assert clip.size == (4 * 48, 40)
        clip.seek(2)
        clip.load()
        assert clip.info["duration"] == 50


def test_picture_names_are_unique():
    root = Path("/r")
    paths = [root / name for name in ("a.png", "A.jpg", "b/a.png", "b_a.png", "heads.png", "x y:z.png", "v1.2.png")]
    assert picture_names(paths, root=root) == ["a", "A_2", "b_a", "b_a_2", "heads_2", "x_y_z", "v1.2"]


def test_other_networks_and_sizes_are_refused(tmp_path: Path):
    found = refusal(timm_network("resnet18"), BUILTIN, tmp_path)
    assert found.startswith("checkpoint: resnet18 (ResNet) has no class token")
    found = refusal(tiny_network(), BUILTIN, tmp_path, image_size=7)
    assert found == "eval.image_size=7 is less than a patch of vit0; set it to at least 8."
    root = write_voc(tmp_path / "voc", size=(40, 32))
    Image.new("L", (32, 32)).save(root / "SegmentationClass" / "2007_1.png")
    assert "has 32 x 32 pixels, but its image has 40 x 32" in refusal(tiny_network(), VOCData(path=str(root)), tmp_path)


def test_real_photographs(shared_data: Path, tmp_path: Path):
    data = VOCData(path=str(shared_data / "voc_labelme3"), num_workers=0)
    task = tiny_task(tmp_path, tiny_network(patch_size=16), data=data)
    found = run(task, image_size=160, pictures=3)
    assert 0 < found["jaccard_mean_head_60"].value <= found["jaccard_best_head_60"].value < 100
    assert found["jaccard_best_head_60"].details["images"] == 3
    # Of classes apart, void included, an attention map can fit at most what it fits of all together; not a law, but
    # true of these photographs.
    assert found["foreground_best_head_80"].value > found["jaccard_best_head_80"].value
