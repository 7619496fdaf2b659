"""Wrong inputs besides values of the configuration: each gets one sentence before the first step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composing import SMALL, composed
from omegaconf import OmegaConf
from programs import run_code
from wrong_environments import mounted, with_variables
from wrong_files import photos
from wrong_inputs import PAGE, Wrong, fits, page, sentence_of
from wrong_resumed import HOLDER, ROWS, a_run_in_the_folder, finished, resumed
from wrong_tables import TABLES

from dino_lightning.runtime.run_lock import run_lock
from dino_lightning.training.build import build_method
from dino_lightning.training.resources import checkpoint_bytes

EVERY = [row for rows in TABLES.values() for row in rows]
SOURCE = Path(__file__).parents[2] / "src"
MESSY = {"TORCHELASTIC_RUN_ID": None, "SLURM_JOB_ID": None, "SUBMITIT_EXECUTOR": None, "CUDA_VISIBLE_DEVICES": None}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def can_mount(folder: Path) -> bool:
    try:
        with mounted(folder / "probe", "1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.fixture(scope="session")
def as_root(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether tests can change users and mount file systems."""
    return os.geteuid() == 0 and can_mount(tmp_path_factory.mktemp("mount"))


@pytest.mark.parametrize("row", EVERY, ids=lambda row: f"{row.program}: {row.name}")
def test_one_sentence(row: Wrong, tmp_path: Path, as_root: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if row.needs_root and not as_root:
        pytest.skip("needs root: a disk is mounted, or the user changed")
    sentence = sentence_of(row, tmp_path)
    assert fits(sentence, row), sentence
    assert "\n" not in sentence
    assert "this must not run" not in capsys.readouterr().out


def test_there_are_enough_rows() -> None:
    assert len(EVERY) >= 100
    assert len({row.name for row in EVERY}) >= len(EVERY) - 5  # some are in the tables of both programs


def test_the_page_is_generated_from_the_tables() -> None:
    assert PAGE.read_text() == page(TABLES), "PYTHONPATH=src:tests/helpers:tests/user_errors python -m wrong_inputs"


def test_right_inputs_get_no_error(tmp_path: Path) -> None:
    right = Wrong("", lambda path: ["data=folder", f"data.path={photos(path / 'in')}"], "")
    assert sentence_of(right, tmp_path) == ""
    assert not (tmp_path / "run" / ".running").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    wrong = Wrong("", lambda _: ["crops.local_size=20"], "")
    assert "crops.local_size=20 is not a multiple" in sentence_of(wrong, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ((), ""),
        (("callbacks.knn.k=[5,20]", "data.prefetch_batches=3", "compute=reference", "logger=tensorboard"), ""),
        (("trainer.max_epochs=4",), "trainer.max_epochs was 2 and is now 4: from this step on, the schedules"),
        (("data.batch_size_per_device=2", "trainer.accumulate_grad_batches=2"), ""),
    ],
)
@pytest.mark.slow_after_first(2)
def test_allowed_changes_in_a_resumed_run(
    words: tuple[str, ...], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Wrong("", resumed(*words), "", around=with_variables(**MESSY, WANDB_MODE=None))
    assert sentence_of(row, tmp_path) == ""
    err = capsys.readouterr().err
    assert warning in err if warning else "WARNING" not in err


def test_a_change_in_config_yaml_is_accepted(tmp_path: Path) -> None:
    def edit_seed(file: Path) -> None:
        config = file.parents[1] / "config.yaml"
        text = config.read_text()
        assert "seed: 0\n" in text
        config.write_text(text.replace("\nseed: 0\n", "\nseed: 7\n"))

    assert sentence_of(Wrong("", resumed("seed=7", spoil=edit_seed), ""), tmp_path) == ""


def test_little_disk_space_is_a_warning(tmp_path: Path, as_root: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if not as_root:
        pytest.skip("needs root: a disk is mounted")
    size = max(file.stat().st_size for file in (finished() / "checkpoints").glob("*.ckpt"))
    with mounted(tmp_path / "disk", f"{size // 1024 * 2 + 6000}k"):
        row = Wrong("", lambda path: [f"output_dir={path / 'disk' / 'run'}"], "")
        assert sentence_of(row, tmp_path) == ""
    assert "WARNING: the checkpoints of this run take up to" in capsys.readouterr().err


def test_the_estimated_size_of_a_checkpoint() -> None:
    """The estimate includes moments of frozen prototypes, and lacks random states and settings."""
    config = OmegaConf.to_object(composed(*SMALL))
    estimate = checkpoint_bytes(config, build_method(config))  # type: ignore[arg-type]
    actual = (finished() / "checkpoints" / "last.ckpt").stat().st_size
    assert 0.95 * estimate < actual < 1.05 * estimate


def test_the_folder_is_unlocked_after_sigkill(tmp_path: Path) -> None:
    """Immediately, even if a child of the killed process, such as a loader process, still runs."""
    script = HOLDER.replace('print("held"', 'import os; child = os.fork()\n    child and print(f"held {child}"')
    command = [sys.executable, "-c", script, str(tmp_path), str(SOURCE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline().split()[1])
        try:
            run.kill()
            run.wait()
            os.kill(child, 0)  # it exists
            assert (tmp_path / ".running").exists()
            with run_lock(tmp_path):
                assert str(os.getpid()) in (tmp_path / ".running").read_text()
            assert not (tmp_path / ".running").exists()
        finally:
            os.kill(child, signal.SIGKILL)


def test_other_ranks_of_a_run_may_use_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_run_in_the_folder(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with run_lock(tmp_path / "run"):
            pass


def test_an_output_dir_that_hydra_cannot_create(tmp_path: Path) -> None:
    """Hydra creates the folder of a run before it calls this package, and that of a sweep before the first run."""
    file = tmp_path / "o"
    file.touch()
    program = (
        "from dino_lightning.cli.main import main\n"
        "for verb in ('train', 'eval'):\n"
        "    for words in ([], ['--multirun', 'seed=1,2']):\n"
        "        try: main([verb, *words, f'output_dir={FILE}'])\n"
        "        except SystemExit as end: print(end.code)\n"
    )
    done = run_code(f"FILE = {str(file)!r}\n{program}", cwd=tmp_path)
    reason = f"'{file}' is a file or inside a file"
    sentence = f"output_dir={file} cannot be written ({reason}); choose a folder that you can write to."
    lines = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert lines == [sentence] * 4, done.stderr
    assert done.stdout.split() == ["2"] * 4


def test_most_rows_are_not_about_the_configuration() -> None:
    """`tests/user_errors/test_wrong_settings.py` tests the configuration."""
    assert len(EVERY) - len(ROWS) >= 60
