"""Arguments that several verbs have, and types that check a value."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.recipe.schema import TokenizerSection

_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors: one sentence and exit code 2, as for every mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; `{self.prog} --help` says more")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples as they stand, and each argument's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS)
        return f"{text} (%(default)s)" if shown and "%(default)" not in text else text


def _expected(what: str, text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"expected {what}, not {text}")


def at_least(least: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """The type of a finite number that is `least` or more."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not least <= number < math.inf:
            _expected(f"{least:g} or more", text)
        return number

    parse.__name__ = kind.__name__  # argparse says `invalid int value`
    return parse


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        _expected("more than 0 and at most 1", text)
    return number


def share(text: str) -> float:
    """`0.1%` or `0.001` -> 0.001."""
    number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= number <= 1:
        _expected("a share, such as 0.1% or 0.001", text)
    return number


def one_of(text: str) -> tuple[int, int]:
    """`0/8` -> (0, 8): one of N, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        _expected("I/N, one of N counted from 0 (0/4, 1/4, 2/4 or 3/4)", text)
    return int(match[1]), int(match[2])


def whole_numbers(text: str) -> list[int]:
    """`100,200` -> [100, 200]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        _expected("whole numbers split by commas, such as 100,200,300", text)
    return list(map(int, text.split(",")))


def size(text: str) -> int:
    """Bytes: `10GB` -> 10^10, `32MiB` -> 2^25."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?|[KMGT]i)B?", text)
    number = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not number:
        _expected("a size in bytes, such as 10GB, 512MiB or 1000000", text)
    return number


def without_ending(path: Path) -> Path:
    """The prefix of a dataset, which may be given as one of its files."""
    path = path if path.name.strip(".") else path.resolve()
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".json") else path


def add_overrides(
    parser: argparse.ArgumentParser, of: str = "the recipe, such as parallel.tensor=2"
) -> None:
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help=f"change a key of {of}; may be given several times",
    )  # fmt: skip


def add_corpus(group: argparse._ActionsContainer) -> None:
    """How documents are found in the files of `INPUT`."""
    from megacode.corpus.inputs import FORMATS

    add = group.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, @FILE (a list of them)")
    add("--text-field", default="text", metavar="NAME", help="field of the text; a.b for nested")
    add("--format", choices=FORMATS, default="auto", help="of the inputs; auto: by their endings")
    add(
        "--include", action="append", default=[], metavar="GLOB", help="in folders: such names only"
    )


def add_tokenizer(group: argparse._ActionsContainer, required: bool) -> None:
    add = group.add_argument
    files = "SentencePiece .model, tokenizer.json, .tiktoken"
    add("--tokenizer", required=required, metavar="FILE", help=files)
    kinds = ("sentencepiece", "huggingface", "tiktoken")
    add("--tokenizer-kind", choices=kinds, help="(by the ending)")
    names = "`crystal`, or names split by commas: as in the recipe"
    add("--added-tokens", default="none", metavar="LIST", help=names)


def tokenizer_section(args: argparse.Namespace, **more: bool) -> TokenizerSection:
    """What `add_tokenizer` was given, as a recipe's section."""
    from megacode.recipe.schema import TokenizerSection

    added = args.added_tokens
    return TokenizerSection(
        path=args.tokenizer,
        kind=args.tokenizer_kind,
        added_tokens=added if added in ("none", "crystal") else added.split(","),
        **more,
    )
