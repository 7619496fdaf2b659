"""Unreadable images: replaced by the next one, named once over all processes, and too many stop the run."""

import errno
import io
import multiprocessing
import pickle
import struct
import zlib

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lightning.config import DataConfig
from dino_lightning.data.bad_images import BadImages, ReadableImages
from dino_lightning.data.decode import Decoder, UnreadableImageError
from dino_lightning.errors import UserError

TOTAL = 12


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class Stored:
    """Images of one red level each, that of their position; `broken` ones are cut in half."""

    classes = None
    labels = None

    def __init__(self, *, total=TOTAL, broken=()):
        self.contents = [png(i)[: 60 if i in broken else None] for i in range(total)]
        self.reads = [0] * total

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        self.reads[index] += 1
        return self.contents[index]

    def describe(self, index):
        return f"image {index}.png"

    def fingerprint(self):
        return "stored"


def red(content):
    return int(Decoder(DataConfig()).pixels(content)[0, 0, 0])


def readable(source, path, *, on_error="skip", share=0.5, decode=red):
    bad = BadImages(path, images=len(source), on_error=on_error, max_bad_share=share)
    return ReadableImages(source, decode, bad=bad)


def lines(path):
    return path.read_text().splitlines()


class TestReplacement:
    def test_the_next_readable_image_replaces_a_broken_one(self, tmp_path):
        images = readable(Stored(broken=(3, 4, TOTAL - 1)), tmp_path / "deep" / "bad_images.txt")
        expected = [0, 1, 2, 5, 5, *range(5, TOTAL - 1), 0]
        for order in (range(TOTAL), reversed(range(TOTAL))):
            assert {i: images[i] for i in order} == {i: (level, level) for i, level in enumerate(expected)}

    def test_each_is_named_once_with_its_reason(self, tmp_path):
        path = tmp_path / "bad_images.txt"
        images = readable(Stored(broken=(3, 4)), path)
        assert [images[i][1] for i in (4, 3, 4, 3)] == [5, 5, 5, 5]
        names, reasons = zip(*(line.split("\t") for line in lines(path)), strict=True)
        assert names == ("image 4.png", "image 3.png")
        assert reasons == ("image file is truncated",) * 2

    def test_a_known_bad_image_is_not_read_again(self, tmp_path):
        source = Stored(broken=(3,))
        images = readable(source, tmp_path / "bad_images.txt")
        for _ in range(5):
            assert images[3] == (4, 4)
        assert (source.reads[3], source.reads[4]) == (1, 5)

    def test_iterating_ends(self, tmp_path):
        assert [level for level, _ in readable(Stored(), tmp_path / "bad_images.txt")] == list(range(TOTAL))
        assert not (tmp_path / "bad_images.txt").exists()

    def test_none_readable(self, tmp_path):
        images = readable(Stored(broken=range(TOTAL)), tmp_path / "bad.txt", share=1.0)
        with pytest.raises(UserError, match=r"none of the 12 images can be read \(image 5\.png: .*bad\.txt"):
            images[5]


class TestWhatCounts:
    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError(errno.ENOENT, "No such file"),
            Image.UnidentifiedImageError("cannot identify"),
            SyntaxError("broken PNG file"),
            UnreadableImageError("has 5 channels"),
            RuntimeError("Unsupported marker"),
            struct.error("unpack requires"),
            zlib.error("incorrect data check"),
            Image.DecompressionBombError("exceeds limit"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_as_a_bad_image(self, tmp_path, error):
        assert readable(Stored(), tmp_path / "bad.txt", decode=failing(error))[0] == (1, 1)
        reason = lines(tmp_path / "bad.txt")[0].split("\t")[1]
        assert str(error) in reason
        assert reason.startswith(type(error).__name__) != isinstance(error, UnreadableImageError)

    @pytest.mark.parametrize(
        "error",
        [
            UserError("data.channels=7"),
            MemoryError(),
            KeyboardInterrupt(),
            OSError(errno.EMFILE, "Too many open files"),
            torch.OutOfMemoryError("out of memory"),
            KeyError("a mistake of ours"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_as_something_else(self, tmp_path, error):
        with pytest.raises(type(error)):
            readable(Stored(), tmp_path / "bad.txt", decode=failing(error))[0]
        assert not (tmp_path / "bad.txt").exists()

    def test_on_error_raise(self, tmp_path):
        images = readable(Stored(broken=(3,)), tmp_path / "bad.txt", on_error="raise")
        assert images[2] == (2, 2)
        with pytest.raises(
            UserError, match=r"^data\.on_error=raise: image 3\.png cannot be read \(image file is truncated\)$"
        ):
            images[3]


def failing(error):
    """A decoder to which the first image is as `error` says."""

    def decode(content):
        if content == png(0):
            raise error
        return red(content)

    return decode


class TestShare:
    @pytest.mark.parametrize("kept_in_a_file", [True, False])
    def test_is_of_the_whole_source(self, tmp_path, kept_in_a_file):
        path = tmp_path / "bad_images.txt" if kept_in_a_file else None
        images = readable(Stored(broken=(0, 4, 8)), path, share=2 / TOTAL)
        assert [images[i][0] for i in range(8)] == [1, 1, 2, 3, 5, 5, 6, 7]  # two are as many as allowed
        with pytest.raises(UserError) as caught:
            images[8]
        sentence = str(caught.value)
        assert sentence.startswith("data.max_bad_share=0.166667: 3 of 12 images cannot be read (image 0.png: ")
        assert "image 8.png: " in sentence
        assert "data.max_bad_share=1" in sentence
        assert str(path) in sentence or path is None

    def test_of_zero_allows_none(self, tmp_path):
        with pytest.raises(UserError, match="1 of 12 images"):
            readable(Stored(broken=(1,)), tmp_path / "bad.txt", share=0.0)[1]

    def test_a_resumed_run_continues_the_file(self, tmp_path):
        path = tmp_path / "bad_images.txt"
        assert readable(Stored(broken=(0, 4, 8)), path, share=2 / TOTAL)[0] == (1, 1)
        resumed = readable(Stored(broken=(0, 4, 8)), path, share=2 / TOTAL)
        assert [resumed[i][0] for i in (0, 4)] == [1, 5]
        assert len(lines(path)) == 2
        with pytest.raises(UserError, match="3 of 12"):
            resumed[8]

    def test_of_a_stream(self, tmp_path):
        bad = BadImages(tmp_path / "bad.txt", images=100, on_error="skip", max_bad_share=0.01)
        for _ in range(3):  # one epoch after another
            bad.note("shard 3, sample 7", "no image")
        with pytest.raises(UserError, match="2 of 100 images"):
            bad.note("shard 4, sample 1", "no image")


class TestFile:
    def test_one_line_for_each_image_and_unusual_names(self, tmp_path):
        path = tmp_path / "bad.txt"
        names = ["a\nb\tc", "caf\udce9.png", "日本.png", "two  blanks"]
        for _ in range(2):
            bad = BadImages(path, images=10, on_error="skip", max_bad_share=1.0)
            for name in names:
                bad.note(name, "line 1\r\nline 2")
        written = path.read_bytes().splitlines()
        assert [line.split(b"\t")[1] for line in written] == [b"line 1 line 2"] * 4
        assert [line.split(b"\t")[0] for line in written] == [
            b"a b c",
            b"caf\xe9.png",
            "日本.png".encode(),
            b"two  blanks",
        ]

    def test_an_unfinished_line_is_not_continued(self, tmp_path):
        path = tmp_path / "bad.txt"
        path.write_text("a\tbroken")
        bad = BadImages(path, images=10, on_error="skip", max_bad_share=1.0)
        for name in "aba":
            bad.note(name, "broken")
        assert lines(path) == ["a\tbroken", "b\tbroken"]

    def test_lines_of_other_processes_count(self, tmp_path):
        first, second = (
            BadImages(tmp_path / "bad.txt", images=10, on_error="skip", max_bad_share=0.3) for _ in range(2)
        )
        first.note("a", "broken")
        second.note("a", "broken")
        second.note("b", "broken")
        first.note("c", "broken")
        assert [line[0] for line in lines(tmp_path / "bad.txt")] == ["a", "b", "c"]
        with pytest.raises(UserError, match="4 of 10"):
            second.note("d", "broken")


class Numbered(Dataset):
    """What a loader reads."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def one_rank(images, barrier, results, number):
    torch.set_num_threads(1)
    barrier.wait()
    levels, _ = zip(*DataLoader(Numbered(images), batch_size=None, num_workers=2), strict=True)
    results[number] = list(levels)


def test_two_ranks_of_two_workers(tmp_path):
    """Every process meets bad images; the file names each once, whole, and all see the same replacements."""
    broken = [i for i in range(120) if i % 3 == 0]
    images = readable(Stored(total=120, broken=broken), tmp_path / "bad.txt")
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        barrier, results = context.Barrier(2), manager.dict()
        ranks = [context.Process(target=one_rank, args=(images, barrier, results, k)) for k in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert results[0] == results[1] == [i + (i % 3 == 0) for i in range(120)]
    assert sorted(lines(tmp_path / "bad.txt")) == sorted(set(lines(tmp_path / "bad.txt")))
    assert {line.split("\t")[0] for line in lines(tmp_path / "bad.txt")} == {f"image {i}.png" for i in broken}


def test_pickles(tmp_path):
    images = pickle.loads(pickle.dumps(readable(Stored(broken=(3,)), tmp_path / "bad.txt")))
    assert images[3] == (4, 4)
    assert len(images) == len(images.source) == TOTAL
