"""Conversations to ids and masks: records a second, beside TRL's own preparation of the same file.

    python bench/conversations.py [--records 60000] [--table FILE.md]

Both sides get one JSONL file of `messages` (two to six turns of source code and prose from this
machine's Python), one tokenizer.json of byte-level BPE (8,000 pieces trained on it), one chat
template that marks answers, and two processes, one side after another in one run. Times are from the
start of each side's command, so they include starting Python and its imports: of megacode to the end of
the command; of TRL until `SFTTrainer._prepare_dataset` with `assistant_only_loss` has prepared the file,
without a trainer and a model. At the end the ids and masks of all records are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from megatron_data import machine_line
from rich.console import Console

from megacode.corpus.inspect import open_dataset, read_tokens
from megacode.data.indexed import open_shard
from megacode.data.loss_marks import ANSWER, loss_prefix

console = Console(highlight=False, soft_wrap=True)
WORKERS = 2
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def pieces() -> list[str]:
    """Stretches of the standard library's files, of 40 to 1,500 characters."""
    draw, found = random.Random(0), []
    for path in sorted(Path(json.__file__).parents[1].rglob("*.py"))[:1500]:
        text, at = path.read_text(encoding="utf-8", errors="replace"), 0
        while at < len(text):
            size = int(40 * 37.5 ** draw.random())
            found.append(text[at : at + size].strip() or "pass")
            at += size
    return found


def write_records(path: Path, count: int) -> int:
    """Returns the bytes of text."""
    draw, texts, size = random.Random(1), pieces(), 0
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(count):
            turns = [
                {"role": role, "content": draw.choice(texts)}
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ]
            size += sum(len(turn["content"].encode()) for turn in turns)
            out.write(json.dumps({"messages": turns}) + "\n")
    return size


def write_tokenizer(folder: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(pieces()[:5000], trainer)
    made.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def ours(folder: Path, template: str, name: str) -> float:
    file = folder / f"{name}.jinja"
    file.write_text(template)
    start = time.perf_counter()
    command = (
        f"preprocess {folder}/chats.jsonl --conversations --template {file} --workers {WORKERS}"
    )
    command += f" --tokenizer {folder}/tokenizer.json --output {folder / name}"
    subprocess.run(
        [sys.executable, "-m", "megacode.cli", *command.split()], check=True, capture_output=True
    )
    return time.perf_counter() - start


def theirs(folder: Path) -> tuple[float, Any]:
    """Seconds of TRL's process, and what it prepared."""
    import datasets

    command = [sys.executable, __file__, "--trl", str(folder)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(told.stdout.split()[-1]), datasets.load_from_disk(str(folder / "prepared"))


def prepare_with_trl(folder: Path) -> None:
    """Print the seconds from the start of this process until the records are prepared."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        dataset_num_proc=WORKERS,
        max_length=None,
        use_cpu=True,
        bf16=False,
    )
    records = datasets.load_dataset(
        "json", data_files=str(folder / "chats.jsonl"), cache_dir=str(folder / "cache")
    )["train"]
    stand_in = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=TEMPLATE, completion_only_loss=False
    )
    prepared = SFTTrainer._prepare_dataset(
        stand_in, records, tokenizer, config, False, None, "train"
    )
    seconds = time.time() - psutil.Process().create_time()
    prepared.save_to_disk(str(folder / "prepared"))
    print(seconds)


def differences(prefix: Path, prepared: Any) -> int:
    """Records whose ids or masks are not TRL's."""
    shard = open_dataset(prefix).shards[0]
    marks = open_shard(loss_prefix(prefix))
    ids, answers = (read_tokens(one, 0, one.tokens) for one in (shard, marks))
    edges, wrong = shard.token_edges(0, shard.documents), 0
    for number, record in enumerate(prepared):
        own = slice(int(edges[number]), int(edges[number + 1]))
        mask = (answers[own] & ANSWER) != 0
        wrong += not (
            np.array_equal(ids[own], record["input_ids"])
            and np.array_equal(mask, np.array(record["labels"]) != -100)
        )
    return wrong + abs(len(prepared) - shard.documents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--table", type=Path, help="write the table there")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        prepare_with_trl(args.trl)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_records(folder / "chats.jsonl", args.records)
        write_tokenizer(folder)
        marked = ours(folder, TEMPLATE, "marked")
        unmarked = ours(folder, UNMARKED + PROMPT, "unmarked")
        trl, prepared = theirs(folder)
        wrong = [differences(folder / one, prepared) for one in ("marked", "unmarked")]
    rows = [
        ("megacode preprocess --conversations", marked),
        ("the same, a template without `generation` blocks", unmarked),
        ("TRL", trl),
    ]
    import trl as package

    lines = [
        "# Conversations to ids and masks",
        "",
        f"{date.today()}, {machine_line()}; `python bench/conversations.py --records {args.records}`.",
        f"{args.records:,} records, {size / 1e6:.0f} MB of text, {WORKERS} processes a side, TRL "
        f"{package.__version__}. Both times hold the start of Python and its imports.",
        "",
        "| | seconds | records/s | MB/s | beside TRL |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {label} | {seconds:.1f} | {args.records / seconds:,.0f} | {size / seconds / 1e6:.1f} "
            f"| {trl / seconds:.1f} x |"
            for label, seconds in rows
        ),
        "",
        f"Records whose ids or masks differ from TRL's: {wrong[0]} and {wrong[1]} of {args.records:,}.",
    ]
    console.print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
