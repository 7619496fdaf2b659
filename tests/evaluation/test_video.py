"""The evaluation on videos: figures, masks, broken sequences, resuming, and several ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from davis_cases import FRAMES, HEIGHT, PALETTE, WIDTH, disks, frame_path, mask_path, write_davis, write_frame
from evaluation_tools import timm_network, tiny_network, tiny_task
from PIL import Image
from torch import Tensor

from dino_lightning.config import DavisData, VideoEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.video.davis_scores import object_scores
from dino_lightning.evaluation.video.frames import frame_size, resize_frame, resize_labels
from dino_lightning.evaluation.video.propagation import Propagation, label_maps, one_hot_labels
from dino_lightning.evaluation.video.tracking import frames_std
from dino_lightning.evaluation.video.video import balance_sequences, evaluate
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.tokens import patch_tokens
from dino_lightning.runtime.collectives import leave_group

METRICS = ["j_and_f_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"]


def config(**other: Any) -> VideoEval:
    return VideoEval(**{"image_size": 64, "neighborhood": 3, "last_frames": 2, **other})


def run(tmp_path: Path, data: DavisData, network: FrozenNetwork | None = None, **other: Any) -> list[Result]:
    return list(evaluate(config(**other), task(tmp_path, data, network)))


def task(tmp_path: Path, data: DavisData, network: FrozenNetwork | None = None, **other: Any) -> Task:
    return tiny_task(tmp_path, network or tiny_network(), data=data, **other)


def masks_of(tmp_path: Path, name: str, folder: str = "masks") -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / folder / name).iterdir())])


def step_by_step(data: DavisData, network: FrozenNetwork, name: str, **other: Any) -> np.ndarray:
    """The masks of a sequence, one frame at a time, without loader, batches or ranks."""
    settings = config(**other)
    std = frames_std(network.std, settings)

    def features(index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(Image.open(frame_path(Path(data.path), name, index)))).permute(2, 0, 1)
        image = resize_frame(pixels, size=(64, 64)) / 255
        normalized = (image - torch.tensor(network.mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        return patch_tokens(network.backbone, normalized.unsqueeze(0))[0]

    first = disks(HEIGHT, WIDTH, shift=0)
    small = torch.from_numpy(resize_labels(first, size=(8, 8)).copy())
    propagation = Propagation(
        features(0),
        one_hot_labels(small, count=3),
        last_frames=settings.last_frames,
        neighborhood=settings.neighborhood,
        top=settings.top,
        temperature=settings.temperature,
    )
    masks = [first]
    for index in range(1, FRAMES):
        soft = propagation.step(features(index)).unsqueeze(0)
        masks.append(resize_labels(label_maps(soft, size=(64, 64))[0].numpy(), size=(HEIGHT, WIDTH)))
    return np.stack(masks)


@pytest.mark.parametrize(
    "other", [{}, {"batch_size_per_device": 1}, {"last_frames": 0, "top": 2}, {"std_typo": False, "temperature": 0.5}]
)
def test_masks_and_figures(tmp_path: Path, other: dict[str, Any]) -> None:
    data, network = write_davis(tmp_path / "davis"), tiny_network()
    results = run(tmp_path, data, network, **other)
    masks = masks_of(tmp_path, "cow")
    np.testing.assert_array_equal(masks, step_by_step(data, network, "cow", **other))
    truth = torch.from_numpy(np.stack([disks(HEIGHT, WIDTH, shift=3 * i) for i in range(FRAMES)]))
    expected = object_scores(torch.from_numpy(masks), truth, objects=2)
    assert [result.metric for result in results] == METRICS
    assert [result.main for result in results] == [True, True, False, False, True, False, False]
    found = results[0].details["sequences"]
    assert list(found) == ["cow", "bus"]
    assert found["cow"]["frames"] == FRAMES
    assert [list(scores.values()) for scores in found["cow"]["objects"]] == [each.values() for each in expected]
    values = {result.metric: result.value for result in results}
    objects = [scores for sequence in found.values() for scores in sequence["objects"]]
    for metric in METRICS[1:]:
        assert values[metric] == pytest.approx(sum(scores[metric] for scores in objects) / 4)
    assert values["j_and_f_mean"] == pytest.approx((values["j_mean"] + values["f_mean"]) / 2)
    assert values["j_mean"] > 20


def test_masks_look_like_those_of_the_benchmark(tmp_path: Path) -> None:
    data = write_davis(tmp_path / "davis")
    run(tmp_path, data)
    folder = tmp_path / "out/masks/cow"
    assert [path.name for path in sorted(folder.iterdir())] == [f"{index:05}.png" for index in range(FRAMES)]
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("P", (WIDTH, HEIGHT))
            assert (image.getpalette() or [])[:9] == PALETTE[:9]
    np.testing.assert_array_equal(masks_of(tmp_path, "cow")[0], disks(HEIGHT, WIDTH, shift=0))
    with Image.open(tmp_path / "out/pictures/video.png") as picture:
        assert picture.width > picture.height / 2


def test_one_object_of_2016(tmp_path: Path) -> None:
    results = run(tmp_path, write_davis(tmp_path / "davis", year=2016))
    assert set(np.unique(masks_of(tmp_path, "bus"))) == {0, 1}
    assert all(len(each["objects"]) == 1 for each in results[0].details["sequences"].values())


def test_the_baseline_has_its_own_folder_and_masks_can_be_left_unwritten(tmp_path: Path) -> None:
    data, network = write_davis(tmp_path / "davis"), tiny_network()
    baseline = FrozenNetwork(**{**vars(network), "trained": False})
    run(tmp_path, data, baseline, write_masks=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pictures"}
    run(tmp_path, data, baseline)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pictures", "masks_untrained"}
    assert [path.name for path in (tmp_path / "out/pictures").iterdir()] == ["video_untrained.png"]


def test_a_convolutional_network(tmp_path: Path) -> None:
    results = run(tmp_path, write_davis(tmp_path / "davis"), timm_network("resnet10t", image_size=64))
    assert 0 < results[0].value < 100
    assert masks_of(tmp_path, "cow").shape == (FRAMES, HEIGHT, WIDTH)


def test_sizes_of_frames() -> None:
    assert frame_size((480, 854), shorter=480, patch=16) == (480, 832)
    assert frame_size((854, 480), shorter=480, patch=8) == (832, 480)
    assert frame_size((480, 480), shorter=480, patch=8) == (480, 448)
    assert frame_size((1080, 1920), shorter=476, patch=14) == (476, 840)


@pytest.mark.parametrize("size", [(6, 9), (14, 5), (7, 20)])
def test_frames_are_resized_between_the_four_nearest_pixels(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, 10, 13), dtype=torch.uint8)
    found = resize_frame(pixels, size=size)
    assert found.dtype == torch.uint8
    for y in range(size[0]):
        for x in range(size[1]):
            # Centers of pixels are at halves; values are constant beyond the outermost ones.
            row, column = (
                min(max((place + 0.5) * of / to - 0.5, 0), of - 1)
                for place, of, to in ((y, 10, size[0]), (x, 13, size[1]))
            )
            up, left = int(row), int(column)
            down, right = min(up + 1, 9), min(left + 1, 12)
            corners = pixels.double()[:, [up, up, down, down], [left, right, left, right]].numpy()
            a, b = row - up, column - left
            value = corners @ [(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b]
            # Halves may be rounded to either side.
            assert (np.abs(found[:, y, x].numpy() - value) < 0.5 + 1e-4).all()


def test_the_original_standard_deviation_is_an_option() -> None:
    assert frames_std([0.229, 0.224, 0.225], config()) == [0.228, 0.224, 0.225]
    assert frames_std([0.229, 0.224, 0.225], config(std_typo=False)) == [0.229, 0.224, 0.225]
    assert frames_std([0.5, 0.5, 0.5], config()) == [0.5, 0.5, 0.5]


def counted(network: FrozenNetwork) -> list[int]:
    """Grows by one number at each batch of frames: how many there were."""
    seen: list[int] = []
    embed: Any = network.backbone.patch_embed
    embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


def test_finished_sequences_are_not_computed_again(tmp_path: Path) -> None:
    data, network = write_davis(tmp_path / "davis"), tiny_network()
    seen, cache = counted(network), tmp_path / "cache"

    def again(**other: Any) -> tuple[list[Result], int]:
        seen.clear()
        results = list(evaluate(config(**other), task(tmp_path, data, network, cache=cache)))
        return results, sum(seen) - 1  # a frame shows whether the network takes frames

    first, frames = again()
    assert frames == 2 * FRAMES + 1
    masks = masks_of(tmp_path, "bus")
    for path in (tmp_path / "out/masks/bus").iterdir():
        path.unlink()
    assert again() == (first, 0)
    np.testing.assert_array_equal(masks_of(tmp_path, "bus"), masks)
    assert again(batch_size_per_device=2, write_masks=False) == (first, 0)
    assert again(top=1)[1] == again(std_typo=False)[1] == 2 * FRAMES + 1
    write_frame(tmp_path / "davis", "cow", 2, Image.new("RGB", (WIDTH, HEIGHT)))
    assert again()[1] == FRAMES
    for path in (cache / "video").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert again()[1] == 2 * FRAMES + 1


def test_an_interrupted_evaluation_continues(tmp_path: Path) -> None:
    data, network = write_davis(tmp_path / "davis"), tiny_network()
    whole = run(tmp_path / "whole", data, network)
    seen, embed = counted(network), network.backbone.patch_embed

    def stop(module: Any, inputs: Any) -> None:
        if sum(seen) > FRAMES + 1:
            raise KeyboardInterrupt

    handle = embed.register_forward_pre_hook(stop)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(config(), task(tmp_path, data, network, cache=tmp_path / "cache")))
    handle.remove()
    seen.clear()
    assert list(evaluate(config(), task(tmp_path, data, network, cache=tmp_path / "cache"))) == whole
    assert sum(seen) - 1 == FRAMES + 1


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("broken", "index"),
    [(frame_path, 0), (frame_path, FRAMES - 1), (mask_path, 3)],
    ids=["first frame", "last frame", "mask"],
)
def test_a_broken_file_leaves_out_its_sequence(
    tmp_path: Path, broken: Callable[..., Path], index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_davis(tmp_path / "davis", sequences={"ant": 4, "cow": FRAMES, "bus": FRAMES})
    cut_short(broken(tmp_path / "davis", "cow", index))
    results = run(tmp_path, data)
    assert list(results[0].details["sequences"]) == ["ant", "bus"]
    assert results[0].details["left_out"] == ["cow"]
    assert "cow" in capsys.readouterr().err
    name, _, reason = (tmp_path / "out/bad_images_val.txt").read_text().strip().partition("\t")
    assert name == str(broken(tmp_path / "davis", "cow", index))
    assert reason
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("ant\nbus\n")
    assert [result.value for result in run(tmp_path / "without", data)] == [result.value for result in results]


def test_nothing_can_be_read(tmp_path: Path) -> None:
    data = write_davis(tmp_path / "davis", sequences={"cow": 4})
    cut_short(frame_path(tmp_path / "davis", "cow", 2))
    with pytest.raises(UserError, match=r"none of the sequences can be read; see .*bad_images_val.txt"):
        run(tmp_path, data)


@pytest.mark.parametrize(
    ("network", "image_size", "sentence"),
    [
        (tiny_network, 60, "eval.image_size=60: expected at least 64 pixels"),
        (tiny_network, 67, "eval.image_size=67 is not a multiple of the patch size 8; the nearest is 64"),
        (tiny_network, None, "eval.image_size=32: expected at least 64 pixels"),
        (lambda: timm_network("vit_tiny_patch16_224", depth=1), 64, "does not accept frames of 64 x 64 pixels"),
    ],
    ids=["small", "no multiple", "small by default", "one size only"],
)
def test_unsupported_sizes_are_refused(
    tmp_path: Path, network: Callable[[], FrozenNetwork], image_size: int | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, write_davis(tmp_path / "davis"), network(), image_size=image_size)


def test_shares_of_ranks() -> None:
    assert balance_sequences([5, 9, 3, 4], ranks=1) == [[0, 1, 2, 3]]
    assert balance_sequences([5, 9, 3, 4], ranks=2) == [[1, 2], [0, 3]]
    assert sorted(number for share in balance_sequences([7] * 10, ranks=3) for number in share) == list(range(10))
    assert balance_sequences([4], ranks=3) == [[0], [], []]


def _run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    data = write_davis(Path(folder) / f"davis{rank}", sequences={"ant": 4, "cow": 6, "bus": 5})
    torch.save(run(Path(folder) / "both", data), f"{folder}/{rank}.pt")
    leave_group()


def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    data = write_davis(tmp_path / "davis", sequences={"ant": 4, "cow": 6, "bus": 5})
    alone = run(tmp_path, data)
    mp.start_processes(_run_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert both == [alone, alone]
    assert [list(results[0].details["sequences"]) for results in both] == [["ant", "cow", "bus"]] * 2
    for name in ("ant", "cow", "bus"):
        np.testing.assert_array_equal(masks_of(tmp_path / "both", name), masks_of(tmp_path, name))


@pytest.mark.slow
def test_real_sequences(shared_data: Path, tmp_path: Path) -> None:
    data = DavisData(path=str(shared_data / "davis_mini6"), num_workers=2)
    network = tiny_network(224, patch_size=16, width=64)
    results = list(evaluate(VideoEval(), task(tmp_path, data, network)))
    assert len(results[0].details["sequences"]) == 6
    # Position and color alone, as an untrained network sees them, follow slow objects for a while.
    assert 25 < results[0].value < 60
    assert masks_of(tmp_path, "dog").shape == (60, 480, 854)
