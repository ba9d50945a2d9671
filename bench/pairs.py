"""Renaming a function's own names: functions per second of one core, beside libcst in the same run.

    python bench/pairs.py [--functions 3000] [--table FILE]

The functions are drawn from this Python installation's standard library. libcst's side renames what its ScopeProvider finds
assigned in the function, and nothing that is also a global, an import or a member of a class. Both sides get the same texts, in
turns of 100, on one core; parsing counts. "Renamed" are functions with at least one new name. "Names" are those that
the compiler's symbol table calls local. libcst needs `pip install libcst`.

Measured: docs/results/pairs.md
"""

from __future__ import annotations

import argparse
import datetime
import keyword
import random
import symtable
import sysconfig
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import libcst
from libcst import metadata
from megatron_data import machine_line
from rich.console import Console

from megacode.corpus.pairs.functions import functions_of
from megacode.corpus.pairs.renaming import renamed

LOCAL = (metadata.FunctionScope, metadata.ComprehensionScope)


class Rename(libcst.CSTTransformer):
    def __init__(self, new: dict[libcst.CSTNode, str]) -> None:
        super().__init__()
        self.new = new

    def leave_Name(self, original_node: libcst.Name, updated_node: libcst.Name) -> libcst.Name:
        name = self.new.get(original_node)
        return updated_node if name is None else updated_node.with_changes(value=name)


def with_libcst(text: str, key: int) -> str | None:
    wrapper = metadata.MetadataWrapper(libcst.parse_module(text), unsafe_skip_copy=True)
    scopes = {scope for scope in wrapper.resolve(metadata.ScopeProvider).values() if scope}
    own = wrapper.module.body[0]
    places: dict[str, list[libcst.CSTNode]] = {}
    kept = {"self", "cls", "_"}
    for scope in scopes:
        kept.update(access.node.value for access in scope.accesses if not access.referents and isinstance(access.node, libcst.Name))  # fmt: skip
        for assignment in scope.assignments:
            imported = isinstance(assignment, metadata.ImportAssignment)
            if imported or not isinstance(assignment, metadata.Assignment):
                kept.add(assignment.name)
                continue
            node = assignment.node
            if not isinstance(scope, LOCAL) and node is not own:
                kept.add(assignment.name)
            found = places.setdefault(assignment.name, [])
            found.append(node if isinstance(node, libcst.Name) else node.name)
            found += [access.node for access in assignment.references]
    draw = random.Random(key)
    new: dict[libcst.CSTNode, str] = {}
    for number, name in enumerate(sorted(set(places) - kept)):
        fresh = f"v{number}_{draw.randrange(1000)}"
        new |= {node: fresh for node in places[name] if isinstance(node, libcst.Name)}
    return wrapper.module.visit(Rename(new)).code if new else None


def local_names(text: str) -> set[str]:
    names: set[str] = set()
    others: set[str] = set()
    tables = [symtable.symtable(text, "text", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            member = table.get_type() == "class" and symbol.is_local()
            outside = symbol.is_global() or symbol.is_imported() or member
            (others if outside else names).add(symbol.get_name())
    return {name for name in names - others if name.isidentifier() and not keyword.iskeyword(name)}


def sample(count: int) -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if not {"site-packages", "test", "tests", "lib2to3"} & set(file.parts))  # fmt: skip
    texts = [
        function.text
        for file in files
        for function in functions_of(file.read_text(encoding="utf-8", errors="replace"), "python")
    ]
    return random.Random(0).sample(texts, min(count, len(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--functions", type=int, default=3000)
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page here too")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # escapes in the library's strings
    texts = sample(args.functions)
    sides: dict[str, Callable[[str, int], str | None]] = {
        "megacode": lambda text, key: renamed(text, "python", key),
        "libcst": with_libcst,
    }
    seconds, results = dict.fromkeys(sides, 0.0), {name: [] for name in sides}
    for rename in sides.values():
        rename(texts[0], 0)  # grammars and imports
    with Console().status("renaming"):
        for first in range(0, len(texts), 100):
            for name, rename in sides.items():
                started = time.process_time()
                results[name] += [rename(text, 1) for text in texts[first : first + 100]]
                seconds[name] += time.process_time() - started

    rows = []
    total = sum(len(local_names(text)) for text in texts)
    for name in sides:
        pairs = [(a, b) for a, b in zip(texts, results[name], strict=True) if b is not None]
        whole = [(a, b) for a, b in pairs if compiles(b)]
        new = sum(len(local_names(a) - local_names(b)) for a, b in whole)
        rate = len(texts) / seconds[name]
        ratio = seconds[name] / seconds["megacode"]
        rows.append(
            f"| {name} | {rate:,.0f} | {ratio:.1f} x | {1 - len(pairs) / len(texts):.1%} | {new / total:.1%} "
            f"| {len(pairs) - len(whole)} |"
        )
    page = "\n".join(
        [
            "# Renaming: `bench/pairs.py`",
            "",
            f"{datetime.date.today()}, {machine_line()}, libcst {version('libcst')}; one process.",
            f"Command: `python bench/pairs.py --functions {args.functions}`. {len(texts):,} functions of the standard library,",
            f"{sum(map(len, texts)) / len(texts):,.0f} characters each on average, with {total:,} local names. CPU time.",
            "",
            "| side | functions/s | time, of megacode's | left unrenamed | local names renamed | do not compile |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(page)
    if args.table:
        args.table.write_text(page)


def compiles(text: str) -> bool:
    try:
        compile(text, "text", "exec")
    except SyntaxError:
        return False
    return True


if __name__ == "__main__":
    main()
