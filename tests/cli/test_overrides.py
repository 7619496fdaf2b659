"""Paths with any characters on the command line, and the order of Hydra's flags."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.cli.overrides import with_flags_first, with_quoted_paths

NAMES = ["a b", "Öland (2023)", "it's", "a&b", "日本", "a=b", "[x]", "back\\", "q\\'x", "\"both'", "100%", "~x", "x~"]


def hydra_reads(word: str) -> object:
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("name", NAMES)
def test_hydra_reads_paths_as_typed(name: str) -> None:
    (word,) = with_quoted_paths([f"data.path=/photos/{name}"])
    assert hydra_reads(word) == f"/photos/{name}"
    assert with_quoted_paths([word]) == [word], (
        "quoting twice changes nothing, as in processes started with these arguments"
    )


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="${},"), min_size=1))
def test_hydra_reads_paths_with_any_name(name: str) -> None:
    (word,) = with_quoted_paths([f"output_dir=/{name}"])
    if word != f"output_dir=/{name}":
        assert hydra_reads(word) == f"/{name}"
    else:
        assert str(hydra_reads(word)).split() == f"/{name}".split()


def test_commas_separate_values_only_in_sweeps(tmp_path: Path) -> None:
    there = tmp_path / "a,b"
    there.mkdir()
    assert with_quoted_paths([f"data.path={there}"]) == [f"data.path='{there}'"]
    assert with_quoted_paths(["output_dir=a,b"]) == ["output_dir='a,b'"]
    for words in (["-m", f"data.path={there}"], ["--multirun", "output_dir=a,b"], ["checkpoint=A,B"]):
        assert with_quoted_paths(words) == words


@pytest.mark.parametrize(
    "word", ["data.path=/photos", "data.path='/a b'", "data.path=${oc.env:HOME}/x", "optim.lr=(", "data.path=", "-sc"]
)
def test_other_arguments_are_unchanged(word: str) -> None:
    assert with_quoted_paths([word]) == [word]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a=1 --multirun seed=0,1", "--multirun a=1 seed=0,1"),
        ("a=1 --cfg job b=2 -m", "--cfg job -m a=1 b=2"),
        ("-sc query=bash", "-sc query=bash"),
        ("a=1 --info config", "--info config a=1"),
        ("--info a=1", "--info all a=1"),
        ("a=1 -i", "-i all a=1"),
        ("a=1 -i -m", "-i all -m a=1"),
        ("a=1 -i defaults-tree", "-i defaults-tree a=1"),
        ("a=1 ~b", "a=1 ~b"),
        ("--config-dir", "--config-dir"),
    ],
)
def test_flags_come_first(typed: str, expected: str) -> None:
    assert with_flags_first(typed.split()) == expected.split()
