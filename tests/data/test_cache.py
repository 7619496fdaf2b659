"""The cache of decoded images: right pixels, built once, whole or not at all, and gone from memory afterwards."""

import os
import signal

import numpy as np
import pytest
import torch
from cache_cases import FORK, RESIZE, GeneratedImages, expected, folders, keep, picture, settings

from dino_lightning.data.bad_images import BadImages, ReadableImages
from dino_lightning.data.cache import CachedImages
from dino_lightning.data.decode import Decoder, UnreadableImageError
from dino_lightning.data.parallel import CHUNK
from dino_lightning.data.sources.base import ImageSource, Splits, Subset, content_digest, hold_out
from dino_lightning.errors import UserError


class TestPixels:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_those_of_pillow(self, tmp_path, workers):
        source = GeneratedImages()
        assert len(source) > 2 * CHUNK
        kept = keep(source, settings(tmp_path), workers=workers)
        for index in range(len(source)):
            pixels = kept.read(index)
            assert pixels.dtype == np.uint8
            assert pixels.shape == expected(index).shape
            # torchvision rounds between the two directions where Pillow does too, but with other weights.
            difference = np.abs(pixels.astype(int) - expected(index)).max()
            assert difference <= (1 if min(picture(index).size) > RESIZE else 0)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_of_other_channels(self, tmp_path, channels):
        arrays = np.random.default_rng(0).integers(0, 256, (3, 12, 10, channels), dtype=np.uint8)
        kept = keep(Arrays(arrays), settings(tmp_path, channels=channels))
        assert all((kept.read(i) == array).all() for i, array in enumerate(arrays))

    def test_are_a_view_that_cannot_be_written_to(self, tmp_path):
        kept = keep(GeneratedImages(), settings(tmp_path))
        first, again = kept.read(3), kept.read(3)
        assert np.shares_memory(first, again)
        with pytest.raises(ValueError, match="read-only"):
            first[0] = 0

    def test_decode_to_tensors(self, tmp_path):
        config = settings(tmp_path)
        kept = keep(GeneratedImages(), config)
        pixels = Decoder(config).pixels(kept.read(3))
        assert torch.equal(pixels, torch.tensor(kept.read(3)).permute(2, 0, 1))

    def test_labels_and_names_are_those_of_the_source(self, tmp_path):
        source = GeneratedImages()
        kept = keep(source, settings(tmp_path))
        assert isinstance(kept, ImageSource)
        assert (len(kept), kept.classes, kept.describe(4)) == (70, ["even", "odd"], "generated 4.png")
        assert (kept.labels == source.labels).all()
        assert kept.fingerprint() == source.fingerprint()


class Arrays:
    """A source of arrays (n, H, W, C)."""

    classes = None
    labels = None

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def read(self, index):
        return self.arrays[index]

    def describe(self, index):
        return f"row {index}"

    def fingerprint(self):
        return content_digest(self.arrays.tobytes())


class TestUnreadable:
    def test_keeps_its_reason_and_stops_nothing(self, tmp_path):
        config, source = settings(tmp_path, max_bad_share=0.0), GeneratedImages(broken=(2, 40))
        kept = keep(source, config, bad_images=tmp_path / "run" / "bad_images.txt")
        reasons = []
        for index in (2, 40):
            with pytest.raises(ValueError) as original:  # noqa: PT011 - whatever the decoder says
                Decoder(config).pixels(source.read(index))
            with pytest.raises(UnreadableImageError) as remembered:
                kept.read(index)
            assert str(remembered.value) == str(original.value)
            reasons.append(f"generated {index}.png\t{original.value}")
        assert kept.read(3).shape == (80, 16, 3)
        assert (tmp_path / "run" / "bad_images.txt").read_text().splitlines() == reasons

    def test_counts_when_it_is_met(self, tmp_path):
        config, path = settings(tmp_path), tmp_path / "bad_images.txt"
        kept = keep(GeneratedImages(broken=(2, 40)), config, bad_images=path)
        images = ReadableImages(kept, len, bad=BadImages(path, images=70, max_bad_share=1 / 70))
        assert images[1][1] == 1
        with pytest.raises(UserError, match="2 of 70 images"):
            images[2]
        assert len(path.read_text().splitlines()) == 2

    def test_all_of_them(self, tmp_path):
        kept = keep(GeneratedImages(5, broken=range(5)), settings(tmp_path))
        with pytest.raises(UnreadableImageError):
            kept.read(4)


class TestReuse:
    def test_a_second_run_reads_nothing(self, tmp_path):
        source, again = GeneratedImages(), GeneratedImages()
        first, second = keep(source, settings(tmp_path)), keep(again, settings(tmp_path))
        assert source.reads.value >= 70
        assert again.reads.value == 0
        assert all((first.read(i) == second.read(i)).all() for i in range(70))

    @pytest.mark.parametrize(
        "change",
        [{"cache_resize": 12}, {"channels": 1}, {"value_range": [0.0, 9.0]}, {"apply_exif_rotation": True}],
        ids=lambda change: next(iter(change)),
    )
    def test_the_key_contains_everything_that_affects_pixels(self, tmp_path, change):
        keep(GeneratedImages(3), settings(tmp_path))
        keep(GeneratedImages(3), settings(tmp_path, **change))
        assert len(folders(tmp_path)) == 2

    def test_other_images_and_no_other_setting_are_in_the_key(self, tmp_path):
        keep(GeneratedImages(3), settings(tmp_path))
        keep(GeneratedImages(3), settings(tmp_path, batch_size_per_device=7, on_error="raise", num_workers=1))
        assert len(folders(tmp_path)) == 1
        keep(GeneratedImages(3, name="others"), settings(tmp_path))
        assert len(folders(tmp_path)) == 2

    def test_the_hold_out_of_another_seed_shares_it(self, tmp_path):
        source = GeneratedImages(broken=(0, 1))
        for seed in (0, 1):
            train = hold_out(Splits(source, None, None), share=0.2, seed=seed).train
            assert isinstance(train, Subset)
            bad = tmp_path / f"bad{seed}.txt"
            kept = keep(train, settings(tmp_path), bad_images=bad)
            assert (len(kept), kept.describe(5)) == (len(train), train.describe(5))
            assert (kept.labels == train.labels).all()
            for index in {5, 20}:
                assert (kept.read(index) == keep(source, settings(tmp_path)).read(train.indices[index])).all()
            listed = {line.split("\t")[0] for line in bad.read_text().splitlines()} if bad.exists() else set()
            assert listed == {f"generated {i}.png" for i in {0, 1} & set(train.indices.tolist())}
        assert len(folders(tmp_path)) == 1

    def test_a_small_part_is_cached_separately(self, tmp_path):
        source = GeneratedImages()
        kept = keep(Subset(source, indices=np.array([4, 9])), settings(tmp_path))
        assert isinstance(kept, CachedImages)
        assert (kept.read(1) == keep(source, settings(tmp_path)).read(9)).all()

    def test_a_damaged_one_is_built_again(self, tmp_path):
        good = keep(GeneratedImages(), settings(tmp_path)).read(69).copy()
        (folder,) = folders(tmp_path)
        os.truncate(folder / "pixels.bin", 1000)
        assert (keep(GeneratedImages(), settings(tmp_path)).read(69) == good).all()

    def test_caching_does_not_change_the_random_state(self, tmp_path):
        before = torch.get_rng_state()
        keep(GeneratedImages(), settings(tmp_path), workers=1)
        assert torch.equal(torch.get_rng_state(), before)


class TestSettings:
    def test_none_is_the_source_itself(self, tmp_path):
        source = GeneratedImages()
        assert keep(source, settings(tmp_path, cache="none")) is source

    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            ({"cache_dir": "/proc/nowhere"}, r"data\.cache_dir=/proc/nowhere cannot be created"),
        ],
    )
    def test_wrong_ones(self, tmp_path, wrong, sentence):
        with pytest.raises(UserError, match=sentence):
            keep(GeneratedImages(), settings(tmp_path, **wrong))

    @pytest.mark.parametrize(
        ("cache", "way_out"), [("ram", r"use data\.cache=disk"), ("disk", r"choose a data\.cache_dir with more space")]
    )
    def test_too_little_room(self, tmp_path, cache, way_out):
        sentence = rf"^data\.cache={cache} needs about \d+\.\d GB in /.*, where .* GB are free; {way_out} or "
        with pytest.raises(UserError, match=sentence):
            keep(Endless(), settings(tmp_path, cache=cache))

    def test_a_full_file_system_is_no_bad_image(self, tmp_path):
        limited = FORK.Process(target=build_with_little_room, args=(tmp_path,))
        limited.start()
        limited.join()
        assert "cannot be written" in (tmp_path / "said").read_text()
        assert folders(tmp_path) == []


class Endless(GeneratedImages):
    """Says that it has more images than any disk holds."""

    def __init__(self):
        super().__init__(2, name="endless")
        self.total = 10**11


def build_with_little_room(tmp_path):
    """The system refuses files beyond a length, as it refuses those for which there is no room."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        keep(GeneratedImages(), settings(tmp_path), workers=1)
    except UserError as error:
        (tmp_path / "said").write_text(str(error))
