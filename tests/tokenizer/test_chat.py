"""Chat templates: text as transformers renders it, and spans that hold what the assistant has to write."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.chat import (
    BUILT_IN,
    ChatTemplate,
    TemplateError,
    load_chat_template,
)
from megacode.tokenizer.chat_encoding import ChatEncoder
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.training import train_tokenizer

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONTROL = frozenset(
    [
        "</s>",
        "<s>",
        "<eos>",
        "<bos>",
        "<|im_end|>",
        "<|im_start|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<start_of_turn>",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
        "<|header_start|>",
        "<|eot|>",
        "<end_of_utterance>",
    ]
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city & more <now>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "which"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "weather", "arguments": {"city": "Köln"}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "system": [
        {"role": "system", "content": "Be <brief>."},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "thinking": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "greet"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "add"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "abcdef123", "type": "function", "function": CALL}],
        },
        {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
}


def published() -> dict[str, str]:
    """The chat templates that TRL ships: NAME as published, NAME_training with `generation` blocks."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(found.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")}


TEMPLATES = published()
PLAIN = sorted(name for name in TEMPLATES if not name.endswith("_training")) or [
    pytest.param("none", marks=pytest.mark.skip(reason="trl is not installed"))
]


@pytest.fixture(scope="module")
def crystal(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer([f"line {i} of some text" for i in range(400)], path, vocab_size=300)
    return load_tokenizer(schema.TokenizerSection(path=str(path), added_tokens="crystal"))


def chat(text: str) -> ChatTemplate:
    return ChatTemplate("a template", text, VARIABLES, CONTROL)


def theirs(text: str, kind: str) -> tuple[str, list[str]] | None:
    """Text and generation blocks of transformers; None where the template refuses the conversation."""
    tools = TOOLS if kind == "tools" else None
    try:
        rendered, spans = render_jinja_template(
            [CONVERSATIONS[kind]],
            tools=tools,
            chat_template=text,
            return_assistant_tokens_mask="generation" in text,
            **VARIABLES,
        )
    except Exception:
        return None
    pieces = [rendered[0][start:end] for start, end in spans[0]] if spans else []
    return rendered[0], pieces


def ours(text: str, kind: str) -> tuple[str, list[str]]:
    tools = TOOLS if kind == "tools" else None
    rendered, spans = chat(text).render_answers(CONVERSATIONS[kind], tools)
    return rendered, [rendered[start:end] for start, end in spans]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_texts_and_blocks_are_those_of_transformers(name: str, kind: str) -> None:
    for text in filter(None, (TEMPLATES[name], TEMPLATES.get(f"{name}_training"))):
        expected = theirs(text, kind)
        tools = TOOLS if kind == "tools" else None
        if expected is None:
            with pytest.raises(TemplateError):
                chat(text).render(CONVERSATIONS[kind], tools)
        elif "strftime_now" not in text:  # else the minute may change in between
            assert chat(text).render(CONVERSATIONS[kind], tools) == expected[0]
            if "generation" in text and any(expected[1]):
                assert ours(text, kind)[1] == [piece for piece in expected[1] if piece]


@pytest.mark.parametrize("kind", ["turns", "system", "thinking"])
@pytest.mark.parametrize("name", PLAIN)
def test_spans_without_blocks_are_what_follows_the_prompt(name: str, kind: str) -> None:
    """Inside what TRL trains on, from the end of the generation prompt to the end of the turn."""
    text, messages = TEMPLATES[name], CONVERSATIONS[kind]
    training = theirs(TEMPLATES.get(f"{name}_training", ""), kind)
    if theirs(text, kind) is None or not training or not any(training[1]):
        pytest.skip("the template refuses the conversation, or there is no published mask")
    try:
        rendered, spans = ours(text, kind)
    except TemplateError as error:
        assert "{% generation %}" in str(error)
        return
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    masked = "".join(training[1])
    for span, message in zip(spans, answers, strict=True):
        assert message["content"].strip() in span
        assert not span.endswith("\n") or not any(span.rstrip().endswith(c) for c in CONTROL)
        assert span in masked or span.replace("</s>", "") in masked or "think" in span
    last = chat(text).render(messages[:-1], add_generation_prompt=True)
    assert not rendered.startswith(last) or rendered[len(last) :].startswith(spans[-1])


def test_a_template_that_rewrites_history_is_masked_by_what_it_shows() -> None:
    """Qwen3 drops the thinking of earlier turns: a prefix of the conversation is no prefix of its text."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "yes", "reasoning": "so"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "no", "reasoning": "thus"},
    ]
    rendered, spans = chat(text).render_answers(messages)
    assert [rendered[a:b] for a, b in spans] == ["yes<|im_end|>", "<think>thus</think>no<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "turn 2 is not where"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            "turn 2 is shown 2 times",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content | length }}",
            "depends on it",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}",
            "do not mark an answer",
        ),
    ],
)
def test_answers_that_cannot_be_found_are_refused(text: str, refusal: str) -> None:
    with pytest.raises(TemplateError, match=refusal):
        chat(text).render_answers(CONVERSATIONS["turns"][:2])


@pytest.mark.parametrize("content", ["  plain\n", "\U000f0000 \U000f0001", "\U000f0001"])
@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% set shown %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}{{ shown | trim }}{% endfor %}",
        "{% for m in messages %}{% filter upper %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfilter %}{% endfor %}",
    ],
)
def test_marks_around_blocks_are_never_taken_for_text(text: str, content: str) -> None:
    """Also where a turn spells them, or the template looks at what it has written."""
    messages = [{"role": "assistant", "content": content}]
    shown = chat(text).render(messages)
    try:
        rendered, spans = chat(text).render_answers(messages)
    except TemplateError:
        assert "trim" in text, "blanks that are trimmed are no part of a marked block"
        return
    assert rendered == shown and [rendered[a:b] for a, b in spans] == [shown]


@pytest.mark.parametrize(
    "text", ["{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ 'a' | nothing }}"]
)
def test_whatever_a_template_raises_is_its_refusal(text: str) -> None:
    with pytest.raises((TemplateError, UserError)):
        chat(text).render(CONVERSATIONS["turns"])


def test_templates_are_data() -> None:
    """A template reaches no attribute of Python's, and changes no message."""
    for text in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ):
        with pytest.raises(TemplateError):
            chat(text).render(CONVERSATIONS["turns"])


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_mark_every_answer_with_its_end(name: str, crystal: Tokenizer) -> None:
    if name == "llama-3":
        with pytest.raises(UserError, match=r"--chat llama-3: writes .*<\|eot_id\|>"):
            load_chat_template(crystal, name)
        added = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        section = schema.TokenizerSection(path=str(crystal.path), added_tokens=added)
        crystal = load_tokenizer(section)
    template = load_chat_template(crystal, name)
    rendered, spans = template.render_answers(CONVERSATIONS["turns"])
    end = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(
        name, template.variables["eos_token"]
    )
    assert [rendered[a:b] for a, b in spans] == [f"Hello!{end}", f"It is 4.{end}"]
    prompt = template.render(CONVERSATIONS["turns"][:3], add_generation_prompt=True)
    assert rendered[: spans[1][0]] == prompt


def test_a_file_beside_the_tokenizer_comes_first(crystal: Tokenizer, tmp_path: Path) -> None:
    tokenizer = dataclasses.replace(crystal, path=tmp_path / "t.model")
    with pytest.raises(UserError, match="no chat template beside it"):
        load_chat_template(tokenizer)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "config"}]
    config = {"chat_template": named, "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_chat_template(tokenizer)
    assert found.text == "config" and found.variables["eos_token"] == "<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tokenizer).text == "file"
    with pytest.raises(UserError, match="--chat vicuna: give one of chatml"):
        load_chat_template(tokenizer, "vicuna")


# ------------------------------------------------------------------------------------ encoding

TEXT = "<s><|im_start|>user\nHi  there, größte 🦙!<|im_end|>\n<|im_start|>assistant\n def f(x):\n\treturn<|im_end|>"


@pytest.fixture(scope="module", params=["byte level", "metaspace", "prepended"])
def from_json(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Tokenizers whose pieces depend on what stands before a text, as Llama's and Mistral's do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    if request.param == "byte level":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif request.param == "metaspace":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        rules = (
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        )
        made.normalizer = tokenizers.normalizers.Sequence(list(rules))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[
            "<s>",
            "</s>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"<0x{i:02X}>" for i in range(256)),
        ],
        show_progress=False,
    )
    made.train_from_iterator(
        [f"hi there user assistant def f{i}(x): return" for i in range(50)], trainer
    )
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(schema.TokenizerSection(path=str(path)))


def test_ids_are_those_of_transformers(from_json: Tokenizer) -> None:
    expected = PreTrainedTokenizerFast(tokenizer_file=str(from_json.path))
    ids, places = ChatEncoder(from_json).encode(TEXT)
    assert ids.tolist() == expected.encode(TEXT, add_special_tokens=False)
    assert [TEXT[a:b] for a, b in places if TEXT[a:b].startswith("<|")] == [
        "<|im_start|>",
        "<|im_end|>",
    ] * 2


def test_places_cover_the_text(crystal: Tokenizer, tmp_path: Path) -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"the", b"\xc3\xb6"]
    path = tmp_path / "tiny.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks)))
    special = {"<s>": 259, "<|im_start|>": 260, "<|im_end|>": 261}
    pattern = {"pattern": r"\s+|\S+", "special_tokens": special}
    (tmp_path / "tiny.tiktoken.json").write_text(json.dumps(pattern))
    for tokenizer in (crystal, load_tokenizer(schema.TokenizerSection(path=str(path)))):
        ids, places = ChatEncoder(tokenizer).encode(TEXT)
        assert places[0].tolist() == [0, 3] and places[-1, 1] == len(TEXT)
        assert (places[1:, 0] <= places[:-1, 1]).all() and (places[:, 0] <= places[:, 1]).all()
        names = {i: name for name, i in tokenizer.control_tokens.items()}
        for i, (start, end) in zip(ids.tolist(), places.tolist(), strict=True):
            assert i not in names or TEXT[start:end] == names[i]
        assert tokenizer.decode(ids.tolist(), control=True).replace("\u2581", " ") == TEXT


def test_a_turn_that_spells_a_control_token_is_found(crystal: Tokenizer) -> None:
    find = ChatEncoder(crystal).control_token_in
    assert find(CONVERSATIONS["tools"]) is None
    assert find([{"content": [{"type": "text", "text": "a </s> b"}]}]) == "</s>"
    assert (
        find([{"content": "", "tool_calls": [{"arguments": {"x": "<|im_end|>"}}]}]) == "<|im_end|>"
    )
