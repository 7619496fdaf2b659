"""The command `dino`: verbs, help without slow imports, plain words, and one grammar for all verbs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from dino_lightning.cli.help import VERBS, documented_keys, group_options, verb_help
from dino_lightning.cli.main import main
from dino_lightning.cli.options import parse_options
from dino_lightning.cli.overrides import with_plain_words
from dino_lightning.config import SCHEMAS, EmbedConfig, EvaluateConfig, TrainConfig
from dino_lightning.config.registry import option_names
from dino_lightning.errors import UserError
from dino_lightning.runtime.files import CONF

PROGRAM = """
import contextlib, io, json, sys, time
from dino_lightning.cli.main import main
results = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(words)
    results.append((status, out.getvalue(), sorted({name.split(".")[0] for name in sys.modules})))
ours = [name for name in sys.modules if "dino" in name]
print(json.dumps([results, ours, len(sys.modules), time.process_time()]))
"""
OURS = {
    "dino_lightning",
    *(f"dino_lightning.{name}" for name in ("cli", "errors", "runtime", "runtime.files", "runtime.ranks")),
}
OURS |= {f"dino_lightning.cli.{name}" for name in ("completion", "exit", "help", "main")}


def test_help_imports_only_the_standard_library() -> None:
    """The help of all verbs together takes less than half a second of CPU time."""
    commands = [[], ["--help"], ["trian"], *([verb, "--help"] for verb in VERBS)]
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results, ours, count, seconds = json.loads(done.stdout)
    allowed = {*sys.stdlib_module_names, "dino_lightning", *(name.split(".")[0] for name in bare.stdout.split())}
    assert set(results[-1][2]) <= allowed
    assert set(ours) <= OURS
    assert count < 200
    assert seconds < 0.5
    assert [status for status, *_ in results] == [0, 0, 2] + [0] * len(VERBS)
    assert results[2][1] == "dino: trian is not a command; did you mean 'train'?\n"
    assert results[0][1] == results[1][1]
    for verb, (_, text, _) in zip(VERBS, results[3:], strict=True):
        assert f"\nusage: dino {verb}" in text
        assert f"\n  dino {verb}" in text.split("\nExamples:")[1]
        assert max(map(len, text.splitlines())) <= 120
        assert f"\n  {verb}" in results[0][1]


ROOTS = {"train": TrainConfig, "eval": EvaluateConfig, "embed": EmbedConfig}


@pytest.mark.parametrize("verb", ROOTS)
def test_help_lists_the_options_that_the_verb_reads(verb: str) -> None:
    types = {field.name: field.type for field in dataclasses.fields(ROOTS[verb])}
    options = {group: [name for name in option_names(group) if _fits(group, name, types)] for group in types}
    options = {group: [name for name in names if name != "vit"] for group, names in options.items()}  # of the registry
    assert {group: names for group, names in options.items() if names} == {
        group: names for group, names in group_options(verb).items() if group in types
    }


def _fits(group: str, option: str, types: dict[str, Any]) -> bool:
    """Whether an option is of the type that the verb has for its group, or of none, such as an experiment."""
    path = CONF / group / f"{option}.yaml"
    base = re.search(r"schema_(\w+)", path.read_text()) if path.exists() else None
    schema = SCHEMAS.get(group, {}).get(base[1] if base else option)
    return schema is None or issubclass(schema, types[group])


def test_help_has_all_keys_of_the_dataclasses() -> None:
    keys = documented_keys("embed")
    assert set(keys) == {field.name for field in dataclasses.fields(EmbedConfig)}
    assert all(documented_keys(verb) for verb in VERBS if verb not in ("train", "eval"))
    assert keys["split"].endswith("Default: all.")
    assert "n_last_blocks" in verb_help("embed")


@pytest.mark.parametrize(
    ("typed", "keys", "expected"),
    [
        ("~/photos optim.lr=1", ["data.path"], "data.path=~/photos optim.lr=1"),
        ("--cfg job RUN -m", ["checkpoint"], "--cfg job checkpoint=RUN -m"),
        ("RUN /a=b output=x", ["checkpoint", "data.path"], "checkpoint=RUN data.path=/a=b output=x"),
        ("data.path=D RUN", ["checkpoint", "data.path"], "data.path=D checkpoint=RUN"),
        ("~data.cache", ["data.path"], "~data.cache"),
    ],
)
def test_plain_words(typed: str, keys: list[str], expected: str) -> None:
    assert with_plain_words(typed.split(), *keys, verb="x") == expected.split()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "a", "b"], "dino train: b: unexpected word; dino train reads data.path, and other"),
        (["eval", "a", "checkpoint=b"], "dino eval: a: unexpected word; dino eval reads checkpoint, and other"),
        (["train", "--data.path=x"], "dino train: --data.path=x: settings are written key=value, without dashes"),
        (
            ["table", "--markdown", "x"],
            "--markdown: settings are written key=value, without dashes; choose one of",
        ),
        (["table", "--plot", "x"], "without dashes; write plot=…"),
        (["table"], "dino table: missing: folders; see dino table --help."),
        (["report", "x", "outptu=y"], "dino report: outptu is not a key of dino report; did you mean 'output'?"),
        (["docs", "check=yes"], "dino docs: check=yes: expected true or false."),
        (["wandb", "a", "b"], "dino wandb: b: unexpected word; dino wandb reads one word (project) and key=value."),
    ],
)
def test_wrong_words_are_refused_in_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@dataclasses.dataclass
class Options:
    files: list[Path]
    kind: Literal["a", "b"] = "a"
    count: int = 3
    name: str | None = None
    others: list[Path] = dataclasses.field(default_factory=list)
    verbose: bool = False


def test_options_are_converted_to_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["x", "~/y", "kind=b", "count=4", "name=a=b", "others=[p,q]", "verbose=true"]
    expected = Options([Path("x"), Path("/home/me/y")], "b", 4, "a=b", [Path("p"), Path("q")], True)
    assert parse_options(Options, words, program="x") == expected
    assert parse_options(Options, ["x", "name=null"], program="x") == Options([Path("x")])
    for word, reason in {"kind=c": "kind=c: choose one of a, b", "count=many": "expected a whole number"}.items():
        with pytest.raises(UserError, match=reason):
            parse_options(Options, ["x", word], program="x")
