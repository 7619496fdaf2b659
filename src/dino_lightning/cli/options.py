"""Command lines of verbs that Hydra does not compose: `key=value` and plain words become a dataclass."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dino_lightning.errors import UserError, did_you_mean

Options = TypeVar("Options")


def parse_options(schema: type[Options], words: Sequence[str], *, program: str) -> Options:
    """The dataclass with the values of the command line.

    The first field takes the plain words: all of them if it is a list. Its name works as a key as well. Raises
    `UserError` for an unknown key, a wrong value, and a missing or superfluous plain word.
    """
    types = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    plain = next(iter(fields))
    values: dict[str, Any] = {}
    plain_words: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        if word.startswith("-"):
            name = word.strip("-").partition("=")[0]
            way_out = f"write {name}=…" if name in fields else did_you_mean(name, fields)
            raise UserError(f"{word}: settings are written key=value, without dashes; {way_out}")
        if "=" not in word or (key not in fields and Path(word).exists()):
            plain_words.append(word)
        elif key not in fields:
            raise UserError(f"{key} is not a key of {program}; {did_you_mean(key, fields)}")
        else:
            values[key] = _convert(key, text, types[key])
    if plain_words and get_origin(types[plain]) is list:
        values[plain] = [_convert(plain, word, get_args(types[plain])[0]) for word in plain_words]
    elif len(plain_words) == 1 and plain not in values:
        values[plain] = _convert(plain, plain_words[0], types[plain])
    elif plain_words:
        raise UserError(f"{plain_words[-1]}: unexpected word; {program} reads one word ({plain}) and key=value.")
    try:
        return schema(**values)
    except TypeError:  # a field without default
        missing = next(key for key in fields if key not in values)
        raise UserError(f"missing: {missing}; see {program} --help.") from None


def _convert(key: str, text: str, kind: Any) -> Any:
    if isinstance(kind, UnionType):  # X | None
        return None if text == "null" else _convert(key, text, get_args(kind)[0])
    if get_origin(kind) is list:
        return [_convert(key, part, get_args(kind)[0]) for part in text.strip("[]").split(",") if part]
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise UserError(f"{key}={text}: {did_you_mean(text, get_args(kind))}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{key}={text}: expected true or false.")
        return text == "true"
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{key}={text}: expected a whole number.") from None
    return Path(text).expanduser() if kind is Path else text
