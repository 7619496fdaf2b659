"""How the rows of wrong inputs are run, and the page that is made of them.

A row makes its input in a fresh folder and is run as the command line would run it, in this process, up to the first
optimizer step: what is refused later than that is refused too late, unless the row says that nothing can know before.

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
"""What every training row has, unless it says otherwise."""
BUILTIN = ["data.train_images=16", "data.val_images=8"]
"""Where a row names no data."""

Around = Callable[[Path], AbstractContextManager[object]]


@dataclass(frozen=True)
class Wrong:
    """A wrong input and the sentence that it gets."""

    name: str
    """What it is, for a person."""
    make: Callable[[Path], list[str]]
    """Makes it below a folder; returns the words of the command line."""
    sentence: str
    """The whole sentence: `DIR` stands for the folder, `…` for what differs between machines and libraries."""
    program: str = TRAIN
    while_training: bool = False
    """Nothing can know before the images are read."""
    around: Around | None = None
    """What the process is like meanwhile."""
    in_a_process: bool = False
    """What it does to its process lasts."""
    needs_root: bool = False
    """Making the input takes the rights of root."""


class NotRefusedError(Exception):
    """A run came to its first step."""


def sentence_of(row: Wrong, folder: Path) -> str:
    """What the command line prints, with `DIR` for `folder`; empty where the input is taken."""
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
    """What `say` returns in a copy of this process."""
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
    """`dino train WORDS`."""
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
    """`dino eval WORDS`."""
    cfg = composed_evaluation("data.num_workers=0", *words, output_dir=output)
    given = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    cfg.output_dir = given[0] if given else cfg.output_dir
    run_evaluation(cfg, overrides=words)


def fits(sentence: str, row: Wrong) -> bool:
    """Whether a sentence is that of the row, to the letter but for `…`."""
    pattern = ".*".join(re.escape(part) for part in row.sentence.split("…"))
    return re.fullmatch(pattern, sentence) is not None


def page(tables: dict[str, list[Wrong]]) -> str:
    """The table of all rows, for `docs/wrong_inputs.md`."""
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
