"""The rule of `auto.data=true`: the paper's settings, their changes with the data, and their limits."""

from itertools import pairwise, product
from typing import Any

import pytest

from dino_lightning.config import (
    AdamWConfig,
    BYOLConfig,
    DINOConfig,
    LARSConfig,
    MoCoConfig,
    OptimConfig,
    SGDConfig,
    SupervisedConfig,
    SwAVConfig,
    TimmConfig,
    ViTConfig,
)
from dino_lightning.training.autoconfig.data_rules import (
    MAX_HORIZON_SHARE,
    MIN_HORIZON_STEPS,
    Suggestion,
    suggest_from_data,
)

IMAGES = (1, 40, 600, 2000, 9469, 50_000, 300_000, 1_281_167, 14_000_000)
SIDES = (8, 28, 32, 48, 64, 96, 100, 150.5, 160, 224, 240, 256, 500, 3000)
BATCHES = (1, 16, 64, 128, 256, 1024, 4096)
EPOCHS = (0.1, 1, 16, 100, 800)
PLACES = list(product(IMAGES, BATCHES, EPOCHS))


def values(images: int = 50_000, side: float = 32, total_batch: int = 128, epochs: float = 100, **more: Any) -> Any:
    rows = suggest_from_data(images, side=side, total_batch=total_batch, epochs=epochs, **more)
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row.value for row in rows}


def test_imagenet_gets_the_settings_of_the_paper() -> None:
    found = values(1_281_167, side=375, total_batch=1024, epochs=100)
    assert found == {
        "backbone.patch_size": 16,
        "crops.global_size": 224,
        "crops.global_scale": [0.4, 1.0],
        "crops.local_size": 96,
        "crops.local_scale": [0.05, 0.4],
        "crops.local_count": 8,
        "crops.eval_resize": 256,
        "crops.eval_size": 224,
        "method.out_dim": 65536,
        "method.freeze_last_layer": "1%",  # 1 of 100 epochs
        "method.teacher_momentum": 0.996,
        "method.teacher_temperature": 0.04,
        "method.teacher_temperature_start": 0.04,
        "method.teacher_temperature_warmup": "0ep",
        "optim.lr": 0.0005,
        "optim.lr_warmup": "10%",  # 10 of 100 epochs
    }
    shared = {key: value for key, value in found.items() if not str(value).endswith("%")}
    configs = {"crops": {}, "method": DINOConfig(), "optim": AdamWConfig(), "backbone": ViTConfig()}
    for key, value in shared.items():
        group, name = key.split(".")
        if group != "crops":
            assert getattr(configs[group], name) == value, key


def test_at_256_images_a_step_the_momentum_is_the_published_one() -> None:
    assert values(1_281_167, side=375, total_batch=256)["method.teacher_momentum"] == 0.9995
    assert values(1_281_167, side=375, total_batch=4096)["method.teacher_momentum"] == 0.996


def test_every_row_has_a_short_reason() -> None:
    for images, side in product(IMAGES, SIDES):
        for row in suggest_from_data(images, side=side, total_batch=64):
            assert 3 <= len(row.reason) <= 90, row
            assert not row.by_user


@pytest.mark.parametrize("method", [DINOConfig(), SwAVConfig()])
def test_prototypes_grow_with_the_images_within_bounds(method: Any) -> None:
    counts = [values(images, method=method)["method.out_dim"] for images in IMAGES]
    assert counts == sorted(counts)
    assert counts[0] == 64
    assert counts[-1] == (65536 if isinstance(method, DINOConfig) else 3000)
    for images, count in zip(IMAGES, counts, strict=True):
        assert count == 64 or count <= images / 3, (images, count)


def test_the_teacher_never_averages_over_more_than_a_share_of_the_run() -> None:
    for images, batch, epochs in PLACES:
        momentum = values(images, total_batch=batch, epochs=epochs)["method.teacher_momentum"]
        steps = max(1.0, epochs * images / batch)
        assert 0.98 <= momentum <= 0.9995, "a faster teacher collapsed"
        # Momentum is rounded to two digits of what is missing to 1.
        assert 1 / (1 - momentum) <= max(MAX_HORIZON_SHARE * steps, MIN_HORIZON_STEPS) * 1.06, (images, batch, epochs)


def test_momentum_grows_with_the_length_of_the_run() -> None:
    for images, batch in product(IMAGES, BATCHES):
        found = [values(images, total_batch=batch, epochs=epochs)["method.teacher_momentum"] for epochs in EPOCHS]
        assert found == sorted(found)


def test_the_learning_rate_of_a_step_grows_with_the_batch_up_to_the_papers() -> None:
    for images, epochs in product(IMAGES, EPOCHS):
        per_256 = [values(images, total_batch=batch, epochs=epochs)["optim.lr"] for batch in BATCHES]
        assert per_256 == sorted(per_256, reverse=True)
        assert min(per_256) == 0.0005, "at 1024 and above the paper's, with the linear rule"
        rates = [rate * batch / 256 for rate, batch in zip(per_256, BATCHES, strict=True)]
        for rate, batch in zip(rates, BATCHES, strict=True):
            assert rate <= 0.002 * max(batch / 1024, 1) * 1.05  # two digits


def test_in_a_run_of_the_papers_length_it_goes_with_the_root_of_the_batch() -> None:
    rates = [values(1_281_167, total_batch=b, epochs=100)["optim.lr"] * b / 256 for b in (64, 128, 256, 512, 1024)]
    for low, high in pairwise(rates):
        assert high / low == pytest.approx(2**0.5, rel=0.06)  # two digits


def test_shorter_runs_learn_faster() -> None:
    rates = [values(5000, total_batch=64, epochs=epochs)["optim.lr"] for epochs in (1, 10, 100, 1000, 10_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0.002


def test_the_warm_up_has_enough_steps() -> None:
    for images, batch, epochs in PLACES:
        text = values(images, total_batch=batch, epochs=epochs)["optim.lr_warmup"]
        steps, share = max(1.0, epochs * images / batch), int(text.removesuffix("%"))
        assert 10 <= share <= 30
        assert share == 30 or share * steps / 100 >= 100
        assert share == 10 or (share - 1) * steps / 100 < 100, "nor longer than that without need"


def test_temperature_stays_below_what_collapses() -> None:
    for images, batch, epochs in PLACES:
        found = values(images, total_batch=batch, epochs=epochs)
        assert found["method.teacher_temperature_start"] <= found["method.teacher_temperature"] <= 0.07


@pytest.mark.parametrize(
    "user_values", [{}, {"backbone.patch_size": 8}, {"crops.global_size": 64}, {"crops.local_size": 24}]
)
def test_crops_are_whole_patches(user_values: dict[str, int]) -> None:
    for side in SIDES:
        found = values(side=side, user_values=user_values)
        patch = found["backbone.patch_size"]
        for key in ("crops.global_size", "crops.local_size", "crops.eval_size"):
            assert found[key] % patch == 0, (side, key)
            assert found[key] > 0
        if "crops.local_size" not in user_values:
            assert found["crops.local_size"] <= found["crops.global_size"] <= 224
        assert found["crops.eval_resize"] >= found["crops.eval_size"]


def test_crops_do_not_enlarge_images_and_grow_with_them() -> None:
    found = [values(side=side) for side in SIDES]
    for key in ("crops.global_size", "crops.local_size", "crops.eval_size", "crops.eval_resize", "backbone.patch_size"):
        assert [one[key] for one in found] == sorted(one[key] for one in found), key
    for side, one in zip(SIDES, found, strict=True):
        assert one["crops.global_size"] <= side
        assert one["crops.global_size"] > 0.8 * min(side, 224), "nor throw much away"
        tokens = one["crops.global_size"] // one["backbone.patch_size"]
        assert 8 <= tokens <= 15, side  # 14 in the paper


def test_scales_are_ordered_shares() -> None:
    lows = []
    for side in SIDES:
        found = values(side=side)
        (low, high), (least, most) = found["crops.local_scale"], found["crops.global_scale"]
        assert 0 < low < high <= least < most == 1
        lows.append(low)
    assert lows == sorted(lows, reverse=True)
    assert lows[-1] == 0.05


def test_values_of_the_user_are_kept_and_the_others_fit_them() -> None:
    user_values = {"backbone.patch_size": 8, "method.out_dim": 999, "optim.lr": 0.1, "crops.local_count": 0}
    rows = {row.key: row for row in suggest_from_data(5000, side=50, total_batch=64, user_values=user_values)}
    for key, value in user_values.items():
        assert rows[key] == Suggestion(key, value, "yours", by_user=True)
    assert rows["crops.global_size"].value == 48
    assert rows["crops.global_scale"].value == [0.14, 1.0], "the paper's without local crops"
    assert "crops.local_size" not in rows
    assert [row.key for row in rows.values() if row.by_user] == [key for key in rows if key in user_values]


def test_a_warmer_teacher_is_warmed_up() -> None:
    found = values(user_values={"method.teacher_temperature": 0.07})
    assert found["method.teacher_temperature_start"] == 0.04
    assert found["method.teacher_temperature_warmup"] == "10%"
    assert values(user_values={"method.teacher_temperature": 0.02})["method.teacher_temperature_start"] == 0.02


METHODS = [DINOConfig(), BYOLConfig(), MoCoConfig(), SwAVConfig(), SupervisedConfig()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("backbone", [ViTConfig(), TimmConfig(name="resnet50")], ids=["vit", "convolutions"])
@pytest.mark.parametrize("optim", [AdamWConfig(), SGDConfig(), LARSConfig()], ids=["adamw", "sgd", "lars"])
def test_missing_keys_are_left_out(method: Any, backbone: Any, optim: OptimConfig) -> None:
    parts = {"method": method, "backbone": backbone, "optim": optim}
    for key, value in values(**parts).items():
        group, name = key.split(".")
        if group in parts:
            assert hasattr(parts[group], name), key
            before = getattr(parts[group], name)
            assert before is None or type(value) is type(before), key
    patches = "backbone.patch_size" in values(**parts)
    assert patches == isinstance(backbone, ViTConfig)


def test_the_width_of_an_embedding_is_not_a_number_of_prototypes() -> None:
    for method in (BYOLConfig(), MoCoConfig(), SupervisedConfig()):
        found = values(method=method)
        assert "method.out_dim" not in found
        assert found["crops.local_count"] == 0


def test_no_momentum_if_the_teacher_is_a_copy() -> None:
    assert "method.teacher_momentum" not in values(method=DINOConfig(teacher_update="copy_each_step"))


def test_no_temperature_if_the_loss_has_none() -> None:
    assert not [key for key in values(method=DINOConfig(loss="mse")) if "temperature" in key]


def test_a_constant_momentum_stays_constant() -> None:
    found = values(600, epochs=10, method=MoCoConfig())
    assert found["method.teacher_momentum"] == found["method.teacher_momentum_end"] < 0.999
    long = values(1_281_167, epochs=200, total_batch=256, method=MoCoConfig())
    assert long["method.teacher_momentum"] == long["method.teacher_momentum_end"] == 0.999
    assert "method.teacher_momentum_end" not in values(method=MoCoConfig(version=3, teacher_momentum_end=1.0))


@pytest.mark.parametrize(("name", "multiple"), [("vit_small_patch14_dinov2", 14), ("xcit_small_12_p16_224", 16)])
def test_a_timm_network_keeps_its_patch_size(name: str, multiple: int) -> None:
    for side in SIDES:
        found = values(side=side, backbone=TimmConfig(name=name))
        assert "backbone.patch_size" not in found
        assert found["crops.global_size"] % multiple == found["crops.local_size"] % multiple == 0
    own = values(side=64, backbone=TimmConfig(name=name, patch_size=16))
    assert own["backbone.patch_size"] == 8
