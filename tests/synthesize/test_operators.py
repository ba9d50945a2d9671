"""Operators: every built-in one by scripted replies, a user's own, bad files, replies as read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megacode.errors import UserError
from megacode.synthesize.operator import (
    BUILT_IN,
    Operator,
    Outcome,
    Request,
    Text,
    candidate,
    open_operator,
)
from megacode.synthesize.reading import fenced, read_reply, read_tag, unfenced

HERE = Path()


def drive(
    operator: Operator, record: dict[str, Any], *replies: str | Text, sample: int = 0
) -> tuple[Outcome, list[Request]]:
    """What comes of scripted replies, all of which have to be asked for."""
    run, asked, left = candidate(operator, record, sample), [], list(replies)
    try:
        asked.append(next(run))
        while True:
            reply = left.pop(0)
            asked.append(run.send(reply if isinstance(reply, Text) else Text(reply)))
    except StopIteration as stop:
        assert not left, f"never asked for: {left}"
        return stop.value, asked


def reason(name: str, record: dict[str, Any], *replies: str | Text) -> str:
    outcome, _ = drive(open_operator(name, HERE), record, *replies)
    assert outcome.row is None
    return outcome.reason


# ------------------------------------------------------------------------------ built-in operators

SUM = {"problem": "What is 3 + 4?", "answer": "7", "solution": "Start at 3.\nAdd 4.\nAnswer: 7"}


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.yaml")))
def test_built_in_operators_open_and_say_that_their_prompts_are_ours(name: str) -> None:
    operator = open_operator(name, HERE)
    assert operator.roles[0] in ("teacher", "student")
    text = operator.rules.description
    assert "2501.14002" not in text or "megacode's own" in text


def test_diversification() -> None:
    operator = open_operator("diversification", HERE)
    outcome, asked = drive(operator, SUM, "Count on.\nAnswer: 7.0", "**Accept**\nAll right.")
    assert outcome.row == {
        "messages": [
            {"role": "user", "content": "What is 3 + 4?"},
            {"role": "assistant", "content": "Count on.\nAnswer: 7.0"},
        ],
        "answer": "7.0",
    }
    assert outcome.answer == "7.0" and outcome.reason == ""
    assert [(one.step, one.role) for one in asked] == [
        ("solving", "teacher"),
        ("review", "teacher"),
    ]
    assert "Start at 3." in asked[0].messages[0]["content"]
    assert "Count on." in asked[1].messages[0]["content"]
    other, again = drive(operator, SUM, "Count.\nAnswer: 7", "accept", sample=1)
    assert other.row and again[0].messages != asked[0].messages
    alone, asked = drive(operator, {"problem": "P?"}, "Answer: 7", "accept")
    assert alone.row and "known_solution" not in asked[0].messages[0]["content"]


def test_diversification_rejects() -> None:
    assert reason("diversification", SUM, "I do not know.") == "no final answer"
    assert reason("diversification", SUM, "Answer: 8") == "another answer"  # no review is paid for
    assert reason("diversification", SUM, "Answer: 7", "refuse: a gap") == "teacher refused"
    assert reason("diversification", SUM, "Answer: 7", "Looks good.") == "no tag"


NEW = "### Problem\nWhat is 5 + 6?\n### Solution\nAdd.\n### Answer\n11"


def test_expansion() -> None:
    operator = open_operator("expansion", HERE)
    outcome, asked = drive(operator, {"problem": "What is 3 + 4?"}, NEW, "5 and 6.\nAnswer: 11.0")
    assert outcome.row == {
        "messages": [
            {"role": "user", "content": "What is 5 + 6?"},
            {"role": "assistant", "content": "Add.\n\nAnswer: 11"},
        ],
        "answer": "11",
    }
    assert "Add." not in asked[1].messages[0]["content"], "the check must not see the solution"
    twice = NEW.replace("Add.", "Add.\nAnswer: 11")
    outcome, _ = drive(operator, {"problem": "P"}, twice, "Answer: 11")
    assert outcome.row and outcome.row["messages"][1]["content"] == "Add.\nAnswer: 11"


def test_expansion_rejects() -> None:
    old = {"problem": "What is 5 +  6?"}
    assert reason("expansion", old, NEW) == "copy of the problem"
    wrong = NEW.replace("Add.", "Add.\nAnswer: 12")
    assert reason("expansion", SUM, wrong) == "solution and answer differ"
    assert reason("expansion", SUM, NEW, "Hm.") == "self-check has no answer"
    assert reason("expansion", SUM, NEW, "Answer: 12") == "self-check has another answer"
    assert reason("expansion", SUM, NEW.replace("### Answer\n11", "")) == "no section answer"


BACK = "Start at 3.\nSo it is 7.\n[back]\nNothing is added yet.\nAdd 4.\nAnswer: 7"


def test_retrospection() -> None:
    outcome, asked = drive(open_operator("retrospection", HERE), SUM, BACK)
    assert outcome.row and outcome.row["messages"][1]["content"] == BACK
    assert outcome.answer == "7"
    assert "2. Add 4.\n3. Answer: 7" in asked[0].messages[0]["content"]


def test_retrospection_rejects() -> None:
    def why(reply: str, **fields: str) -> str:
        return reason("retrospection", {**SUM, **fields}, *([reply] if reply else []))

    assert why("", solution="Add.\nAnswer: 7") == "solution is too short"  # nothing is paid for
    assert why(BACK.replace("[back]", "Wait.")) == "no [back]"
    assert why(BACK + "\n[back]") == "several [back]"
    assert why("[back]\nAnswer: 7") == "nothing around [back]"
    assert why("Answer: 7\n[back]\nThat was too early.") == "no final answer after [back]"
    assert why(BACK.replace("Answer: 7", "Answer: 8")) == "another answer"
    unknown = {name: SUM[name] for name in ("problem", "solution")}
    assert reason("retrospection", unknown, BACK[:-1] + "8") == "another answer"


def test_tutorship_of_a_right_attempt() -> None:
    operator = open_operator("tutorship", HERE)
    assert operator.roles == ("student", "teacher")
    outcome, asked = drive(operator, SUM, "3 and 4 is 7.\nAnswer: 7", "Correct.\nEach step holds.")
    assert outcome.row and outcome.answer == "7"
    assert outcome.row["messages"][1]["content"] == (
        "Student's attempt:\n\n3 and 4 is 7.\nAnswer: 7\n\n"
        "Tutor's judgement: the attempt is correct.\n\nEach step holds.\n\nAnswer: 7"
    )
    assert asked[0].role == "student" and "Start at 3" not in asked[0].messages[0]["content"]


def test_tutorship_of_a_wrong_attempt() -> None:
    outcome, _ = drive(
        open_operator("tutorship", HERE),
        SUM,
        "<think>hm</think>3 and 4 is 8.\nAnswer: 8",
        "Verdict: wrong\n\n3 and 4 is 8: one too many.\n3 and 4 is 7.\nAnswer: 7",
    )
    assert outcome.row and outcome.row["answer"] == "7"
    assert outcome.row["messages"][1]["content"] == (
        "Student's attempt:\n\n3 and 4 is 8.\nAnswer: 8\n\n"
        "Tutor's judgement: the attempt is wrong.\n\n"
        "3 and 4 is 8: one too many.\n3 and 4 is 7.\nAnswer: 7"
    )


def test_tutorship_rejects() -> None:
    def why(*replies: str, known: bool = True) -> str:
        return reason("tutorship", SUM if known else {"problem": "What is 3 + 4?"}, *replies)

    assert why("Answer: 8", "correct") == "judged correct, is wrong"
    assert why("Seven.", "correct", known=False) == "correct, has no final answer"
    assert why("Answer: 8", "wrong") == "no correction"
    assert why("Answer: 8", "wrong\nAdd 4.") == "correction has no final answer"
    assert why("Answer: 8", "wrong\nAnswer: 9") == "another answer"
    assert why("Answer: 8", "Well.") == "no tag"


CODE = "def f(a):\n    b = a\n    return b"


def test_rewrite() -> None:
    operator = open_operator("rewrite", HERE)
    reply = "Here it is:\n```python\ndef f(a):\n    return a\n```\nShorter."
    outcome, asked = drive(operator, {"code": CODE, "language": "Python"}, reply, "Same\nYes.")
    assert outcome.row == {"text": "def f(a):\n    return a"}
    assert "this Python" in asked[0].messages[0]["content"]
    assert "Shorter" not in asked[1].messages[0]["content"]
    record = {"code": CODE}
    assert reason("rewrite", record, "```\n```") == "no code"
    assert reason("rewrite", record, f"```\n{CODE}\n```") == "unchanged"
    assert reason("rewrite", record, reply, "different") == "judged different"
    assert reason("rewrite", record, reply, "perhaps") == "no tag"


def test_instruct() -> None:
    operator = open_operator("instruct", HERE)
    task = "Write a function f that returns its only argument as it is."
    outcome, _ = drive(operator, {"code": CODE, "language": "Python"}, f"accept\n{task}")
    assert outcome.row == {
        "messages": [
            {"role": "user", "content": task},
            {"role": "assistant", "content": f"```python\n{CODE}\n```"},
        ]
    }
    assert reason("instruct", {"code": "```"}) == "code has a fence"
    assert reason("instruct", {"code": CODE}, "refuse") == "teacher refused"
    assert reason("instruct", {"code": CODE}, f"accept\n{task}\n```\nx\n```") == (
        "description has code"
    )
    assert reason("instruct", {"code": CODE}, "accept\nWrite f.") == "description is too short"
    assert reason("instruct", {"code": CODE}, task) == "no tag"


def test_replies_that_cannot_be_used() -> None:
    def outcome(reply: Text, attempt: Text | str = "Answer: 8") -> tuple[str, str]:
        found, _ = drive(open_operator("tutorship", HERE), SUM, attempt, reply)
        return found.reason, found.step

    assert outcome(Text("wrong\nAnswer: 7", "length")) == ("cut off (length)", "tutoring")
    assert outcome(Text("wrong\nAnswer: 7"), Text("and so on", "length")) == ("", "")
    assert outcome(Text("wrong", "content_filter")) == ("content filter", "tutoring")
    assert outcome(Text(" \n")) == ("empty reply", "tutoring")
    assert outcome(Text("<think>It goes on and on")) == ("empty reply", "tutoring")


def test_a_judge_with_a_prompt_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "judgement.jinja").write_text("Is this good for {{ problem | length }}?\n{row}")
    operator = open_operator("tutorship", HERE, tmp_path, judged=True)
    _, asked = drive(operator, SUM, "Answer: 7", "correct\nYes.", "accept")
    shown = asked[-1].messages[-1]["content"]
    assert shown.startswith("Is this good for 14?") and "the attempt is correct" in shown


def test_a_judge_reads_the_row_last() -> None:
    judged = open_operator("tutorship", HERE, judged=True)
    assert judged.roles == ("student", "teacher", "judge")
    wrong = "wrong\nIt is 7.\nAnswer: 7"
    found, asked = drive(judged, SUM, "Answer: 8", wrong, "accept\nFine.")
    assert found.row and found.row["answer"] == "7"
    shown = asked[-1].messages[-1]["content"]
    assert all(message["content"] in shown for message in found.row["messages"])
    assert drive(judged, SUM, "Answer: 8", wrong, "refuse\nNo.")[0].reason == "judge refused"
    assert drive(judged, SUM, "Answer: 8", wrong, "Well.")[0].reason == "no tag"
    found, asked = drive(judged, SUM, "Answer: 8", "wrong\nAnswer: 9")
    assert found.reason == "another answer" and len(asked) == 2, "what is rejected costs no judge"
    assert (
        open_operator("rewrite", HERE, judged=True).digest != open_operator("rewrite", HERE).digest
    )


# ------------------------------------------------------------------------------ a user's operators

OWN = """
needs: [question]
samples: 3
ask:
  - name: draft
    of: small
    system: Be brief.
    prompt: "{{ question }} ({{ sample }})"
    read: {sections: [main_idea, answer]}
  - name: polish
    of: large
    when: sample > 0
    prompt: Improve {{ draft.main_idea }}
reject:
  too long: question | length > 40
  polished away: sample > 0 and 'idea' not in polish.text
record:
  text: |
    {{ question }}
    {{ polish.text or draft.main_idea }}
  answer: "{{ draft.answer }}"
"""
DRAFT = "## Main idea\nAn idea.\n**Answer:** 3"


def own(folder: Path, text: str = OWN, prompts: Path | None = None) -> Operator:
    (folder / "own.yaml").write_text(text)
    return open_operator("own.yaml", folder, prompts)


def test_an_operator_of_ones_own(tmp_path: Path) -> None:
    operator = own(tmp_path)
    assert operator.roles == ("small", "large") and operator.rules.samples == 3
    outcome, asked = drive(operator, {"question": "Why?"}, DRAFT)
    assert outcome.row == {"text": "Why?\nAn idea.", "answer": "3"}
    assert asked[0].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why? (0)"},
    )
    outcome, asked = drive(operator, {"question": "Why?"}, DRAFT, "A better idea.", sample=2)
    assert outcome.row and outcome.row["text"] == "Why?\nA better idea."
    assert asked[1] == Request(
        "polish", "large", ({"role": "user", "content": "Improve An idea."},)
    )
    assert drive(operator, {"question": "y" * 41})[0].reason == "too long"
    assert drive(operator, {"question": "Why?"}, DRAFT, "x", sample=1)[0].reason == "polished away"
    assert drive(operator, {"question": "Why?"}, "Answer: 3")[0].reason == "no section main_idea"


def test_records_are_data_and_what_they_lack_is_told(tmp_path: Path) -> None:
    operator = own(tmp_path)
    assert [operator.missing(one) for one in ({}, {"question": None}, {"question": " "})] == (
        ["question"] * 3
    )
    assert operator.missing({"question": "Why?"}) == ""
    record = {"question": "{{ 1 + 1 }}", "steps": "taken", "draft": "taken", "sample": 9}
    outcome, asked = drive(operator, record, DRAFT)
    assert asked[0].messages[1]["content"] == "{{ 1 + 1 }} (0)"
    assert outcome.row and outcome.row["text"].startswith("{{ 1 + 1 }}")


def test_a_field_does_not_hide_a_function() -> None:
    record = {**SUM, "steps": ["taken"], "final_answer": "taken"}
    assert drive(open_operator("retrospection", HERE), record, BACK)[0].row


def test_a_guarded_name_is_an_error_where_it_is_not_guarded(tmp_path: Path) -> None:
    guarded = OWN.replace("Be brief.", "'{{ hint }}{% if hint is defined %}!{% endif %}'")
    operator = own(tmp_path, guarded)
    assert drive(operator, {"question": "Why?", "hint": "So"}, DRAFT)[1][0].messages[0] == (
        {"role": "system", "content": "So!"}
    )
    with pytest.raises(UserError, match=r"own.yaml:7: ask.0.system: fails: 'hint' is undefined"):
        drive(operator, {"question": "Why?"}, DRAFT)


def test_a_null_field_is_as_good_as_none() -> None:
    outcome, _ = drive(
        open_operator("diversification", HERE), {**SUM, "answer": None}, "Answer: 9", "accept"
    )
    assert outcome.row


def test_the_digest_is_of_prompts_and_rules(tmp_path: Path) -> None:
    first = own(tmp_path)
    assert own(tmp_path, "description: told\n" + OWN).digest == first.digest
    other = own(tmp_path, OWN.replace("Improve", "Better"))
    assert other.digest != first.digest
    assert other.prompt_digests["draft"] == first.prompt_digests["draft"]
    assert other.prompt_digests["polish"] != first.prompt_digests["polish"]
    assert own(tmp_path, OWN.replace("> 40", "> 41")).digest != first.digest


def test_prompts_of_a_folder(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    with pytest.raises(UserError, match=r"prompts: has no prompts; put draft.jinja or polish"):
        own(tmp_path, prompts=prompts)
    (prompts / "polish.jinja").write_text("Shorten {{ draft.main_idea }}\n")
    operator = own(tmp_path, prompts=prompts)
    _, asked = drive(operator, {"question": "Why?"}, DRAFT, "idea", sample=1)
    assert asked[1].messages[0]["content"] == "Shorten An idea."
    assert operator.digest != own(tmp_path).digest
    (prompts / "polish.jinja").write_text("Shorten {{ drafts }}")
    with pytest.raises(UserError, match=r"polish.jinja: nothing is named drafts; .*`draft`"):
        own(tmp_path, prompts=prompts)
    (prompts / "polish.jinja").rename(prompts / "polsh.jinja")
    with pytest.raises(UserError, match=r"polsh.jinja: .*no such step; it takes draft.jinja, po"):
        own(tmp_path, prompts=prompts)
    with pytest.raises(UserError, match="no such folder of prompts"):
        own(tmp_path, prompts=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{{ question }} (", "{{ qestion }} (", r"own.yaml:8: ask.0.prompt: nothing is named qestion; .*`question`"),
        ("{{ draft.main_idea }}\n", "{{ draft.idea }}\n", r":13: ask.1.prompt: draft.idea is nothing .* draft.main_idea, draft.answer"),
        ("{{ draft.main_idea }}\n", "{{ draft.tag }}\n", "draft.tag is nothing that the step"),
        ("{{ draft.main_idea }}\n", "{{ draft }}\n", "draft is a step; write draft.text"),
        ("Be brief.", "'{{ polish.text }}'", ":7: ask.0.system: uses polish, a step that comes later"),
        ("Be brief.", "'{{ question'", r":7: ask.0.system: is no Jinja template, in its line 1,"),
        ("Be brief.", "'{{ question | shout }}'", "No filter named 'shout'"),
        ("Be brief.", "'{{ strftime_now(question) }}'", "nothing is named strftime_now"),
        ("Be brief.", "'{{ question | random }}'", "No filter named 'random'"),
        ("sample > 0\n", "sample >\n", r":12: ask.1.when: is no Jinja expression"),
        ("question | length > 40", "question | length > 40 }}{{ 1", r":15: reject.too long: is no Jinja"),
        ("question | length > 40", "length > 40", "reject.too long: nothing is named length"),
        ("{{ draft.answer }}", "{{ daft.answer }}", r":21: record.answer: nothing is named daft"),
        ("name: polish", "name: draft", "two things are named draft"),
        ("name: polish", "name: question", "two things are named question"),
        ("name: polish", "name: steps", "'steps' means something else"),
        ("name: polish", "name: Polish it", "expected a name"),
        ("[question]", "[question, sample]", "`needs` has sample"),
        ("[main_idea, answer]", "[text]", "'text' cannot be a section's name"),
        ("[main_idea, answer]", "[Main idea]", "'Main idea' cannot be a section's name"),
        ("  text: |", "  messages: [{role: user, content: x}]\n  text: |", "one of `messages:` and `text:`"),
        ("samples: 3", "sample: 3", r":3: sample: unknown key; did you mean `samples`"),
        ("samples: 3", "samples: 0", "samples: expected a number greater than or equal to 1"),
        ("    of: large\n", "", r"ask.1.of: is missing"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert OWN.count(old) == 1
    with pytest.raises(UserError, match=told):
        own(tmp_path, OWN.replace(old, new))


def test_an_operator_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no operator 'expanson'.*did you mean `expansion`"):
        open_operator("expanson", tmp_path)
    with pytest.raises(UserError, match=r"none.yaml: there is no such operator; check the path"):
        open_operator("none.yaml", tmp_path)


def test_all_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        own(tmp_path, OWN.replace("{{ question }}", "{{ qestion }}"))
    assert len(str(told.value).split("\n")) == 2  # the prompt and the row


def test_a_template_that_fails_is_told(tmp_path: Path) -> None:
    operator = own(tmp_path, OWN.replace("Improve {{ draft.main_idea }}", "Do {{ question.a.b }}"))
    with pytest.raises(
        UserError, match=r"own.yaml:13: ask.1.prompt: fails: .*has no attribute 'a'"
    ):
        drive(operator, {"question": "Why?"}, DRAFT, sample=1)
    harmful = "Do {{ question.__class__.__mro__ }}"
    operator = own(tmp_path, OWN.replace("Improve {{ draft.main_idea }}", harmful))
    with pytest.raises(UserError, match="unsafe"):
        drive(operator, {"question": "Why?"}, DRAFT, sample=1)


# --------------------------------------------------------------------------------- replies as read


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("correct\nx", ("correct", "x")),
        ("**Correct**\n\nx", ("correct", "x")),
        ("\n\n  `WRONG`\nx", ("wrong", "x")),
        ("Correct.", ("correct", "")),
        ("1. wrong\nx", ("wrong", "x")),
        ("[wrong]", ("wrong", "")),
        ("Verdict: wrong\nx", ("wrong", "x")),
        ("**Verdict:** wrong.\nx", ("wrong", "x")),
        ("## Verdict\n\nwrong\nx", ("wrong", "x")),
        ("The attempt is: **correct**\nx", ("correct", "x")),
        ("Wrong: step 2\nx", ("wrong", "step 2\nx")),
        ("**Wrong.** Step 2\nx", ("wrong", "Step 2\nx")),
        ("wrong - step 2", ("wrong", "step 2")),
        ("**Verdict: wrong** — step 2", ("wrong", "step 2")),
        ("It is wrong\nx", ("", "It is wrong\nx")),
        ("incorrect", ("", "incorrect")),
        ("not correct", ("", "not correct")),
        ("correct answer is 5", ("", "correct answer is 5")),
        ("", ("", "")),
    ],
)
def test_tags(reply: str, read: tuple[str, str]) -> None:
    assert read_tag(reply, ["correct", "wrong"]) == read


def test_a_tag_in_a_fence() -> None:
    read = read_reply("```\nwrong\nx\n```", ["correct", "wrong"])
    assert (read.tag, read.body) == ("wrong", "x")


@pytest.mark.parametrize(
    "reply",
    [
        "### Problem\nP\n\n### Solution\nS\ns\n### Answer\nA",
        "Problem: P\nSolution: S\ns\nAnswer: A",
        "**Problem**\nP\n**Solution:** S\ns\n\n**Answer**: A",
        "Sure!\n\n1. **Problem:**\nP\n2. **Solution:**\nS\ns\n3. **Answer:** A\n",
        "PROBLEM\nP\nSOLUTION\nS\ns\nANSWER\nA",
        "# problem:\nP\n---\n# solution:\nS\ns\n***\n# answer:\nA\n---",
        "**New Problem:** P\n\n**Solution**\nS\ns\n**Answer**\nA",
        "```\n### Problem\nP\n### Solution\nS\ns\n### Answer\nA\n```",
        "**1. Problem**\nP\n**2. Solution**\nS\ns\n**3. Answer**\nA",
        "- Problem: P\n- Solution: S\ns\n- Answer: A",
        "### 1. Problem\nP\n### 2. Solution\nS\ns\n### 3. Answer\nA",
        "[Problem]\nP\n[Solution]\nS\ns\n[Answer]\nA",
        "### **Problem**\nP\n### **Solution**\nS\ns\n### **Answer**\nA",
        "<think>\nAnswer: B\n</think>\nProblem: P\nSolution: S\ns\nAnswer: A",
        "so be it.</think>\nProblem: P\nSolution: S\ns\nAnswer: A",
    ],
)
def test_sections(reply: str) -> None:
    read = read_reply(reply, (), ["problem", "solution", "answer"])
    assert read.problem == ""
    assert read.sections == {"problem": "P", "solution": "S\ns", "answer": "A"}


def test_what_is_no_heading() -> None:
    inside = "```py\n# Answer: no\n```\nAnswer: 5"
    read = read_reply(f"### Solution\n{inside}\n### Answer\n5", (), ["solution", "answer"])
    assert read.sections == {"solution": inside, "answer": "5"}
    assert read_reply("Answers vary.\nAnswer the call", (), ["answer"]).problem == (
        "no section answer"
    )


def test_fences() -> None:
    assert unfenced("```py\na\n```") == "a" and unfenced("x\n```\na\n```") == "x\n```\na\n```"
    assert fenced("x\n```\na\n```\n```py\n  b = 1\n```") == "  b = 1" and fenced(" a ") == "a"
