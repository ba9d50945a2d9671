"""Probes: the same seed gives the same files, no constant preference beats chance, tests are apart from training, and every
answer is that of an independent solver."""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megacode.cli.main import main
from megacode.corpus.inspect import open_dataset, read_tokens
from megacode.evaluate.checking import check_answers
from megacode.evaluate.probes import MAKERS, Written, cogs, make_probe, words
from megacode.evaluate.probes.probe import is_held_out
from megacode.evaluate.tasks import GenerationItem, OpenTask, RankingItem, open_task, open_tasks
from megacode.recipe.schema import TokenizerSection
from megacode.tokenizer.tokenizer import load_tokenizer
from megacode.tokenizer.training import train_tokenizer

ITEMS = 120
TUNED = ("cogs", "passivization", "boxes", "arithmetic", "functions")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Written]]]:
    folder = tmp_path_factory.mktemp("tasks")
    return folder, {name: make_probe(name, 1, folder, ITEMS) for name in MAKERS}


@pytest.fixture(scope="module")
def tasks(made: tuple[Path, dict[str, list[Written]]]) -> dict[str, OpenTask]:
    return {one.task.name: one for one in open_tasks([made[0]])}


def records(made: tuple[Path, object], name: str, part: str = "train") -> list[tuple[str, str]]:
    lines = (made[0] / f"{name}.{part}.jsonl").read_text().splitlines()
    return [(record["prompt"], record["completion"]) for record in map(json.loads, lines)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_gives_the_same_files(
    name: str, made: tuple[Path, dict[str, list[Written]]], tmp_path: Path
) -> None:
    written = make_probe(name, 1, tmp_path, ITEMS)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {file: (made[0] / file).read_bytes() for file in files}
    assert all(data.isascii() and "\\u" not in data.decode() for data in files.values())
    assert {f"{one.task.name}{ending}" for one in written for ending in (".yaml", ".jsonl")} <= set(
        files
    )
    assert (f"{name}.train.jsonl" in files) == (name in TUNED) == (f"{name}.dev.jsonl" in files)
    for one in written:
        prompts = [item.prompt for item in open_task(one.path).items]
        assert sum(one.groups.values()) == len(prompts)
        assert len(prompts) >= ITEMS or name in ("arithmetic", "functions")
        assert len(set(prompts)) >= 0.95 * len(prompts)
    for one in make_probe(name, 2, tmp_path, ITEMS):
        other = {item.prompt for item in open_task(one.path).items}
        first = {item.prompt for item in open_task(made[0] / one.path.name).items}
        assert (
            len(other & first) <= len(first) / (1 if name == "functions" else 2) and other != first
        )


def rankings(tasks: dict[str, OpenTask]) -> Iterator[tuple[str, list[RankingItem]]]:
    for name, one in tasks.items():
        if one.task.ranking:
            yield name, [item for item in one.items if isinstance(item, RankingItem)]


def accuracy(items: list[RankingItem], choose: Callable[[RankingItem], int]) -> Fraction:
    return Fraction(sum(choose(item) == item.answer for item in items), len(items))


def test_a_constant_preference_scores_exactly_chance(tasks: dict[str, OpenTask]) -> None:
    names = []
    for name, items in rankings(tasks):
        names.append(name)
        chance = Fraction(1, len(items[0].choices))
        texts = sorted({choice for item in items for choice in item.choices})
        groups = [
            [item for item in items if item.group == group]
            for group in {item.group for item in items}
        ]
        for part in (items, *groups):
            for number in range(len(items[0].choices)):
                assert accuracy(part, lambda item, number=number: number) == chance, name  # type: ignore[misc]
            orders = [[text, *(other for other in texts if other != text)] for text in texts[:100]]
            orders += [random.Random(seed).sample(texts, len(texts)) for seed in range(20)]
            orders += [sorted(texts, key=len), sorted(texts, key=len, reverse=True)]
            for order in orders:
                rank = {text: place for place, text in enumerate(order)}

                def prefer(item: RankingItem, rank: dict[str, int] = rank) -> int:
                    return min(range(len(item.choices)), key=lambda i: rank[item.choices[i]])

                assert accuracy(part, prefer) == chance, (name, order[0])
    assert sorted(names) == [
        "agreement",
        "arithmetic-ranked",
        "brackets",
        "brackets-outer",
        "copying",
        "quotes",
    ]


# -------------------------------------------------------------------------------------------------------------- solvers


def closer(text: str) -> str:
    """Of the innermost bracket that is open."""
    open_ones = []
    for character in text:
        if character in "([{":
            open_ones.append(")]}"["([{".index(character)])
        elif character in ")]}":
            assert open_ones.pop() == character
    return open_ones[-1]


def open_quote(text: str) -> str:
    quote = ""
    for character in text:
        if character in "\"'":
            quote = character if not quote else "" if quote == character else quote
    return quote


def introduced(text: str) -> str:
    (word,) = set(re.findall(r"\b(?:[bdfgklmnprstvz][aeiou]){3}\b", text))
    return word


def verb(text: str) -> str:
    return " are" if text.split()[1].endswith("s") and text.split()[1] != "glass" else " is"


SOLVERS: dict[str, Callable[[str], str]] = {
    "brackets": closer,
    "brackets-outer": closer,
    "quotes": open_quote,
    "copying": introduced,
    "agreement": verb,
    "arithmetic-ranked": lambda text: str(eval(text.removesuffix("="))),
}


def test_ranked_answers_are_right(tasks: dict[str, OpenTask]) -> None:
    for name, items in rankings(tasks):
        for item in items:
            assert item.choices[item.answer].strip() == SOLVERS[name](item.prompt).strip(), item
            assert len(set(item.choices)) == len(item.choices)


def test_the_outer_closer_needs_more_than_the_last_opener(tasks: dict[str, OpenTask]) -> None:
    for item in tasks["brackets"].items:
        opened = re.findall(r"[(\[{]", item.prompt)
        assert item.group == f"depth {len(opened)}" and not re.search(r"[)\]}]", item.prompt)
    misled = 0
    for item in tasks["brackets-outer"].items:
        opened = re.findall(r"[(\[{]", item.prompt)
        assert (
            item.group == f"depth {len(opened)}"
            and len(re.findall(r"[)\]}]", item.prompt)) == len(opened) - 1
        )
        misled += opened[-1] != opened[0]
    assert misled > len(tasks["brackets-outer"].items) / 2


def written(tasks: dict[str, OpenTask], name: str) -> list[GenerationItem]:
    return [item for item in tasks[name].items if isinstance(item, GenerationItem)]


def test_sums_are_right_and_apart_from_training(
    tasks: dict[str, OpenTask], made: tuple[Path, Any]
) -> None:
    def numbers(prompt: str) -> frozenset[str]:
        return frozenset(re.findall(r"\d+", prompt))

    for item in written(tasks, "arithmetic"):
        assert item.answer == str(eval(item.prompt.removesuffix("=")))
        assert all(len(number) == int(item.group[0]) for number in numbers(item.prompt))
    tests = {
        numbers(item.prompt)
        for name in ("arithmetic", "arithmetic-ranked")
        for item in tasks[name].items
    }
    for part in ("train", "dev"):
        assert all(
            answer == f" {eval(prompt.removesuffix('='))}"
            for prompt, answer in records(made, "arithmetic", part)
        )
        assert not tests & {numbers(prompt) for prompt, _ in records(made, "arithmetic", part)}
    assert len(set(records(made, "arithmetic"))) == len(records(made, "arithmetic")) > 3000


def box_state(
    prompt: str,
) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, int], str]:
    """First state, last state, operations by box, and the box that is asked for."""
    boxes: dict[str, list[str]] = {}
    touched: dict[str, int] = defaultdict(int)
    first: dict[str, list[str]] = {}
    *sentences, question = re.split(r"\. ", prompt)
    for sentence in sentences:
        if stated := re.fullmatch(r"Box (\d) has (.+)", sentence):
            boxes[stated[1]] = (
                [] if stated[2] == "nothing" else stated[2].removeprefix("the ").split(" and the ")
            )
            first = {box: list(objects) for box, objects in boxes.items()}
        elif moved := re.fullmatch(r"Move the (\w+) from Box (\d) to Box (\d)", sentence):
            boxes[moved[2]].remove(moved[1])
            boxes[moved[3]].append(moved[1])
            touched[moved[2]] += 1
            touched[moved[3]] += 1
        elif removed := re.fullmatch(r"Remove the (\w+) from Box (\d)", sentence):
            boxes[removed[2]].remove(removed[1])
            touched[removed[2]] += 1
        else:
            put = re.fullmatch(r"Put the (\w+) into Box (\d)", sentence)
            assert put, sentence
            boxes[put[2]].append(put[1])
            touched[put[2]] += 1
    asked = re.fullmatch(r"Box (\d) has", question)
    assert asked
    return first, boxes, touched, asked[1]


def said(objects: list[str]) -> str:
    return " and ".join(f"the {one}" for one in objects) or "nothing"


def test_boxes_hold_what_a_simulation_says(
    tasks: dict[str, OpenTask], made: tuple[Path, dict[str, list[Written]]]
) -> None:
    copied: dict[str, list[bool]] = defaultdict(list)
    nouns: dict[str, set[str]] = defaultdict(set)
    for name in ("boxes", "boxes-untouched"):
        for item in written(tasks, name):
            first, last, touched, asked = box_state(item.prompt)
            assert item.answer == said(last[asked]) and item.group == f"operations {touched[asked]}"
            assert (touched[asked] == 0) == (name == "boxes-untouched") and 1 <= sum(
                touched.values()
            ) <= 8
            copied[name].append(first[asked] == last[asked])
            nouns["test"] |= set(re.findall(r"the (\w+)", item.prompt))
    for part in ("train", "dev"):
        for prompt, answer in records(made, "boxes", part):
            _, last, _, asked = box_state(prompt)
            assert answer == f" {said(last[asked])}."
            nouns["train"] |= set(re.findall(r"the (\w+)", prompt))
    assert len(nouns["train"]) == len(nouns["test"]) == 12 and not nouns["train"] & nouns["test"]
    assert not set(records(made, "boxes")) & set(records(made, "boxes", "dev"))
    for one in made[1]["boxes"]:
        told = one.task.baselines["copy of the first state"]
        assert told == sum(copied[one.task.name]) / len(copied[one.task.name])
        assert 0 < one.task.baselines["random (every object in with 1/3)"] < 0.5
        assert len(one.groups) == (4 if one.task.name == "boxes" else 1)


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    r"add (\d+)": lambda x, k: x + k,
    r"subtract (\d+)": lambda x, k: x - k,
    r"multiply by (\d+)": lambda x, k: x * k,
    r"divide by (\d+) and round down": lambda x, k: x // k,
    r"take the remainder by (\d+)": lambda x, k: x % k,
    r"raise it to at least (\d+)": max,
    r"limit it to at most (\d+)": min,
    r"negate": lambda x, _: -x,
    r"square": lambda x, _: x**2,
    r"cube": lambda x, _: x**3,
    r"take the absolute value": lambda x, _: abs(x),
    r"count the decimal digits": lambda x, _: len(str(abs(x))),
}


def value_of(steps: list[str], x: int) -> int:
    for step in steps:
        (found,) = [
            (m, f) for pattern, f in OPERATIONS.items() if (m := re.fullmatch(pattern, step))
        ]
        x = found[1](x, int(found[0][1]) if found[0].groups() else 0)
    return x


def function_of(prompt: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r'def (\w+)\(x\):\n    """Take x, (.+)\."""\n    return', prompt)
    assert match
    return match[1], match[2].split(", then ")


def test_functions_do_what_their_docstrings_say(
    tasks: dict[str, OpenTask], made: tuple[Path, Any]
) -> None:
    items = written(tasks, "functions")
    for item in items:
        name, steps = function_of(item.prompt)
        asserted = re.findall(rf"assert {name}\((-?\d+)\) == (-?\d+)\n", item.tests)
        assert len(asserted) == item.tests.count("\n") == 8 and {"0", "-1"} <= {
            x for x, _ in asserted
        }
        assert all(value_of(steps, int(x)) == int(value) for x, value in asserted)
        assert item.answer.startswith(" ") and ast.parse(item.answer.strip(), mode="eval")
    for prompt, completion in records(made, "functions")[:1000]:
        name, steps = function_of(prompt)
        scope: dict[str, Any] = {}
        exec(prompt + completion, scope)
        assert all(scope[name](x) == value_of(steps, x) for x in (-17, 0, 3, 50))


def test_functions_of_tests_are_not_in_training(
    tasks: dict[str, OpenTask], made: tuple[Path, Any]
) -> None:
    def pair(steps: list[str]) -> tuple[str, ...]:
        return tuple(re.sub(r"\d+", "k", step) for step in steps)

    train = [
        function_of(prompt)
        for part in ("train", "dev")
        for prompt, _ in records(made, "functions", part)
    ]
    names, bodies = {name for name, _ in train}, {tuple(steps) for _, steps in train}
    pairs = {pair(steps) for _, steps in train}
    for item in written(tasks, "functions"):
        name, steps = function_of(item.prompt)
        assert name not in names and tuple(steps) not in bodies
        assert (pair(steps) in pairs) == (item.group != "two operations, new pair"), item
    assert len({pair(steps) for _, steps in train if len(steps) == 1}) == 12


def test_right_functions_pass_in_the_sandbox_and_others_do_not(tasks: dict[str, OpenTask]) -> None:
    items = written(tasks, "functions")[::12]
    task = tasks["functions"].task.model_copy()
    assert task.generation
    slow = task.model_copy(
        update={"generation": task.generation.model_copy(update={"seconds": 60.0})}
    )
    texts = [[item.answer + "\ndef other(): return 1", " x", " exit()"] for item in items]
    assert check_answers(slow, items, texts) == [[True, False, False]] * len(items)


def test_forms_by_hand() -> None:
    name = cogs.Phrase("Emma", "Emma")
    cat, dog, bed = cogs.noun("the", "cat"), cogs.noun("a", "dog"), cogs.noun("the", "bed")
    see, give = ("see", "saw", "seen"), ("give", "gave")
    on_bed = cogs.attached(dog, "on", cogs.attached(bed, "in", cogs.noun("a", "house")))
    seen = cogs.active(see, cat, on_bed)
    assert seen == (
        "the cat saw a dog on the bed in a house",
        "see ( agent = * cat , theme = dog ( nmod . on = * bed ( nmod . in = house ) ) )",
    )
    assert cogs.passive(see, cat, name) == (
        "the cat was seen by Emma",
        "see ( agent = Emma , theme = * cat )",
    )
    assert cogs.passive(see, cat, None) == ("the cat was seen", "see ( theme = * cat )")
    assert cogs.unaccusative(("roll", "rolled"), dog) == ("a dog rolled", "roll ( theme = dog )")
    form = "give ( agent = Emma , theme = * cat , recipient = dog )"
    assert cogs.dative(give, name, cat, dog, False) == ("Emma gave the cat to a dog", form)
    assert cogs.dative(give, name, cat, dog, True) == ("Emma gave a dog the cat", form)
    assert cogs.clausal(("say", "said"), name, cogs.passive(see, dog, None)) == (
        "Emma said that a dog was seen", "say ( agent = Emma , ccomp = see ( theme = dog ) )",
    )  # fmt: skip


def parsed(sentence: str) -> str:
    """The form of a sentence by a parser of its own."""
    verbs = {past: (base, kind) for kind, table in (("transitive", words.TRANSITIVE), ("dative", words.DATIVE),
             ("unaccusative", words.UNACCUSATIVE), ("clausal", words.CLAUSAL)) for base, past, *_ in table}  # fmt: skip
    participles = {participle: base for base, _, participle in words.TRANSITIVE}
    tokens = sentence.split()

    def phrase() -> str:
        first = tokens.pop(0)
        form = {"a": "", "the": "* "}[first] + tokens.pop(0) if first in ("a", "the") else first
        if tokens and tokens[0] in words.PREPOSITIONS:
            preposition = tokens.pop(0)
            form += f" ( nmod . {preposition} = {phrase()} )"
        return form

    def clause() -> str:
        subject = phrase()
        if not tokens:
            return subject
        past = tokens.pop(0)
        if past == "was":
            base = participles[tokens.pop(0)]
            if not tokens:
                return f"{base} ( theme = {subject} )"
            assert tokens.pop(0) == "by"
            return f"{base} ( agent = {phrase()} , theme = {subject} )"
        base, kind = verbs[past]
        if kind == "unaccusative":
            return f"{base} ( theme = {subject} )"
        if kind == "clausal":
            assert tokens.pop(0) == "that"
            return f"{base} ( agent = {subject} , ccomp = {clause()} )"
        theme = phrase()
        if kind == "transitive":
            return f"{base} ( agent = {subject} , theme = {theme} )"
        if tokens[0] == "to":
            tokens.pop(0)
            recipient = phrase()
        else:
            recipient, theme = theme, phrase()
        return f"{base} ( agent = {subject} , theme = {theme} , recipient = {recipient} )"

    form = clause()
    assert not tokens, sentence
    return form


def sentence_of(prompt: str) -> str:
    match = re.fullmatch(r"sentence: (.+) \.\n(form|passive|same):", prompt)
    assert match
    return match[1]


def depths(form: str) -> tuple[int, int]:
    """Nested PPs and CPs."""
    return form.count("nmod ."), form.count("ccomp")


def test_forms_and_cases_of_cogs(tasks: dict[str, OpenTask], made: tuple[Path, Any]) -> None:
    train = [(sentence_of(prompt), form.strip()) for prompt, form in records(made, "cogs")]
    assert len(train) == 8000 and all(parsed(text) == form for text, form in train)
    assert (
        max(depths(form)[0] for _, form in train) == max(depths(form)[1] for _, form in train) == 2
    )
    assert not any(
        re.match(r"(a|the) \w+ (beside|in|on) ", text.rpartition(" that ")[2]) for text, _ in train
    )
    places: dict[str, set[str]] = defaultdict(set)
    verbs: dict[str, set[str]] = defaultdict(set)
    for text, form in train:
        subject = text.split(" that ")[-1]
        is_passive = " was " in subject
        for role, word in re.findall(r"(agent|theme|recipient) = (?:\* )?(\w+)", form):
            places[word].add("passive subject" if is_passive and role == "theme" else role)
        if form.isalpha():
            places[form].add("alone")
        for base in re.findall(r"(\w+) \( (?:agent|theme)", form.rpartition("ccomp = ")[2]):
            verbs[base].add("passive" if is_passive else "active")
    seen = {text for text, _ in train}
    groups: dict[str, int] = defaultdict(int)
    for name in ("cogs-test", "cogs-lexical", "cogs-structural"):
        for item in written(tasks, name):
            text = sentence_of(item.prompt)
            assert item.answer == parsed(text) and text not in seen
            groups[item.group] += 1
            agent, theme = (
                re.findall(rf"{role} = (?:\* )?(\w+)", item.answer) for role in ("agent", "theme")
            )
            base = item.answer.split()[0]
            is_passive = " was " in text
            assert {
                "": True,
                "subject to object": bool(theme) and places[theme[-1]] == {"agent"},
                "object to subject": bool(agent) and places[agent[0]] == {"theme"},
                "name alone to subject": bool(agent) and places[agent[0]] == {"alone"},
                "active to passive": verbs[base] == {"active"} and is_passive,
                "passive to active": verbs[base] == {"passive"} and not is_passive,
                "PP recursion": 3 <= depths(item.answer)[0] <= 5,
                "CP recursion": 3 <= depths(item.answer)[1] <= 5,
                "PP on subject": bool(re.match(r"\w+ \( agent = (\* )?\w+ \( nmod", item.answer)),
            }[item.group], item
    assert len(groups) == 9
    dev = {sentence_of(prompt) for prompt, _ in records(made, "cogs", "dev")}
    assert not dev & seen and not dev & {
        sentence_of(item.prompt) for item in tasks["cogs-test"].items
    }


def test_passives_are_right_and_of_unseen_nouns(
    tasks: dict[str, OpenTask], made: tuple[Path, Any]
) -> None:
    participles = {past: participle for _, past, participle in words.TRANSITIVE}
    noun = r"(?:a|the) (\w+)((?: (?:beside|in|on) the \w+)?)"

    def parts(prompt: str) -> re.Match[str]:
        match = re.fullmatch(rf"({noun}) (\w+) ({noun})", sentence_of(prompt))
        assert match
        return match

    def passive(prompt: str) -> str:
        match = parts(prompt)
        return f"{match[5]} was {participles[match[4]]} by {match[1]} ."

    nouns = set()
    kinds = set()
    for part in ("train", "dev"):
        for prompt, answer in records(made, "passivization", part):
            match, is_passive = parts(prompt), prompt.endswith("passive:")
            nouns |= {match[2], match[6]}
            kinds.add((is_passive, bool(match[3]), bool(match[7])))
            assert answer == f" {passive(prompt) if is_passive else f'{sentence_of(prompt)} .'}"
    assert kinds == set(itertools.product((True, False), (True, False), (True, False))) - {
        (True, True, False), (True, True, True), (False, True, True),
    }  # fmt: skip
    for name in ("passivization", "passivization-subject-pp"):
        for item in written(tasks, name):
            match = parts(item.prompt)
            assert item.answer == passive(item.prompt) and item.prompt.endswith("passive:")
            assert item.group == (
                "PP on subject" if match[3] else "PP on object" if match[7] else "no PP"
            )
            assert (name == "passivization") == (not match[3])
            assert not {match[2], match[6]} & nouns


# ------------------------------------------------------------------------------------------------------------- as files


@pytest.mark.parametrize("name", TUNED)
def test_a_training_record_begins_with_a_prompt_of_the_task(
    name: str,
    tasks: dict[str, OpenTask],
    made: tuple[Path, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`preprocess --conversations --template plain` gives prompt + completion + end, and the prompt's own tokens begin it."""
    pairs = records(made, name, "dev")
    corpus = [Path(__file__).read_text("utf-8"), *(prompt + answer for prompt, answer in pairs)]
    train_tokenizer(corpus, tmp_path / "t.model", 500)
    source, model = str(made[0] / f"{name}.dev.jsonl"), str(tmp_path / "t.model")
    assert (
        main(
            [
                "preprocess",
                source,
                "--conversations",
                "--template",
                "plain",
                "--tokenizer",
                model,
                "--output",
                str(tmp_path / "d"),
            ]
        )
        == 0
    )
    tokenizer = load_tokenizer(TokenizerSection(path=model))
    dataset = open_dataset(tmp_path / "d")
    assert dataset.documents == len(pairs)
    for number, (prompt, answer) in enumerate(pairs[:50]):
        ids = list(read_tokens(*dataset.span(number)))
        assert ids[-1] == tokenizer.eod_id and tokenizer.decode(ids[:-1]) == prompt + answer
        begin = tokenizer.encode(prompt)
        assert ids[: len(begin)] == begin, "no token is across the border"
    ends = {prompt.split()[-1] for prompt, _ in pairs}
    assert all(
        item.prompt.split()[-1] in ends
        for one in made[1][name]
        for item in tasks[one.task.name].items
    )


def test_the_verb_tells_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tasks")
    assert (
        main(["tasks", "make", "brackets", "boxes", "--seed", "3", "--items", "31", "--out", out])
        == 0
    )
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    for line in ("brackets.yaml depth 1 9", "brackets-outer.yaml depth 2 12", "chance: accuracy 0.333", "boxes.yaml operations 1 8",
                 "copy of the first state: accuracy 1.000", "boxes.train.jsonl to tune on 4,000"):  # fmt: skip
        assert line in told, told
    assert main(["tasks", "list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in MAKERS)
    (tmp_path / "file").write_text("")
    assert main(["tasks", "make", "quotes", "--seed", "3", "--out", str(tmp_path / "file")]) == 2
    assert "is no folder; give another" in capsys.readouterr().err
    assert main(["tasks", "make", "quots", "--seed", "3", "--out", out]) == 2
    assert "invalid choice: 'quots'" in capsys.readouterr().err


def test_a_fifth_is_held_out() -> None:
    assert 0.18 < sum(is_held_out(str(i)) for i in range(10_000)) / 10_000 < 0.22
