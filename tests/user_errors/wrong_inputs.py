"""Runs the rows of wrong inputs, and generates their page.

A row creates its input in a new folder. The command runs in this process up to the first optimizer step; an error after
that is too late, unless the row says that the mistake cannot be detected earlier.

    PYTHONPATH=src:tests/helpers:tests/user_errors python -m wrong_inputs        writes docs/wrong_inputs.md
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import lightning as L
from composing import composed, composed_evaluation

from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.evaluation.run import run_evaluation
from dino_lightning.training.run import train as train_in_process

PAGE = Path(__file__).parents[2] / "docs" / "wrong_inputs.md"
TRAIN, EVALUATE = "dino train", "dino eval"
SMALL = [
    "data.num_workers=0",
    "data.batch_size_per_device=4",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.pictures.enabled=false",
    "callbacks.knn.enabled=false",
]
"""Overrides of every training row, unless it sets the key."""
BUILTIN = ["data.train_images=16", "data.val_images=8"]
"""Overrides of rows without `data=`."""

Around = Callable[[Path], AbstractContextManager[object]]


@dataclass(frozen=True)
class Wrong:
    """A wrong input and its error message."""

    name: str
    """The description on the page."""
    make: Callable[[Path], list[str]]
    """Creates the input in a folder and returns the arguments of the command."""
    sentence: str
    """The complete message: `DIR` is the folder, `…` is text that differs between machines and libraries."""
    program: str = TRAIN
    while_training: bool = False
    """Whether the mistake is detected only when images are read."""
    around: Around | None = None
    """Changes the process while the command runs."""
    in_a_process: bool = False
    """Whether the row runs in a forked process, because its change of the process is permanent."""
    needs_root: bool = False
    """Whether only root can create the input."""


class NotRefusedError(Exception):
    """A run has reached its first step."""


def sentence_of(row: Wrong, folder: Path) -> str:
    """The message of the command, with `DIR` for `folder`; empty if the input is accepted."""
    if row.in_a_process:
        return in_a_fork(lambda: sentence_of(replace(row, in_a_process=False), folder))
    words = row.make(folder)
    run = (evaluate, train)[row.program == TRAIN]
    try:
        with row.around(folder) if row.around else nullcontext():
            run(words, output=folder / "run", to_the_end=row.while_training)
    except EXPLAINED as error:
        return message_for(error).replace(str(folder), "DIR")
    except NotRefusedError:
        pass
    return ""


def in_a_fork(say: Callable[[], str]) -> str:
    """The result of `say` in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writing, say().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


def train(words: list[str], *, output: Path, to_the_end: bool = False) -> None:
    """Run `dino train WORDS`."""
    given = {word.split("=")[0] for word in words}
    small = [word for word in [*SMALL, *([] if "data" in given else BUILTIN)] if word.split("=")[0] not in given]
    cfg = composed(*small, *words, output_dir=output)
    if "output_dir" in given:
        cfg.output_dir = next(word.partition("=")[2] for word in words if word.startswith("output_dir="))
    with nullcontext() if to_the_end else patch.object(L.Trainer, "fit", _first_step):
        train_in_process(cfg)


def _first_step(*_: object, **__: object) -> None:
    raise NotRefusedError


def evaluate(words: list[str], *, output: Path, to_the_end: bool = False) -> None:
    """Run `dino eval WORDS`."""
    cfg = composed_evaluation("data.num_workers=0", *words, output_dir=output)
    given = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    cfg.output_dir = given[0] if given else cfg.output_dir
    run_evaluation(cfg, overrides=words)


def fits(sentence: str, row: Wrong) -> bool:
    """Whether a message equals that of the row, except for `…`."""
    pattern = ".*".join(re.escape(part) for part in row.sentence.split("…"))
    return re.fullmatch(pattern, sentence) is not None


def page(tables: dict[str, list[Wrong]]) -> str:
    """The text of `docs/wrong_inputs.md`."""
    lines = [
        "# Error messages for wrong inputs",
        "",
        "If an input is wrong, the program prints one sentence that names the key or the file, and exits with status 2 "
        "before the first",
        "optimizer step. Rows marked * are detected only while images are read. A test runs each row",
        "(`tests/user_errors/test_wrong_inputs.py`), and its table generates this page",
        "(`PYTHONPATH=src:tests/helpers:tests/user_errors python -m wrong_inputs`). "
        "`tests/user_errors/test_wrong_settings.py` has about a",
        "hundred more wrong values of configuration keys. `DIR` is a folder, `…` is text that differs between "
        "machines.",
    ]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| input | error message |", "|---|---|"]
        for row in rows:
            star = " *" if row.while_training else ""
            program = " (`dino eval`)" if row.program == EVALUATE else ""
            lines.append(f"| {_cell(row.name)}{program}{star} | {_cell(row.sentence)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    from wrong_tables import TABLES

    PAGE.write_text(page(TABLES))
