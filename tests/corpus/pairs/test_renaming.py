"""Renaming in every language: what is renamed and what stays, written out; and results of programs that run."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megacode.corpus.pairs.functions import function_tree, functions_of
from megacode.corpus.pairs.languages import LANGUAGES
from megacode.corpus.pairs.renaming import renamed

CASES: dict[str, list[str]] = {
    "python": [
        "def §f(§a, *§b, c=c, **§d):\n    return §f(§a, *§b, c=c.a, d=§d)",
        "def f(self, §x):\n    return f(self.f(§x))",
        "def §f(self, §x):\n    self.x = §x",
        "@f\ndef f(§x):\n    return §x",
        "def f(§x=f):\n    return f(§x)",
        "@staticmethod\ndef open(§path):\n    return open(§path, mode='r')",
        "def §f(§x, n):\n    return 0 if not n else §f(§x, n=n - 1)",
        "def §f(§x):\n    def §g(a, §b):\n        return a\n    return §g(a=§x, *b1), h(x=§x)",
        "def §f(§x):\n    def §g(a, b):\n        return a\n    return §g(**§x)",
        "def §f(§x):\n    import x1.x as y, x2\n    from . import z\n    y = x2(z, §x)",
        "def §f():\n    global a\n    a = §b = 1\n    def §g():\n        nonlocal §b\n        §b += a\n    return §g",
        "def §f(§y):\n    return [x for x in §y], x, [§z for §z in §y]",
        "def §f(§x=lambda §a, §b=1: §a):\n    return {§k: v for §k in v}",
        "def §f(§e):\n    class §C(B):\n        d = §e\n        g = 1\n        def m(self, §u): return self.g\n    return §C(g=§e)",
        "def §f(§e):\n    try:\n        pass\n    except (E, F) as §e:\n        raise §e\n    with a as §g, b as (§h, i.j): §h",
        "def §f(§x):\n    match §x:\n        case {'k': §a, **§b} | P.Q(r=§c): return §b\n        case [§d, *§e] if d1: return §c\n        case §g: return §g",
        "def §f(§x, §y):\n    return f'{§x!r:>{§y}} x {{y}}' 'x' + f\"{§x + f'{§y}'}\"",
        "def §f(§x, y):\n    return f'{y=} {§x}'",
        "def §f(§x):\n    return (§y := §x) and [(§z := §i) for §i in §y] and §z",
        "async def §f[§T: int, *§U](§x: §T = u) -> list[§T]:\n    async for §y in §x: await §y\n    async with §x as §z: pass\n    §v: T1 = §z",
        "def §f(§_x, _, __y):\n    __z = §_x; §q = _\n    return __y",
        "def §größe(§ñ):\r\n\treturn §ñ.größe1 # ñ\r\n",
        'def §f(§a):\n    """Of a."""\n    for §i, (§j, *§k) in §a: print(§i, §j, "a", a1) # a\n    del §k',
        "def §f(§print, int: int):\n    return §print(int)",
        "def §f(§x): print §x, y",
    ],
    "javascript": [
        "function §f(§a, {§:b, c: §d, §:e = 1, ...§g}, [§h, , §i] = []) { return §f(§a.a, {§:b, d: §d, [§e]: §g}, §h) }",
        "function §f() { for (let i = 0; i < 3; i++) {} return i }",
        "function §f() { for (var §i = 0; §i < 3; §i++) { var §j = 1; let §k } return §i + §j }",
        "function §f(§o) { let §a; ({§:a, b, c: §o.c} = §o); [§a, d] = §o }",
        "function §f(§x) { §o: for (const §y of §x) { for (const §z in §y) continue §o } for (w of §x) {} }",
        "const §f = (§x) => §x.f1 ? §x : §f(§x)",
        "async function* §f(§x) { try { yield* await §x } catch ({§:message}) { throw §message } }",
        "function §f(§x) { const §g = function §h(§n) { return §n ? §h(§n - 1) : arguments[0] }; return §g }",
        "function §f(§x) { class §A extends B { x = §x; #y = 1; static m(§z) { return new §A(§z, this.#y) } }; return {x: 1}.x }",
        "function §f(§x) { return `x ${§x} ${`${§x}`}` + 'x' + /x/.test(§x) }",
        "§f(§x) { this.x = §x; return super.g(§x) }",
        "f(§x) { return this.f(§x) || f }",
        "const §f = §x => ({ m(§y) { return §x + §y }, x: §x })",
        "get §size() { const §n = 1; return §n }",
        "function §f(Foo, §a) { return <Foo a={§a} {...§a}><b.c/>a</Foo> }",
        "function §f(§a = §b1, §b1 = b) { if (§a) { function §g() { return §b1 } §g() } }",
    ],
    "typescript": [
        "function §f<§T extends Foo>(§a: §T, §b?: Bar<§T>, ...§c: §T[]): §a is §T { return §f<§T>(§a) }",
        "function §f(§x: typeof §x) { type §A = {x: string}; interface §I { y: §A } enum §E { P } let §i: §I; return §E.P as §E }",
        "constructor(private a: string, readonly b: number, §c: string) { super(a, §c) }",
        "@dec()\nasync §m<§K>(this: Foo, {§:a}: {a: §K}): Promise<§K> { return this.x as unknown as §K }",
        "function §f(§g: (§k: number) => void, §t: [aa: string, bb?: number]) { §g(§t[0]) }",
        "function §f(§o: {[key: string]: number}) { return key }",
        "function f() { return 1 + this.f }",
        "function §f(§x: Foo.Bar): asserts §x is Foo.Bar { if (!§x) throw new Foo!() }",
        "function §f() { abstract class §A<§T> { abstract m(§y: §T): void } return §A }",
        "const §f = async <§T,>(§x: §T): Promise<§T> => { return §x satisfies §T }",
        "function §f(Foo: Foo) { return Foo }",
        "set §value(§v: number) { this.v = §v }",
    ],
    "java": [
        "public static <§T extends Foo<§T>> §T §f(final §T §a, int... §b) throws E { return §f(§a, §b[0]); }",
        "int §f(int §x) { this.x = §x; y = x1 + this.z; return o.x; }",
        "int f(int §x) { return this.f(§x) + f(§x); }",
        "int §f() { size = 2; int size = size(); return size; }",
        "int §size() { int §n = count(); return §n; }",
        "void §f(List<A> §l) { §o: for (A §a : §l) { for (int §i = 0;; §i++) break §o; } }",
        "void §f() { try (R §r = open(); q) { §r.r(); } catch (A | B §e) { throw §e; } }",
        "Object §f(int §x) { return new Foo(§x) { int y; @Override public int m(int §z) { return §x + y + §z; } }; }",
        "void §f(Object §o) { if (!(§o instanceof String §s)) return; use(§s, (§u, §v) -> §u, §w -> §w, (int §k) -> §k, §s::m, Foo::m); }",
        "int §f(Object §o) { return switch (§o) { case Foo §a -> §a.b; case P(int §c, var §d) -> §c + §d; default -> 0; }; }",
        "Foo(int §a) { this.a = §a; Foo.b = §a; }",
        "void §f() { class §L<T> { int v; §L(int §v1) { v = §v1; } } §L<String> §l = new §L<>(1); record §R(int p) {} §R §r = new §R(1); §r.p(); }",
        "@SuppressWarnings(value = \"x\") void §f(int §x) { int §value = §x; /* x */ char §c = 'x'; String §s = \"x\"; }",
    ],
    "c": [
        "static int *§f(struct point *§point, char **§argv, int §n[], int (*§cb)(int, void *ctx), ...) { return §f(§point, §argv, §n, §cb, ctx); }",
        "int §f(int §a) { §a = g + b; int §g1 = §a, *§b2 = &§a, §c[2] = {§a}; return §c[0] + s.a + §b2->a; }",
        "int §f(int §x) { g(); { int g = 1; §x = g; } return g; }",
        "int §f(int §x) { goto §end; §end: return (int)§x + sizeof(§x) + sizeof(struct x1); }",
        "int §f(int §a) { extern int v; int h(int); return v + h(§a); }",
        "int §f(int §x, int n) {\n#define K(k) (n + k)\n#ifdef DEBUG\n  §x++;\n#endif\n  return K(§x); }",
        "int §f(int §a) { struct S { int a; } §s = {.a = §a}; typedef int §my; §my §q = (§my)§s.a; return §q; }",
        "int §f(§a, §b) int §a; char §b; { return A(§a) + §b; }",
        "int §f(void) { enum { RED, BLUE = 2 }; for (int §i = 0, §j = RED; §i < §j; §i++) ; int (*§p)(int) = h; return §p(1); }",
        "int main(int §argc) { printf(\"argc %d\\n\", §argc); return EXIT; }",
        "int §f(T *§x) { return §x == NULL ? 'x' : (*§x)->y[§x->z]; /* x */ }",
        "unsigned long §f(const unsigned char *restrict §s, size_t §l) { static unsigned long §t; do { §t += *§s++; } while (--§l); return §t; }",
    ],
    "cpp": [
        "template <typename §T, int §N, class... §Ts> auto §f(const §T& §a, §Ts&&... §rest) -> §T { return §f<§T>(§N, std::forward<§Ts>(§rest)...); }",
        "int A::f(int §x) const { return this->x + y + §x + A::x1; }",
        "void §f(M& §m) { for (auto& [§k, §v] : §m) §k = §v; for (const auto& §it : §m) §it.f1(); }",
        "int §f(int §b) { auto §l = [&, §b, §c = std::move(§b), this](int §d) mutable { return §d + §b + §c; }; return §l(1); }",
        "void §f(int §n) { std::vector<int> §v(§n), §w{§n}, §u(§n + 1); §v.n(); int g(int); Foo h(); g(§v); h(); }",
        "void §f() { try { a(); } catch (const E& §e) { §e.what(); } if (auto §g = b(); §g) {} }",
        "void §f(int x, int §y) { struct §S { int x; int g() { return x; } }; §S §s{.x = §y}; using §I = int; typedef int §J; §I §i = (§J)x; §s.x = §i; }",
        "void §f() { struct S { int m; S(int §k) : m(§k) {} }; S §s(1); }",
        "Foo::Foo(int §a) : a_(§a), b(§a) { c = §a; }",
        "void §f(Foo& Foo) { Foo.x(); }",
        "int §f(int §a = k) { using std::swap; swap(§a, b); §end: if (§a) goto §end; return static_cast<int>(§a); }",
        "bool operator==(const A& §l, const A& §r) { return §l.x == §r.x; }",
        "void §f(unsigned §n) { unsigned §q = n1::p + ::g(§n); delete[] §q; }",
    ],
    "go": [
        "func §f(§a, §b int, §c ...string) (§res int, §err error) { return §f(§a, §b, §c...) }",
        "func (§r *Recv) §f(§x int) int { §r.x = §x; return fmt.Sprint(§x) }",
        "func (§r *Recv) f(§x int) int { return f(§x) + §r.f(§x) }",
        "func §f[§T any, §U interface{ ~int }](§x §T, string string) §T { var §y §T; §y = §f[§T](§x); return §y }",
        "func §f() { err := err; §x, §y := 1, 2; §y, §z := §x, 3; _ = err + §z }",
        "func §f(§m map[string]int) { for §k, §v := range §m { g(§k, §v) }; for §i := 0; §i < 3; §i++ {}; for w = range §m {} }",
        "func §f(§m M) { if §v, §ok := §m[key]; §ok { g(§v) } else { h(§v) } }",
        "func §f(§x any) { switch §t := §x.(type) { case int: g(§t); default: h(§t) } }",
        "func §f(§c chan int) { §L: for { select { case §v := <-§c: g(§v); break §L; case §c <- 1: goto §M; case w = <-§c: } }\n§M:\n }",
        "func §f(a int, §b int) P { type §L struct { a int; B string }; §l := §L{a: a, B: \"a\"}; return P{c: §l.a, x: §b} }",
        "func §f(§a int) []P { const §n = 2; var §p, §q = §n, §a; return []P{{§p, §q}, image.Pt{§a, §n}} }",
        "func main() { §g := func(§d int) int { defer h(§d); return §d }; go §g(1); §s := `g`; k(§s) }",
    ],
    "rust": [
        "pub fn §f<'a, §T: Foo, const §N: usize>(mut §x: &'a §T, (§b, §c): (i32, i32)) -> Option<§T> where §T: Bar { §T::new(); §f(§x, (§b, §N as i32 + §c)) }",
        "fn §f(&self, §x: u8) -> u8 { self.x + Self::g(§x) }",
        "fn f(&self, §x: u8) -> u8 { f(self.f(§x)) }",
        "fn §f() { foo(1); let foo = foo(); let §y = 1; let §y = §y + 1; bar(foo, §y) }",
        "fn §f() { let foo = foo(); bar(foo) }",
        "fn §f(Pt { §:x, y: §z, .. }: Pt) -> S { let §w = 1; S { §:x, y: §z, w: §w, ..base } }",
        "fn §f(Pt { ref x, mut y }: Pt) -> i32 { x + y }",
        "fn §f(§v: Vec<i32>) { '§o: for (§i, &§e) in §v.iter().enumerate() { if §e > 0 { break '§o; } continue '§o; } for g in g() { h(g) } }",
        "fn §f(§v: E) -> i32 { match §v { E::A(§m) if §m > 0 => §m, §n @ 1..=3 => §n, CONST => 1, None => 2, [§a, .., §b] => §a + §b, §low => §low.v } }",
        "fn §f(§o: O) -> i32 { if let Some(§q) = §o.q { §q } else { 0 }; while let Some(§h) = §o.next() { g(§h) }; let Some(§w) = §o else { return 1 }; §w }",
        "fn §f(§s: i32) { let §c = move |§d, §e: i32| §d + §e + §s; §c(1, 2); let _ = |&§p| §p; async move { §s }; }",
        "fn §f(x: i32, §y: i32, §z: i32) { println!(\"{x} {} {{y}}\", §y.z1); assert_eq!(vec![§y; 2], m::g(§z)); }",
        "fn §f(x: i32, §y: i32) { let x = 1; log!(target: \"y\", k = §y); a!(S { x }); b!(x => §y) }",
        "fn §f() { use a::b as c; const §K: u8 = 1; struct §L { k: T1 } fn §g(§k: u8) -> u8 { §k } let §l = §L { k: 1 }; c(§l.k, §g(§K)) }",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "marked"), [(language, case) for language in CASES for case in CASES[language]]
)
def test_exactly_the_marked_names_are_renamed(language: str, marked: str) -> None:
    """§x is renamed, and §:x becomes `x: new`."""
    text = re.sub(r"§:?", "", marked)
    expected, names = "", {}
    for position, part in enumerate(re.split(r"§(:?[\w$]+)", marked)):
        if position % 2 == 0:
            expected += re.escape(part)
            continue
        name = part.lstrip(":")
        expected += f"{name}: " if part != name else ""
        expected += f"(?P=n{names[name]})" if name in names else f"(?P<n{len(names)}>[a-z]\\d+)"
        names.setdefault(name, len(names))
    after = renamed(text, language, 7)
    if not names:
        assert after is None
        return
    assert after is not None
    match = re.fullmatch(expected, after)
    assert match, f"{after!r}"
    new = set(match.groups())
    assert len(new) == len(names) and not new & set(re.findall(r"\w+", text))
    assert not function_tree(after.encode(), LANGUAGES[language])[0].has_error
    assert renamed(after, language, 7) == after
    assert renamed(text, language, 7) == after != renamed(text, language, 8)


PROGRAMS: dict[str, tuple[str, str, str, str]] = {
    "javascript": (
        """function walk(tree, {depth = 0, seen = new Set()} = {}) {
  const {name, children: [first, ...rest] = [], size} = tree, walked = {name, depth};
  scan: for (const child of [first, ...rest]) {
    if (!child) continue scan;
    var size1 = size ?? `${name}/${depth}`;
    seen.add(((name, walk1) => `${name}:${walk1}`)(child.name, size1));
    ({name: walked.last} = child);
    walk(child, {depth: depth + 1, seen});
  }
  return [walked, [...seen], typeof first1, (function g(n) { return n ? n * g(n - 1) : 1 })(depth + 4)];
}""",
        "var first1;\nTEXT\nCALL",
        "console.log(JSON.stringify(NAME({name: 'a', children: [{name: 'b', children: [{name: 'c'}]}, {name: 'd', size: 3}]})))",
        "node {file}",
    ),
    "c": (
        """static long mix(struct item *item, int n, long (*step)(long, int), long acc[2]) {
  enum { ONE = 1 };
  struct { long n; } s = {.n = n}, *p = &s;
  { int limit = 3; for (int i = 0, n = limit; i < n; i++) { if (i == 2) goto done; acc[i % 2] += step(item->n, i); } }
done:
  if (n > limit) return p->n + mix(item, n - ONE, step, acc);
  return p->n + acc[0] * sizeof(*item) + item->step;
}""",
        "#include <stdio.h>\nstatic int limit = 1;\nstruct item { long n; int step; };\nstatic long add(long a, int b) { return a * 3 + b; }\n"
        'TEXT\nint main(void) { struct item i = {5, 7}; CALL }',
        '{ long acc[2] = {1, 2}; printf("%ld %ld\\n", NAME(&i, 4, add, acc), acc[1]); }',
        "cc -w -o {file}.out {file} && {file}.out",
    ),
    "cpp": (
        """template <typename T, int N> T total(const std::map<T, T>& values, T start = N) {
  std::vector<T> found(start), more{start};
  for (const auto& [key, value] : values) { found.push_back(key * value); more.insert(more.end(), found.begin(), found.end()); }
  auto add = [&found, start, scale = T(N)](T a) mutable { start += a; return scale * (found.size() + start); };
  struct Sum { T start; T get() { return start; } } sum{.start = add(1)};
  try { throw std::out_of_range("start"); } catch (const std::exception& start) { sum.start += start.what()[0]; }
  return sum.get() + add(2) + more.size();
}""",
        "#include <cstdio>\n#include <map>\n#include <stdexcept>\n#include <vector>\nTEXT\n"
        'int main() { std::map<int, int> m{{1, 2}, {3, 4}}; CALL }',
        'std::printf("%d\\n", NAME<int, 5>(m));',
        "c++ -std=c++20 -w -o {file}.out {file} && {file}.out",
    ),
    "java": (
        """static <T extends Comparable<T>> String best(final java.util.List<T> items, int count, String... names) {
  T best = null; int size = items.size(); count = count();
  outer: for (T item : items) { for (String name : names) { if (name.equals(item)) continue outer; } if (best == null || item.compareTo(best) > 0) best = item; }
  class Box<U> { T count; Box(T count) { this.count = count; } T get() { return count; } }
  java.util.function.BiFunction<Integer, Integer, Integer> add = (a, b) -> a + b + size;
  try { Object o = best; if (o instanceof String s && s.length() > 1) throw new RuntimeException(s); } catch (RuntimeException e) { return e.getMessage() + size; }
  return count > 0 ? new Box<Object>(best).get() + "best" + add.apply(count, size) + Main.count : best(items, count, "a");
}""",
        "public class Main { static int count = 3; static int count() { return count; }\nTEXT\n"
        'public static void main(String[] a) { CALL } }',
        'System.out.println(NAME(java.util.List.of("a", "c", "b"), 0, "c") + NAME(java.util.List.of("aa", "b", "cc"), 1));',
        "java {file}",
    ),
    "go": (
        """func total[T int | int64](values map[string]T, keys ...string) (sum T, err error) {
	limit := limit
	for i, key := range keys {
		if value, ok := values[key]; ok { sum += value * T(i+1) } else { err = fmt.Errorf("key %s", key) }
	}
	add := func(sum T) T { return sum + T(limit) }
	switch any(sum).(type) { case int: sum = add(sum) }
	return sum, err
}""",
        'package main\nimport "fmt"\nvar limit = 7\nTEXT\nfunc main() {\nCALL\n}',
        'fmt.Println(NAME(map[string]int{"a": 1, "b": 2}, "a", "b", "z"))',
        "go run {file}",
    ),
    "rust": (
        """fn total<T: Copy + Into<i64>, const N: usize>(items: &[T; N], Point { x, y: far }: Point, limit: i64) -> Result<i64, String> {
    let scale = scale(x);
    let mut sum = 0;
    'rows: for (i, &item) in items.iter().enumerate() { if i as i64 > limit { break 'rows; } let item: i64 = item.into(); sum += item * scale; }
    let point = Point { x, y: far };
    let add = |x: i64| x + sum + point.y;
    let kind = match Some(sum) { Some(low) if low < LIMIT => low, Some(n @ 9..=99) => n + N as i64, Some(LIMIT) | None => 0, Some(high) => high };
    if let Some(first) = items.first() { Ok(add((*first).into()) + kind) } else { Err(format!("{limit} {} {scale:?}", far)) }
}""",
        "const LIMIT: i64 = 8;\nstruct Point { x: i64, y: i64 }\nfn scale(x: i64) -> i64 { x * 2 }\nTEXT\n"
        "fn main() { CALL }",
        'println!("{:?} {:?}", NAME(&[1, 2, 3], Point { x: 2, y: 5 }, 1), NAME::<i32, 0>(&[], Point { x: 2, y: 5 }, 1));',
        "rustc -A warnings -o {file}.out {file} && {file}.out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", PROGRAMS)
def test_a_renamed_program_prints_the_same(language: str, tmp_path: Path) -> None:
    text, frame, call, command = PROGRAMS[language]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    after = renamed(text, language, 1)
    assert after is not None
    assert len(set(re.findall(r"\b[a-z]\d+\b", after))) > 7
    names = [functions_of(source, language)[0].name for source in (text, after)]
    calls = "\n".join(call.replace("NAME", name) for name in names)
    file = tmp_path / f"main{LANGUAGES[language].endings[0]}"
    file.write_text(frame.replace("TEXT", f"{text}\n{after}").replace("CALL", calls))
    run = subprocess.run(command.format(file=file), shell=True, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, renamed_one = run.stdout.splitlines()
    assert before == renamed_one != ""


@pytest.mark.parametrize(
    "text",
    [
        "def f(x): return locals()",
        "def f(x): return eval('x')",
        "def f(x):\n    exec(x)",
        "def f(x): return sys._getframe().f_locals[x]",
        "def f(x): exec x",
        "def f(x):\n    from a import *",
        "def f(x): return [vars() for y in x]",
        "def f(): return g(1)[0].f",
        "def f(self): return self.f()",
        "def f(x: return",
        "",
        "\0\ufffd",
    ],
)
def test_none_where_names_may_be_read_as_text_or_nothing_can_be_renamed(text: str) -> None:
    assert renamed(text, "python", 1) is None


def test_with_and_eval_are_unsafe_in_javascript() -> None:
    assert renamed("function f(x) { with (x) { return y } }", "javascript", 1) is None
    assert renamed("function f(x) { return eval('x') }", "javascript", 1) is None
    assert renamed("function f(x) { return x.eval(1) }", "javascript", 1) is not None


def test_a_long_function_takes_time_in_proportion() -> None:
    seconds = []
    for lines in (4_000, 40_000):
        text = "def f(x):\n" + "".join(f"    y{i % 999} = x + y{i % 7}.z\n" for i in range(lines))
        started = time.process_time()
        after = renamed(text, "python", 1)
        seconds.append(time.process_time() - started)
        assert after is not None and after.count("\n") == lines + 1
    assert seconds[1] < 30 * seconds[0]  # ten times as long, with room for a busy machine


def test_thousands_of_names_are_all_different() -> None:
    text = "def f():\n" + "".join(f"    long_name_{i} = 1\n" for i in range(5000))
    after = renamed(text, "python", 1)
    assert after is not None
    assert len(set(re.findall(r"\b[a-z]\d+\b", after))) == 5001
