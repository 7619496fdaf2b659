"""The cache of decoded images between processes, and in memory."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
from cache_cases import FORK, GeneratedImages, expected, folders, keep, settings
from programs import start_program

from dino_lightning.data.cache import remove_unused


class TestProcesses:
    def test_an_unpickled_cache_maps_the_same_file(self, tmp_path):
        kept = keep(GeneratedImages(200, name="many"), settings(tmp_path))
        data = pickle.dumps(kept)
        assert len(data) < len(pickle.dumps(kept.source)) + 1000
        assert (pickle.loads(data).read(7) == kept.read(7)).all()

    def test_of_two_processes_only_one_builds(self, tmp_path, capfd):
        source = GeneratedImages(seconds=0.012)
        builders = [FORK.Process(target=keep, args=(source, settings(tmp_path))) for _ in range(2)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert [builder.exitcode for builder in builders] == [0, 0]
        # Each image once, and once more for the estimate: the second process found what the first had built.
        assert source.reads.value == 140
        (folder,) = folders(tmp_path)
        assert json.loads((folder / "meta.json").read_text())["images"] == 70
        said = capfd.readouterr().err
        assert [said.count(words) for words in ("decoding 70 images into", "waiting for the process")] == [1, 1]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_killed_build_is_repeated(self, tmp_path, workers):
        source = GeneratedImages(seconds=0.005)
        builder = FORK.Process(target=in_own_group, args=(source, settings(tmp_path), workers))
        builder.start()
        # The first reads are for the estimate.
        wait_until(lambda: source.reads.value > len(source) + 30)
        os.killpg(builder.pid, signal.SIGKILL)
        builder.join()
        (remains,) = folders(tmp_path)
        assert ".part" in remains.name
        assert (remains / "pixels.bin").stat().st_size > 0
        assert source.reads.value < 2 * len(source)

        kept = keep(GeneratedImages(), settings(tmp_path))
        assert all(kept.read(i).shape == expected(i).shape for i in range(70))
        (folder,) = folders(tmp_path)
        assert ".part" not in folder.name

    def test_an_interrupted_build_cleans_up(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            keep(Interrupted(), settings(tmp_path))
        assert folders(tmp_path) == []


class Interrupted(GeneratedImages):
    """Raises KeyboardInterrupt in the middle, like Ctrl-C."""

    def read(self, index):
        if self.reads.value > 100:
            raise KeyboardInterrupt
        return super().read(index)


def in_own_group(source, config, workers):
    os.setpgid(0, 0)
    keep(source, config, workers=workers)


def wait_until(condition, *, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


KEEP = """
import json, sys, time
from pathlib import Path
from cache_cases import DataConfig, GeneratedImages, keep

kept = keep(GeneratedImages(10, name=sys.argv[1]), DataConfig(**json.loads(sys.argv[2])))
print(kept.folder, flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
"""


class TestMemory:
    """Folders in memory are removed by the process that is the last to use them."""

    @pytest.fixture
    def config(self, tmp_path):
        return settings(tmp_path, cache="ram")

    @pytest.fixture
    def source(self, tmp_path, config):
        source = GeneratedImages(10, name=f"memory {tmp_path}")
        yield source
        for path in Path(memory_folder(source, config)).parent.glob(f"{memory_folder(source, config).name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def test_the_folder_is_removed_with_the_images(self, source, config):
        kept = keep(source, config)
        folder = kept.folder
        assert str(folder).startswith("/dev/shm/dino-lightning-" if os.access("/dev/shm", os.W_OK) else "/")
        pixels = kept.read(3)
        del kept
        assert not folder.exists()
        assert (pixels == keep(source, config).read(3)).all()  # what was handed out stays

    def test_the_folder_remains_for_another_user(self, source, config):
        first, second = keep(source, config), keep(source, config)
        folder = first.folder
        del first
        assert folder.exists()
        assert second.read(3).shape == (80, 16, 3)
        del second
        assert not folder.exists()

    def test_the_last_of_two_processes_removes_the_folder(self, source, config, tmp_path):
        program, output, end = (tmp_path / name for name in ("keep.py", "output", "end"))
        program.write_text(KEEP)
        arguments = source.name, json.dumps(vars(config)), str(end)
        other = start_program(str(program), *arguments, cwd=tmp_path, stdout=output, stderr=tmp_path / "log")
        try:
            wait_until(lambda: output.exists() and output.read_text().endswith("\n"))
            folder = Path(output.read_text().strip())
            kept = keep(source, config)
            assert (kept.folder, source.reads.value) == (folder, 0)
            del kept
            assert folder.exists()
        finally:
            end.touch()
            other.join()
        assert other.exitcode == 0
        assert not folder.exists()

    def test_loader_processes_do_not_remove_it(self, source, config):
        kept = keep(source, config)
        loader = FORK.Process(target=forget, args=(kept,))
        loader.start()
        loader.join()
        assert loader.exitcode == 0
        assert kept.folder.exists()

    def test_the_folder_of_a_killed_process_is_removed(self, source, config, tmp_path):
        folder = memory_folder(source, config)
        killed = FORK.Process(target=keep_and_die, args=(source, config))
        killed.start()
        killed.join()
        assert folder.exists()
        remove_unused(folder)  # a process that would use it itself
        assert folder.exists()
        remove_unused(folder.with_name("another"))
        assert not folder.exists()


def memory_folder(source, config):
    kept = keep(source, config)
    return kept.folder


def forget(kept):
    del kept.claim
    assert kept.read(3).shape == (80, 16, 3)


def keep_and_die(source, config):
    kept = keep(source, config)
    assert len(kept) == 10
    os.kill(os.getpid(), signal.SIGKILL)
