"""The rule of `auto.machine=true`: lengths, batches and loader processes by machine and number of images."""

from dataclasses import replace
from typing import Any

import pytest

from dino_lightning.training.autoconfig.machine_rules import (
    CACHE_MEMORY_SHARE,
    CPU_IMAGES,
    MIN_STEPS,
    DatasetStats,
    Machine,
    suggest_from_machine,
    this_machine,
)

LAPTOP = Machine(on_cpu=True, devices=1, cores=8, memory=8 << 30, precision="32")
SERVER = Machine(on_cpu=False, devices=8, cores=96, memory=500 << 30, precision="bf16-mixed")
AMOUNTS = [1, 7, 40, 500, 5_000, 50_000, 99_999, 100_000, 1_281_167, 14_000_000]


def values(machine: Machine, seen: DatasetStats, **more: Any) -> dict[str, Any]:
    return {row.key: row.value for row in suggest_from_machine(machine, seen, **more)}


@pytest.mark.parametrize("machine", [LAPTOP, SERVER, replace(SERVER, devices=1, cores=2)])
@pytest.mark.parametrize("images", AMOUNTS)
def test_every_amount_of_images_has_a_run(machine: Machine, images: int) -> None:
    found = values(machine, DatasetStats(images, side=300))
    devices = found.get("trainer.devices", 1)
    assert 1 <= found["data.batch_size_per_device"] * devices <= max(images, devices)
    assert found["trainer.max_epochs"] >= 1
    assert 1 <= found["callbacks.knn.every_n_epochs"] <= found["trainer.max_epochs"]
    assert found["data.num_workers"] * devices <= machine.cores


def test_a_cpu_run_is_as_long_for_few_images_as_for_many() -> None:
    for images in (1_000, 5_000, 50_000, 350_000):
        assert 0.8 < values(LAPTOP, DatasetStats(images, side=300))["trainer.max_epochs"] * images / CPU_IMAGES < 1.2
    assert values(LAPTOP, DatasetStats(10_000_000, side=300))["trainer.max_epochs"] == 1
    assert values(LAPTOP, DatasetStats(50_000, side=32))["trainer.max_epochs"] == 7, (
        "as experiment=photos32 for CIFAR-10"
    )


def test_a_gpu_run_has_enough_steps() -> None:
    for images in (500, 2_000, 3_199):
        found = values(SERVER, DatasetStats(images, side=300))
        assert found["trainer.max_epochs"] * images / found["data.batch_size_per_device"] >= MIN_STEPS * 0.99
    assert values(SERVER, DatasetStats(50_000, side=32))["trainer.max_epochs"] == 200
    assert values(SERVER, DatasetStats(1_281_167, side=400))["trainer.max_epochs"] == 100, "the paper's"


def test_many_images_take_all_devices_and_a_wider_network() -> None:
    few, many = values(SERVER, DatasetStats(99_999, side=400)), values(SERVER, DatasetStats(1_281_167, side=400))
    assert (few["trainer.devices"], few["data.batch_size_per_device"]) == (1, 128)
    assert (many["trainer.devices"], many["data.batch_size_per_device"]) == (8, 128), "the paper's 1024"
    assert "backbone.width" not in few
    assert (many["backbone.width"], many["backbone.heads"]) == (384, 6)
    assert "backbone.width" not in values(SERVER, DatasetStats(1_281_167, side=400), widen=False)
    assert values(replace(SERVER, devices=1), DatasetStats(1_281_167, side=400))["data.batch_size_per_device"] == 256


def test_values_of_the_user_are_kept_and_the_others_fit_them() -> None:
    user_values = {"trainer.devices": [0, 1], "trainer.max_epochs": 30}
    rows = {
        row.key: row
        for row in suggest_from_machine(SERVER, DatasetStats(5_000, side=300), devices=2, user_values=user_values)
    }
    assert rows["trainer.devices"].by_user
    assert rows["trainer.devices"].value == [0, 1]
    assert rows["data.batch_size_per_device"].value == 64
    assert rows["callbacks.knn.every_n_epochs"].value == 3
    assert values(LAPTOP, DatasetStats(100, side=40), devices=2)["data.batch_size_per_device"] == 50


def test_images_are_cached_if_that_saves_work_and_fits() -> None:
    large = values(LAPTOP, DatasetStats(1_000, side=3000), crop=32)
    assert (large["data.cache"], large["data.cache_resize"]) == ("ram", 96)
    assert values(SERVER, DatasetStats(1_000, side=3000))["data.cache_resize"] == 448
    assert "data.cache" not in values(LAPTOP, DatasetStats(1_000, side=140), crop=32), "decoded as fast"
    assert "data.cache" not in values(replace(LAPTOP, memory=0), DatasetStats(1_000, side=3000), crop=32)
    images = round(CACHE_MEMORY_SHARE * LAPTOP.memory / (96 * 128 * 3))
    assert "data.cache" in values(LAPTOP, DatasetStats(images - 10, side=3000), crop=32)
    assert "data.cache" not in values(LAPTOP, DatasetStats(images + 10, side=3000), crop=32)


def test_labels_rotation_and_precision() -> None:
    assert values(LAPTOP, DatasetStats(100, side=40, labeled=False))["callbacks.knn.enabled"] is False
    assert "callbacks.knn.enabled" not in values(LAPTOP, DatasetStats(100, side=40))
    assert values(LAPTOP, DatasetStats(100, side=40, rotated=1))["data.apply_exif_rotation"] is True
    assert "data.apply_exif_rotation" not in values(LAPTOP, DatasetStats(100, side=40))
    assert values(LAPTOP, DatasetStats(100, side=40))["trainer.precision"] == "32"
    assert values(SERVER, DatasetStats(100, side=40))["trainer.precision"] == "bf16-mixed"


def test_this_machine() -> None:
    found = this_machine("cpu", memory=5)
    assert (found.on_cpu, found.devices, found.precision, found.memory) == (True, 1, "32", 5)
    assert found.cores >= 1
