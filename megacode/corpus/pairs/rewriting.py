"""Equivalent rewrites of Python: loops and comprehensions, branches, comparisons, assignments.

A rewrite is offered where it keeps what is computed for ordinary values: comparisons and `not` have
no side effects and give truth values, `range` counts integers, iterating does not depend on the
list that is being built, and nothing looks at a function's frame (`locals`). `proof` runs what can
be run. The text is written anew from its syntax tree: comments and the layout are lost.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST = 3
"""Rewrites of one text."""
Rewrite = tuple[int, list[ast.stmt]]
"""How many statements are replaced, and by what."""
_TERMINAL = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_FRAME = {"super", "locals", "vars", "dir", "eval", "exec", "globals", "__class__"}


def rewritten(text: str, key: int) -> str | None:
    """An equivalent text in Python with one to three rewrites, or None if none applies."""
    try:
        tree = ast.parse(text)
        before, found = ast.dump(tree), None
        chooser = random.Random(key)
        for _ in range(chooser.randint(1, MOST)):
            if not (sites := list(_sites(tree))):
                break
            chooser.choice(sites)()
            new = ast.unparse(ast.fix_missing_locations(tree))
            tree = ast.parse(new)
            if ast.dump(tree) != before:  # else it was undone
                found = new
        return found
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _sites(tree: ast.Module) -> Iterator[Callable[[], None]]:
    """What can be done to the tree, each as a function that does it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for owner in _of_scope(function):
            for _, block in ast.iter_fields(owner):
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    yield from _of_block(block, function)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            for at, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, ast.expr) and (new := _expression(one)) is not None:
                    place = at if isinstance(value, list) else None
                    yield lambda p=parent, n=name, i=place, new=new: _put(p, n, i, new)  # type: ignore[misc]


def _put(parent: ast.AST, name: str, place: int | None, new: ast.expr) -> None:
    if place is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[place] = new


def _of_block(block: list[ast.stmt], function: ast.AST) -> Iterator[Callable[[], None]]:
    for at in range(len(block)):
        for rule in _STATEMENTS:
            found = rule(block[at:], function)
            if found is not None:
                count, new = found

                def put(at: int = at, count: int = count, new: list[ast.stmt] = new) -> None:
                    block[at : at + count] = new

                yield put


def _of_scope(function: ast.AST) -> Iterator[ast.AST]:
    """A function and what is in it, without the functions and classes within, and without `try`,
    where it matters how far a statement came."""
    yield function
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (*_SCOPES, ast.Try)):
            yield from _of_scope(child)


# ---------------------------------------------------------------------------------- loops


def _loop_to_comprehension(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`x = []; for t in s: x.append(e)` -> `x = [e for t in s]`; sets, dicts and counts too."""
    if len(block) < 2:
        return None
    start, loop = block[:2]
    name = _assigned_name(start)
    if name is None or not isinstance(loop, ast.For) or loop.orelse or len(loop.body) != 1:
        return None
    value, inner, tests = start.value, loop.body[0], []  # type: ignore[attr-defined]
    if isinstance(inner, ast.If) and not inner.orelse and len(inner.body) == 1:
        tests, inner = [inner.test], inner.body[0]
    generators = [ast.comprehension(loop.target, loop.iter, tests, 0)]
    new: ast.expr
    match value, inner:
        case (
            ast.List(elts=[]),
            ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id=own), attr="append"),
                    args=[element],
                    keywords=[],
                )
            ),
        ):
            new = ast.ListComp(element, generators)
        case (
            ast.Call(func=ast.Name(id="set"), args=[], keywords=[]),
            ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id=own), attr="add"),
                    args=[element],
                    keywords=[],
                )
            ),
        ):
            new = ast.SetComp(element, generators)
        case (
            ast.Dict(keys=[]),
            ast.Assign(targets=[ast.Subscript(value=ast.Name(id=own), slice=key)], value=element),
        ):
            new = ast.DictComp(key, element, generators)
        case (
            ast.Constant(value=0) as zero,
            ast.AugAssign(
                target=ast.Name(id=own), op=ast.Add(), value=ast.Constant(value=int()) as element
            ),
        ) if _is_int(zero):
            new = ast.Call(ast.Name("sum"), [ast.GeneratorExp(element, generators)], [])
        case _:
            return None
    if own != name or isinstance(getattr(element, "ctx", None), ast.Store):
        return None
    if isinstance(element, ast.Starred) or not _closed(new, loop, {name}, function):
        return None
    return 2, [_assign(name, new)]


def _comprehension_to_loop(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`x = [e for t in s]` -> a loop that appends; sets, dicts and `return [...]` too."""
    first = block[0]
    name = _assigned_name(first)
    if isinstance(first, ast.Return):
        name = _fresh("result", function)
    elif name is None:
        return None
    found = first.value  # type: ignore[attr-defined]
    if not isinstance(found, ast.ListComp | ast.SetComp | ast.DictComp):
        return None
    if len(found.generators) != 1 or found.generators[0].is_async:
        return None
    if not _closed(found, found, {name}, function):
        return None
    own = ast.Name(name)
    empty: ast.expr
    add: ast.stmt
    if isinstance(found, ast.DictComp):
        empty = ast.Dict([], [])
        add = ast.Assign([ast.Subscript(own, found.key)], found.value, lineno=0)
    else:
        is_list = isinstance(found, ast.ListComp)
        empty = ast.List([]) if is_list else ast.Call(ast.Name("set"), [], [])
        method = ast.Attribute(own, "append" if is_list else "add")
        add = ast.Expr(ast.Call(method, [found.elt], []))
    generator = found.generators[0]
    for test in reversed(generator.ifs):
        add = ast.If(test, [add], [])
    loop = ast.For(generator.target, generator.iter, [add], [], lineno=0)
    end: list[ast.stmt] = [ast.Return(own)] if isinstance(first, ast.Return) else []
    return 1, [_assign(name, empty), loop, *end]


def _loop_to_any(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`for t in s: if c: return True` and `return False` -> `return any(c for t in s)`."""
    match block[:2]:
        case [
            ast.For(
                target=target,
                iter=source,
                orelse=[],
                body=[
                    ast.If(
                        test=test,
                        orelse=[],
                        body=[ast.Return(value=ast.Constant(value=bool() as found))],
                    )
                ],
            ) as loop,
            ast.Return(value=ast.Constant(value=bool() as otherwise)),
        ] if found != otherwise:
            generator = ast.GeneratorExp(test, [ast.comprehension(target, source, [], 0)])
            if not _closed(generator, loop, set(), function):
                return None
            new: ast.expr = ast.Call(ast.Name("any"), [generator], [])
            return 2, [ast.Return(new if found else _negated(new))]
    return None


def _any_to_loop(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`return any(c for t in s)` -> a loop that returns; `all` too."""
    match block[0]:
        case ast.Return(
            value=ast.Call(
                func=ast.Name(id="any" | "all" as which),
                args=[ast.GeneratorExp(elt=element, generators=[one]) as generator],
                keywords=[],
            )
        ) if not one.is_async and _closed(generator, generator, set(), function):
            found = which == "any"
            inner: ast.stmt = ast.If(
                element if found else _negated(element), [ast.Return(ast.Constant(found))], []
            )
            for test in reversed(one.ifs):
                inner = ast.If(test, [inner], [])
            loop = ast.For(one.target, one.iter, [inner], [], lineno=0)
            return 1, [loop, ast.Return(ast.Constant(not found))]
    return None


def _range_to_while(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`for i in range(n): ...` -> `i = 0; while i < n: ...; i += 1`."""
    match block[0]:
        case (
            ast.For(
                target=ast.Name(id=name),
                iter=ast.Call(func=ast.Name(id="range"), args=[*bounds], keywords=[]),
                orelse=[],
            ) as loop
        ) if 1 <= len(bounds) <= 2:
            start = bounds[0] if len(bounds) == 2 else ast.Constant(0)
            if not _counts(loop, loop.body, name, bounds, [loop], function):
                return None
            test = ast.Compare(ast.Name(name), [ast.Lt()], [bounds[-1]])
            more = ast.AugAssign(ast.Name(name), ast.Add(), ast.Constant(1))
            return 1, [_assign(name, start), ast.While(test, [*loop.body, more], [])]
    return None


def _while_to_range(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`i = 0; while i < n: ...; i += 1` -> `for i in range(0, n): ...`."""
    match block[:2]:
        case [
            ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Constant(value=int() as first)
            ) as set_,
            ast.While(
                test=ast.Compare(left=ast.Name(id=tested), ops=[ast.Lt()], comparators=[bound]),
                body=[
                    *body,
                    ast.AugAssign(
                        target=ast.Name(id=added), op=ast.Add(), value=ast.Constant(value=1)
                    ),
                ],
                orelse=[],
            ) as loop,
        ] if name == tested == added and body and not isinstance(first, bool):
            if not _counts(loop, body, name, [bound], [set_, loop], function):
                return None
            numbers = [bound] if first == 0 else [ast.Constant(first), bound]
            source = ast.Call(ast.Name("range"), numbers, [])
            return 2, [ast.For(ast.Name(name), source, body, [], lineno=0)]
    return None


def _counts(
    loop: ast.For | ast.While,
    body: Sequence[ast.stmt],
    name: str,
    bounds: Sequence[ast.expr],
    own: Sequence[ast.AST],
    function: ast.AST,
) -> bool:
    """Whether `name` counts up to a fixed bound: it and the bounds are not set in the body, it is
    used in the loop (`own`) only, and no `continue` passes the end of the body by."""
    if not all(isinstance(one, ast.Name) or _is_int(one) for one in bounds):
        return False
    fixed = {name, *(one.id for one in bounds if isinstance(one, ast.Name))}
    inside = [node for stmt in body for node in ast.walk(stmt)]
    return (
        not any(
            isinstance(node, ast.Name) and node.id in fixed and not isinstance(node.ctx, ast.Load)
            for node in inside
        )
        and name not in {one.id for one in bounds if isinstance(one, ast.Name)}
        and not any(isinstance(node, ast.Continue | ast.Global | ast.Nonlocal) for node in inside)
        and not any(isinstance(node, _SCOPES) for node in inside)
        and _only_in(name, own, function)
    )


def _is_int(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _closed(made: ast.AST, own: ast.AST, built: set[str], function: ast.AST) -> bool:
    """Whether a loop and the comprehension `made` of it are the same.

    It reads none of the names that are being `built`. Its targets are plain names that nothing
    outside of `own` uses. Nothing in it has a scope, stops (`await`, `yield`) or sets a name.
    """
    targets: set[str] = set()
    for one in ast.walk(made):
        if isinstance(one, ast.comprehension):
            for node in ast.walk(one.target):
                if isinstance(node, ast.Name):
                    targets.add(node.id)
                elif not isinstance(node, ast.Tuple | ast.Store):
                    return False
        elif isinstance(
            one, ast.Lambda | ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr
        ) or (isinstance(one, ast.Name) and one.id in built | _FRAME):
            return False
    return not targets & built and all(_only_in(name, [own], function) for name in targets)


def _only_in(name: str, own: Sequence[ast.AST], function: ast.AST) -> bool:
    """Whether all of the function that has the name is in `own`."""

    def uses(tree: ast.AST) -> int:
        return sum(
            (isinstance(node, ast.Name) and node.id == name)
            or (isinstance(node, ast.arg) and node.arg == name)
            or (isinstance(node, ast.Global | ast.Nonlocal) and 2 * (name in node.names))
            for node in ast.walk(tree)
        )

    return uses(function) == sum(map(uses, own))


# -------------------------------------------------------------------------------- branches


def _swapped(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`if c: a else: b` -> `if not c: b else: a`."""
    match block[0]:
        case ast.If(test=test, body=body, orelse=[_, *_] as orelse):
            return 1, [ast.If(_negated(test), orelse, body)]
    return None


def _early(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`if c: return a` and what follows -> `if c: return a else: ...`, and back."""
    match block[0]:
        case ast.If(test=test, body=[*_, last] as body, orelse=orelse) if isinstance(
            last, _TERMINAL
        ):
            if orelse:
                return 1, [ast.If(test, body, []), *orelse]
            if len(block) > 1:
                return len(block), [ast.If(test, body, list(block[1:]))]
    return None


def _condition_to_if(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`x = a if c else b` or `return a if c else b` -> an if statement."""
    first = block[0]
    match first:
        case ast.Assign(value=ast.IfExp()) | ast.Return(value=ast.IfExp()):
            chosen: Any = first.value
            yes, no = copy.copy(first), copy.copy(first)
            yes.value, no.value = chosen.body, chosen.orelse
            return 1, [ast.If(chosen.test, [yes], [no])]
    return None


def _if_to_condition(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`if c: x = a else: x = b` or with `return` -> a conditional expression."""
    match block[0]:
        case ast.If(
            test=test,
            body=[ast.Assign(targets=[ast.Name(id=name)], value=yes)],
            orelse=[ast.Assign(targets=[ast.Name(id=other)], value=no)],
        ) if name == other and not _stops(yes, no):
            return 1, [_assign(name, ast.IfExp(test, yes, no))]
        case ast.If(
            test=test,
            body=[ast.Return(value=ast.expr() as yes)],
            orelse=[ast.Return(value=ast.expr() as no)],
        ) if not _stops(yes, no):
            return 1, [ast.Return(ast.IfExp(test, yes, no))]
    return None


def _stops(*values: ast.expr) -> bool:
    """Whether a value is too much for a conditional expression."""
    return any(isinstance(one, ast.Yield | ast.YieldFrom | ast.Tuple) for one in values)


def _augmented(block: Sequence[ast.stmt], function: ast.AST) -> Rewrite | None:
    """`x += 1` -> `x = x + 1`, and back, for constants: a list that is added to stays the same."""
    constant = ast.Add | ast.Sub | ast.FloorDiv | ast.Mod | ast.Pow | ast.Div
    match block[0]:
        case ast.AugAssign(
            target=ast.Name(id=name), op=op, value=ast.Constant(value=int() | float() | str()) as by
        ) if isinstance(op, constant):
            return 1, [_assign(name, ast.BinOp(ast.Name(name), op, by))]
        case ast.Assign(
            targets=[ast.Name(id=name)],
            value=ast.BinOp(
                left=ast.Name(id=other),
                op=op,
                right=ast.Constant(value=int() | float() | str()) as by,
            ),
        ) if name == other and isinstance(op, constant):
            return 1, [ast.AugAssign(ast.Name(name), op, by)]
    return None


_STATEMENTS = (
    _loop_to_comprehension, _comprehension_to_loop, _loop_to_any, _any_to_loop, _range_to_while,
    _while_to_range, _swapped, _early, _condition_to_if, _if_to_condition, _augmented,
)  # fmt: skip


# ----------------------------------------------------------------------------- expressions


def _expression(node: ast.expr) -> ast.expr | None:
    """De Morgan's laws, and a chained comparison in two."""
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=ast.BoolOp(op=op, values=values)):
            return ast.BoolOp(_other(op), [_negated(one) for one in values])
        case ast.BoolOp(op=op, values=values) if all(
            isinstance(one, ast.UnaryOp) and isinstance(one.op, ast.Not) for one in values
        ):
            inner = [one.operand for one in values if isinstance(one, ast.UnaryOp)]
            return ast.UnaryOp(ast.Not(), ast.BoolOp(_other(op), inner))
        case ast.Compare(
            left=left,
            ops=[first, second],
            comparators=[ast.Name() | ast.Constant() as middle, right],
        ):
            return ast.BoolOp(
                ast.And(),
                [ast.Compare(left, [first], [middle]), ast.Compare(middle, [second], [right])],
            )
    return None


def _other(op: ast.boolop) -> ast.boolop:
    return ast.Or() if isinstance(op, ast.And) else ast.And()


def _negated(test: ast.expr) -> ast.expr:
    """The opposite truth value."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=ast.Compare() | ast.UnaryOp(op=ast.Not()) as inner):
            return inner
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _FLIPPED:
            return ast.Compare(left, [_FLIPPED[type(op)]()], [right])
    return ast.UnaryOp(ast.Not(), test)


# --------------------------------------------------------------------------------- helpers


def _assigned_name(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name)], value, lineno=0)


def _fresh(name: str, function: ast.AST) -> str:
    taken = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    taken |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    number = 1
    while (new := name if number == 1 else f"{name}_{number}") in taken:
        number += 1
    return new
