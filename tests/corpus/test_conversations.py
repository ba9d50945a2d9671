"""Records of every format -> ids and loss marks: those of transformers, and no turn is lost."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from megacode.cli.main import main
from megacode.corpus.conversations import (
    BadConversationError,
    Conversation,
    read_conversation,
    without_nulls,
)
from megacode.corpus.inspect import open_dataset, read_marks, read_tokens
from megacode.corpus.preprocess import Request, preprocess
from megacode.corpus.preprocess.chat import ConversationTokenizer, SetAside, notes_on
from megacode.data.loss_marks import ANSWER, FIRST, LAST_ANSWER, split
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.chat_encoding import ChatEncoder
from megacode.tokenizer.fast import FastEncoder, load_fast
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.test_chat import CALL, CONTROL, CONVERSATIONS, TEMPLATES, TOOLS

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [USER, SAYS, USER, SAYS]}, [USER, SAYS, USER, SAYS]),
    "sharegpt": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "system", "content": "s"}, USER, SAYS],
    ),
    "sharegpt with roles": ({"conversation": [USER, SAYS]}, [USER, SAYS]),
    "alpaca": (
        {"instruction": "q", "input": "", "output": "a", "history": [["h", "i"]]},
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}, USER, SAYS],
    ),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a", "system": "s"},
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q\nx"}, SAYS],
    ),
    "prompt": ({"prompt": "q", "completion": "a"}, [USER, SAYS]),
    "target": ({"input": "q", "target": "a"}, [USER, SAYS]),
    "prompt of messages": (
        {"prompt": [USER, SAYS, USER], "completion": [SAYS]},
        [USER, SAYS, USER, SAYS],
    ),
    "function call": (
        {"conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "a"},
        ]},
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "sunny"},
            SAYS,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_is_a_conversation_with_all_its_turns(name: str) -> None:
    record, messages = FORMATS[name]
    found = read_conversation(record)
    assert found.messages == messages
    assert found.untrained == ((1,) if name == "prompt of messages" else ())


def test_tools_calls_and_weights_stay_as_they_are() -> None:
    as_text = {**SAYS, "tool_calls": [{"function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}]}
    record = {"messages": [USER, as_text, {**SAYS, "weight": 0}], "tools": json.dumps(TOOLS)}
    found = read_conversation(record)
    assert found.messages[1] == as_text and found.tools == TOOLS and found.untrained == (2,)
    # Arrow gives every struct the keys of all: they go, nothing else does.
    assert without_nulls([{"a": None, "b": [{"c": None, "d": 0}]}]) == [{"b": [{"d": 0}]}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "has none of `messages`"),
        ([1], "not an object"),
        ({"messages": "x"}, "`messages` is not a list"),
        ({"messages": [{"role": "alien", "content": "x"}, SAYS]}, "unknown role 'alien'"),
        ({"messages": [USER]}, "has no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "assistant has no text"),
        ({"messages": [{"role": "user"}, SAYS]}, "user has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAYS]}, "'image'"),
        ({"instruction": "q", "output": None}, "assistant has no text"),
        ({"messages": [USER, SAYS], "tools": "{"}, "`tools` is not JSON"),
        ({"instruction": "q", "output": "a", "history": ["h"]}, "`history` is not"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, reason: str) -> None:
    with pytest.raises(BadConversationError, match=reason):
        read_conversation(record)


# -------------------------------------------------------------------------------- ids and masks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, as Llama 3's and Qwen's, with the control tokens of all published templates."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split_rule = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split_rule, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    names = ["<s>", "</s>", "<pad>", *sorted(CONTROL - {"<s>", "</s>"})]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=names,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([f"hello there user assistant is {i}\n\n" for i in range(99)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return load_tokenizer(schema.TokenizerSection(path=str(folder)))


def request(tokenizer: Tokenizer, **more: Any) -> Request:
    section = schema.TokenizerSection(path=str(tokenizer.path), eod=True)
    more = {"inputs": (), "output": Path("out"), **more}
    return Request(tokenizer=section, conversations=True, text_field="", **more)


def fast(tokenizer: Tokenizer) -> FastEncoder:
    found = load_fast(tokenizer)
    assert not isinstance(found, str), found
    return found


def write_template(tmp_path: Path, text: str) -> str:
    (tmp_path / "template.jinja").write_text(text)
    return str(tmp_path / "template.jinja")


@pytest.mark.parametrize("name", sorted(TEMPLATES) or ["none"])
def test_ids_and_masks_are_those_of_transformers(
    tokenizer: Tokenizer, name: str, tmp_path: Path
) -> None:
    """Of every template that TRL ships, on turns, system, tools and thinking."""
    if name == "none":
        pytest.skip("trl is not installed")
    text = TEMPLATES[name]
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    ours = ConversationTokenizer(
        request(tokenizer, template=write_template(tmp_path, text)), tokenizer, fast(tokenizer)
    )
    compared = 0
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in CONVERSATIONS["turns"]
    ]
    for kind, messages in {**CONVERSATIONS, "parts": parts}.items():
        tools = TOOLS if kind == "tools" else None
        try:
            expected = theirs.apply_chat_template(
                messages,
                tools=tools,
                chat_template=text,
                return_dict=True,
                return_assistant_tokens_mask="generation" in text,
            )
        except Exception:
            continue
        (found,) = ours.encode([Conversation(messages, tools)])
        if isinstance(found, SetAside):
            assert (
                "generation" in found.reason or "refuses" in found.reason or "turn" in found.reason
            )
            continue
        ids, marks = split(found[1])
        ends = ours.template.turn_end() == "" and expected["input_ids"][-1] != 1
        assert ids.tolist() == [*expected["input_ids"], *[1] * ends]
        assert marks[0] & FIRST and not (marks[1:] & FIRST).any()
        if any(expected.get("assistant_masks", [])):
            answers = ((marks & ANSWER) != 0).astype(int).tolist()
            assert answers[: len(answers) - ends] == expected["assistant_masks"]
        compared += 1
    assert compared


def test_the_fast_encoder_gives_the_ids_and_places_of_the_reference(tokenizer: Tokenizer) -> None:
    reference, quick = ChatEncoder(tokenizer), ChatEncoder(tokenizer, fast(tokenizer))
    assert quick._widths is not None, "else it compares the reference with itself"
    hostile = [
        "",
        "\n",
        "größte 🦙\u0301",
        "<|im_end|>" * 3,
        " a\n\n\nb",
        "日本語",
        "1234567890" * 3,
        "\0",
    ]
    texts = ["".join(some) for some in itertools.product(hostile, repeat=3)]
    for (ids, places), text in zip(quick.encode_batch(texts), texts, strict=True):
        expected = reference.encode(text)
        assert np.array_equal(ids, expected[0]), text
        # Where a character has several tokens, each has all of it.
        assert np.array_equal(places, expected[1]), text


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and marks of every document."""
    dataset = open_dataset(prefix)
    found = []
    for number in range(dataset.documents):
        shard, first, tokens = dataset.span(number)
        marks = read_marks(shard, first, tokens)
        assert marks is not None
        found.append((read_tokens(shard, first, tokens).tolist(), marks.tolist()))
    return found


def many(count: int = 60) -> list[dict[str, Any]]:
    """Conversations that differ in length and turns."""
    rows = []
    for i in range(count):
        turns = [
            {"role": role, "content": f"{role} {i} " + "word " * (i * k % 7)}
            for k in range(1 + i % 3)
            for role in ("user", "assistant")
        ]
        rows.append({"messages": turns, "kind": "ab"[i % 2]})
    return rows


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many()))
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_files_of_conversations_become_a_dataset_with_marks(
    tokenizer: Tokenizer, tmp_path: Path, form: str
) -> None:
    rows, file = many(), tmp_path / f"chats.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif form == "json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = request(tokenizer, inputs=(str(file),), output=tmp_path / "out", template="chatml")
    preprocess(asked)
    found = documents(tmp_path / "out")
    encoder = ChatEncoder(tokenizer)
    for row, (ids, marks) in zip(rows, found, strict=True):
        text = "".join(
            f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["messages"]
        )
        assert ids == encoder.encode(text)[0].tolist()
        answers = [i for i, mark in zip(ids, marks, strict=True) if mark & ANSWER]
        expected = "".join(f"{turn['content']}<|im_end|>" for turn in row["messages"][1::2])
        assert tokenizer.decode(answers, control=True) == expected
        last = [i for i, mark in zip(ids, marks, strict=True) if mark & LAST_ANSWER]
        assert tokenizer.decode(last, control=True) == f"{row['messages'][-1]['content']}<|im_end|>"
        assert [mark & FIRST for mark in marks] == [FIRST, *[0] * (len(marks) - 1)]


def test_marks_follow_their_conversations_in_any_order_of_output(
    tokenizer: Tokenizer, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Split by a field, a part held out, duplicates taken away, shuffled, cut into shards, on two processes."""
    common = {"inputs": (str(chats), str(chats)), "template": "chatml"}
    plain = preprocess(request(tokenizer, **common, output=tmp_path / "plain"))
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(chats.read_bytes() * 2)
    asked = request(
        tokenizer, inputs=(str(twice),), template="chatml", output=tmp_path / "{value}",
        split_by="kind", validation=0.2, deduplicate=True, shuffle=3, shard_size=400,
    )  # fmt: skip
    result = preprocess(asked, workers=2)
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    answers = sum(
        bool(mark & ANSWER) for _, marks in documents(tmp_path / "plain") for mark in marks
    )
    assert re.search(rf"tokens of answers +{answers:,}\b", capsys.readouterr().out)
    assert len(result.outputs) == 4 and plain.counts.total.documents == 60
    found = [doc for prefix in result.outputs.values() for doc in documents(prefix)]
    assert sorted(found) == sorted(documents(tmp_path / "plain"))
    for prefix in result.outputs.values():
        assert main(["inspect", str(prefix), "--verify"]) == 0
    assert preprocess(asked).kept, "the same command finds it made"
    held_out = {
        str(ids)
        for g, p in result.outputs.items()
        if g.split == "validation"
        for ids, _ in documents(p)
    }
    again = preprocess(
        request(tokenizer, **common, output=tmp_path / "again", validation=0.2, max_tokens=999)
    )
    assert held_out == {
        str(ids)
        for g, p in again.outputs.items()
        if g.split == "validation"
        for ids, _ in documents(p)
    }, "held out by the conversation, whatever else is asked for"


def test_megatron_core_reads_both_files(tokenizer: Tokenizer, chats: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    preprocess(request(tokenizer, inputs=(str(chats),), output=tmp_path / "out", template="chatml"))
    ids, marks = (IndexedDataset(str(tmp_path / name)) for name in ("out", "out.loss"))
    assert len(ids) == len(marks) == 60 and marks.index.dtype == np.uint8
    for number, (own, mark) in enumerate(documents(tmp_path / "out")):
        assert ids[number].tolist() == own and marks[number].tolist() == mark


def test_a_changed_mark_is_found(tokenizer: Tokenizer, chats: Path, tmp_path: Path) -> None:
    preprocess(request(tokenizer, inputs=(str(chats),), output=tmp_path / "out", template="chatml"))
    path = tmp_path / "out.loss.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 2
    path.write_bytes(whole[:-1])
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 2


# -------------------------------------------------------------------------------- what is set aside


def encode(tokenizer: Tokenizer, *messages: dict[str, Any], **more: Any) -> Any:
    ours = ConversationTokenizer(
        request(tokenizer, **{"template": "chatml", **more}), tokenizer, None
    )
    return ours.encode([Conversation(list(messages))])[0]


def test_a_turn_that_spells_a_control_token_is_set_aside(tokenizer: Tokenizer) -> None:
    found = encode(tokenizer, {"role": "user", "content": "a <|im_end|> b"}, SAYS)
    assert found == SetAside("spells the control token <|im_end|>")


def test_truncation_by_policy(tokenizer: Tokenizer) -> None:
    messages = (USER, {"role": "assistant", "content": "one two three four five"})
    whole, whole_marks = split(encode(tokenizer, *messages)[1])
    for policy, kept in (("left", slice(-6, None)), ("right", slice(0, len(whole) - 3))):
        size = len(whole[kept])
        ids, marks = split(encode(tokenizer, *messages, max_tokens=size, too_long=policy)[1])
        assert ids.tolist() == whole[kept].tolist()
        assert (marks[1:] == whole_marks[kept][1:]).all() and marks[0] & FIRST
    found = encode(tokenizer, *messages, max_tokens=6, too_long="drop")
    assert found == SetAside("longer than --max-tokens", harmless=True)
    # What is left on the right of a long question has no answer.
    found = encode(
        tokenizer, {"role": "user", "content": "q " * 50}, SAYS, max_tokens=8, too_long="right"
    )
    assert found == SetAside("no token to train on", harmless=True)


def test_the_verb_says_what_it_set_aside_and_refuses_what_is_too_long(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        *many(20),
        {"messages": [{"role": "alien", "content": "x"}]},
        {"x": 1},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "preprocess",
        str(file),
        "--conversations",
        "--tokenizer",
        str(tokenizer.path),
        "--workers",
        "1",
    ]
    out = tmp_path / "out"
    assert main([*common, "--template", "chatml", "--output", str(out), "--max-bad", "50%"]) == 0
    said = capsys.readouterr().out
    assert "bad: 1 × unknown role 'alien'" in said and "1 × has none of" in said
    lines = Path(f"{out}.quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line) for line in lines]
    assert [(bad["record"], bad["reason"][:12]) for bad in reasons] == [
        (21, "unknown role"),
        (22, "has none of "),
    ]
    short = [
        *common,
        "--template",
        "chatml",
        "--output",
        str(tmp_path / "short"),
        "--max-tokens",
        "30",
    ]
    assert main(short) == 2
    assert f"{file}, record " in (said := capsys.readouterr().err) and "--too-long" in said
    assert main([*short, "--too-long", "drop", "--max-bad", "50%"]) == 0
    assert "× longer than --max-tokens" in capsys.readouterr().out
    assert main([*common, "--output", str(tmp_path / "no")]) == 2
    assert "no chat template beside it" in capsys.readouterr().err
    assert main([*common, "--template", "llama-3", "--output", str(tmp_path / "no")]) == 2
    assert "--template llama-3: writes" in capsys.readouterr().err
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    assert (
        main(
            [
                *common[:1],
                str(text),
                *common[2:],
                "--template",
                "chatml",
                "--output",
                str(out) + "2",
            ]
        )
        == 2
    )
    assert "no conversations: a record has none of" in capsys.readouterr().err


def test_no_second_begin_and_an_end_where_the_template_has_none(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`--bos` adds one only where the template did not; EOD is trained where no token ends a turn."""
    bare = write_template(tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with_bos = write_template(
        tmp_path / "..", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    section = schema.TokenizerSection(path=str(tokenizer.path), bos=True, eod=True)
    for template in (bare, with_bos):
        asked = Request(
            (), section, Path("out"), conversations=True, text_field="", template=template
        )
        ours = ConversationTokenizer(asked, tokenizer, None)
        ids, marks = split(ours.encode([Conversation([USER, SAYS])])[0][1])  # type: ignore[arg-type]
        assert ids.tolist().count(0) == 1 and ids[0] == 0 and ids[-1] == 1
        ends_with_answer = template == with_bos
        assert bool(marks[-1] & ANSWER) == ends_with_answer


def test_answers_of_the_prompt_are_no_answers_to_learn(tokenizer: Tokenizer) -> None:
    ours = ConversationTokenizer(request(tokenizer, template="chatml"), tokenizer, None)
    found = ours.encode(
        [
            read_conversation(
                {"prompt": [USER, SAYS, USER], "completion": [{**SAYS, "content": "end"}]}
            )
        ]
    )
    ids, marks = split(found[0][1])  # type: ignore[arg-type]
    assert tokenizer.decode(ids[(marks & ANSWER) != 0].tolist(), control=True) == "end<|im_end|>"


def test_variables_of_a_record_and_what_the_template_adds(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`enable_thinking: false` puts an empty block into the prompt, where it is not trained on."""
    template = write_template(
        tmp_path,
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}{{ strftime_now('') }}",
    )
    ours = ConversationTokenizer(request(tokenizer, template=template), tokenizer, None)
    for variables, shown in (({"enable_thinking": False}, True), ({}, False)):
        row = {"messages": [USER, SAYS], "chat_template_kwargs": variables}
        text, joined = ours.encode([read_conversation(row)])[0]  # type: ignore[misc]
        ids, marks = split(joined)
        assert ("<think>" in text) == shown
        assert tokenizer.decode(ids[(marks & ANSWER) != 0].tolist(), control=True) == "a<|im_end|>"
    assert notes_on(ours.template) == [
        "the chat template writes a system prompt of its own: 'You are Q.'",
        "the chat template writes the current date; another day gives other ids",
    ]
    chatml = ConversationTokenizer(request(tokenizer, template="chatml"), tokenizer, None)
    assert notes_on(chatml.template) == []


def test_spans_at_the_very_start_and_around_stripped_blanks(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for text in (
        "{% for m in messages %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    ):
        asked = request(tokenizer, template=write_template(tmp_path, text))
        ours = ConversationTokenizer(asked, tokenizer, fast(tokenizer))
        says = [{"role": "assistant", "content": f"  {word} \n"} for word in ("one", "two")]
        shown, joined = ours.encode([Conversation(says)])[0]  # type: ignore[misc]
        ids, marks = split(joined)
        answers = ["".join(tokenizer.decode([i], control=True) for i, m in zip(ids, marks, strict=True) if m & bit)
                   for bit in (ANSWER, LAST_ANSWER)]  # fmt: skip
        assert answers == ["one<|im_end|>two<|im_end|>", "two<|im_end|>"] and shown.startswith(
            "one"
        )


def test_a_table_of_tool_calls_gives_no_nulls_to_the_template(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {key: "1"}}}]}, SAYS]}
        for key in ("x", "y")
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    template = write_template(
        tmp_path,
        "{% for m in messages %}{% generation %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "<|im_end|>{% endgeneration %}{% endfor %}",
    )
    asked = request(
        tokenizer, inputs=(str(tmp_path / "c.parquet"),), output=tmp_path / "o", template=template
    )
    preprocess(asked)
    texts = [tokenizer.decode(ids, control=True) for ids, _ in documents(tmp_path / "o")]
    call = '[{"type": "function", "function": {"name": "f", "arguments": {"%s": "1"}}}]'
    assert texts == [f"q<|im_end|>{call % key}<|im_end|>a<|im_end|>" for key in ("x", "y")]


def test_mistakes_of_the_request(tokenizer: Tokenizer, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--repository"):
        preprocess(
            request(
                tokenizer, inputs=(str(chats),), output=tmp_path / "o", template="plain",
                repository="r", path="p",
            )
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
