"""Corpus to tokens: megabytes of text a second, beside Megatron-LM, datatrove, sentencepiece and the raw fast backend.

    python bench/preprocess.py [--corpus FILE.jsonl] [--megabytes 500] [--megatron-lm FOLDER] [--table FILE.md]

Every side gets the same JSONL file (field "text"), the same SentencePiece BPE model of 32,000 pieces, and two processes,
one side after another in one run. Without --corpus the sources and prose that lie below this machine's program folders
are gathered (nothing twice). Sides that are not installed are left out, and the table says so: Megatron-LM is a checkout
of its repository, with what its training package imports (--megatron-path adds folders, for triton say); datatrove gets
the model as a tokenizer.json made from it.

Rates are text (UTF-8 of the documents) over wall time from the start of the command to its end, so they include starting
Python; those of sentencepiece and of the backend alone are over documents already in memory. Memory is the highest sum
of proportional set sizes of a side's processes, sampled twice a second. At the end, the tokens of Megatron-LM's
dataset and megacode's are compared, document for document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from megatron_data import machine_line
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
PROCESSES = "fast backend alone, processes, in memory"
ENDINGS = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".hpp",
    ".cpp",
    ".js",
    ".pl",
    ".pm",
    ".sh",
    ".md",
    ".rst",
    ".txt",
}


@dataclass(frozen=True)
class Result:
    side: str
    seconds: float
    tokens: int
    memory: float = 0.0
    """MB"""


# ------------------------------------------------------------------------------------------------------- the corpus


def gather(path: Path, megabytes: float) -> None:
    """Sources and prose from this machine, each once, in an order given by a hash of their paths."""
    roots = [
        Path(p)
        for p in ("/usr", "/opt", "/root", "/home", sys.prefix, sys.base_prefix)
        if Path(p).is_dir()
    ]
    files = {f for root in roots for f in _files(root)}
    seen: set[bytes] = set()
    size = 0
    with open(path, "w", encoding="utf-8") as out:
        for file in sorted(files, key=lambda f: blake2b(str(f).encode(errors="replace")).digest()):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, ValueError):
                continue
            digest = blake2b(text.encode()).digest()
            if not text or digest in seen:
                continue
            seen.add(digest)
            out.write(json.dumps({"text": text, "path": str(file)}) + "\n")
            size += len(text.encode())
            if size > megabytes * 1e6:
                return


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if file.suffix in ENDINGS and not file.is_symlink() and file.stat().st_size < 2_000_000:
                yield file


def texts_of(corpus: Path) -> list[str]:
    with open(corpus, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


# --------------------------------------------------------------------------------------------------------- the sides


def measured(name: str, command: list[str], tokens: Callable[[], int], **more: object) -> Result:
    """Run a command to its end and watch its memory."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - read after the process has ended
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=log, stderr=log, **more)
    peak, looked = 0, started
    while process.poll() is None:
        time.sleep(0.02)
        if (
            time.perf_counter() > looked + 0.5
        ):  # adding up the pages of a process takes a core for milliseconds
            looked = time.perf_counter()
            peak = max(peak, _memory(process))
    seconds = time.perf_counter() - started
    if process.returncode:
        log.seek(0)
        raise SystemExit(f"{name} failed:\n{log.read().decode(errors='replace')[-3000:]}")
    return Result(name, seconds, tokens(), peak / 1e6)


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def tokens_in(*prefixes: Path) -> int:
    itemsize = 2  # 32,000 pieces
    return (
        sum(prefix.with_name(prefix.name + ".bin").stat().st_size for prefix in prefixes)
        // itemsize
    )


def megacode(corpus: Path, model: Path, folder: Path, workers: int, *options: str) -> Result:
    output = folder / ("megacode" + "".join(options))
    command = [
        sys.executable, "-m", "megacode.cli", "preprocess", str(corpus), "--tokenizer", str(model),
        "--output", str(output), "--workers", str(workers), *options,
    ]  # fmt: skip
    name = "megacode preprocess" + (" " + " ".join(options) if options else "")
    return measured(name, command, lambda: tokens_in(output))


COORDINATOR = """
import sys, time
from pathlib import Path
from megacode.corpus.preprocess import Request, preprocess
from megacode.corpus.workers import prepare_workers
from megacode.recipe.schema import TokenizerSection
from megacode.tokenizer.fast import FAST_MODULES
corpus, model, output, workers = sys.argv[1:]
prepare_workers(["megacode.corpus.preprocess.tokenize", *FAST_MODULES])
request = Request((corpus,), TokenizerSection(path=model), Path(output))
wall, cpu = time.perf_counter(), time.process_time()
result = preprocess(request, int(workers))
print(time.process_time() - cpu, time.perf_counter() - wall, result.counts.total.bytes / 1e9)
"""


def coordinator(corpus: Path, model: Path, folder: Path, workers: int) -> str:
    """What the process that hands out the parts costs: CPU for each GB of text beyond a quarter of the corpus, which pays for its
    start, and how many workers would keep it busy."""
    quarter = folder / "quarter.jsonl"
    with open(corpus, "rb") as lines, open(quarter, "wb") as out:
        for number, line in enumerate(lines):
            if number % 4 == 0:
                out.write(line)
    found = []
    for name, text in (("part", quarter), ("whole", corpus)):
        command = [
            sys.executable,
            "-c",
            COORDINATOR,
            str(text),
            str(model),
            str(folder / f"coordinator-{name}"),
            str(workers),
        ]
        found.append(
            [
                float(n)
                for n in subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.split()
            ]
        )
    (cpu, wall, size), (all_cpu, all_wall, all_size) = found
    each, worker = (
        (all_cpu - cpu) / (all_size - size),
        workers * (all_wall - wall) / (all_size - size),
    )
    return (
        f"The coordinator's CPU: {all_cpu:.2f} s for {all_size:.2f} GB of text, {each:.2f} s for each further GB; a worker takes "
        f"{worker:.1f} s a GB, so {worker / each:,.0f} of them would keep it busy."
    )


def megatron_lm(
    corpus: Path, model: Path, folder: Path, workers: int, root: Path, more_paths: list[str]
) -> Result:
    path = os.pathsep.join([str(root), *more_paths])
    command = [
        sys.executable, str(root / "tools" / "preprocess_data.py"), "--input", str(corpus), "--output-prefix",
        str(folder / "megatron"), "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model),
        "--append-eod", "--workers", str(workers), "--log-interval", "100000",
    ]  # fmt: skip
    output = folder / "megatron_text_document"
    return measured(
        "Megatron-LM preprocess_data.py",
        command,
        lambda: tokens_in(output),
        env={**os.environ, "PYTHONPATH": path},
    )


def huggingface_form(model: Path) -> Any:
    """The same BPE model for the `tokenizers` library; its merges are those that transformers derives."""
    import sentencepiece
    import tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = generate_merges(
        vocabulary, {name: pieces.get_score(i) for i, name in enumerate(names)}
    )
    model_of = tokenizers.models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model_of)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    source, tokenizer, output, tasks = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(source),
            DocumentTokenizer(
                output, tokenizer_name_or_path=tokenizer, eos_token="</s>", shuffle_documents=False, batch_size=1000
            ),
        ],
        tasks=int(tasks), workers=int(tasks), logging_dir=output + "-logs",
    ).run()
"""


def datatrove(corpus: Path, model: Path, folder: Path, workers: int) -> Result:
    """It cuts work by files: the corpus is given as one file a task. With its own batches of 10,000 documents it needed
    more than 11 GB a task on source files; it gets 1,000."""
    tokenizer = folder / "tokenizer.json"
    huggingface_form(model).save(str(tokenizer))
    source = folder / "datatrove-in"
    source.mkdir()
    share, done = corpus.stat().st_size / workers, 0
    with open(corpus, "rb") as lines, ExitStack() as stack:
        files = [stack.enter_context(open(source / f"{i}.jsonl", "wb")) for i in range(workers)]
        for line in lines:
            files[min(int(done / share), workers - 1)].write(line)
            done += len(line)
    script = folder / "run_datatrove.py"
    script.write_text(DATATROVE)
    output = folder / "datatrove"
    command = [sys.executable, str(script), str(source), str(tokenizer), str(output), str(workers)]

    def tokens() -> int:
        return sum(file.stat().st_size for file in output.glob("*.ds")) // 2

    return measured("datatrove", command, tokens)


def _sentencepiece_worker(work: tuple[str, list[str]]) -> int:
    import sentencepiece

    model, texts = work
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    return sum(len(processor.encode(text)) for text in texts)


def _backend_worker(work: tuple[str, list[str]]) -> tuple[int, float]:
    """Tokens, and seconds after the tokenizer was loaded and the texts were bytes."""
    import gigatoken

    model, texts = work
    tokenizer = gigatoken.Tokenizer.from_sentencepiece(model)
    documents = [text.encode() for text in texts]
    started = time.perf_counter()
    tokens = 0
    for i in range(0, len(documents), 256):
        tokens += len(
            tokenizer.encode_batch(documents[i : i + 256], parallel=False).layout.content.data
        )
    return tokens, time.perf_counter() - started


def fast_sides(corpus: Path, model: Path, folder: Path, workers: int) -> Iterator[Result]:
    """megacode and the libraries alone (on documents that are already there). What takes seconds is done three times,
    in turn, and its median counts."""
    texts = texts_of(corpus)
    shares = [(str(model), texts[i::workers]) for i in range(workers)]
    rounds: list[list[Result]] = []
    for number in range(3):
        output = folder / f"round-{number}"
        output.mkdir()
        whole = megacode(corpus, model, output, workers)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            done = pool.map(_backend_worker, shares, chunksize=1)
            rounds.append(
                [
                    whole,
                    Result(PROCESSES, max(s for _, s in done), sum(n for n, _ in done)),
                    _threads(model, texts),
                ]
            )
        if number:
            shutil.rmtree(output)
    for results in zip(*rounds, strict=True):
        yield sorted(results, key=lambda result: result.seconds)[1]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(len, range(0))
        started = time.perf_counter()
        tokens = sum(pool.map(_sentencepiece_worker, shares, chunksize=1))
        yield Result("sentencepiece alone, in memory", time.perf_counter() - started, tokens)


def _threads(model: Path, texts: list[str]) -> Result:
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_sentencepiece(str(model))
    documents = [text.encode() for text in texts]
    started = time.perf_counter()
    tokens = len(tokenizer.encode_batch(documents, parallel=True).layout.content.data)
    return Result(
        "fast backend alone, its own threads, in memory", time.perf_counter() - started, tokens
    )


# --------------------------------------------------------------------------------------------------------- the table


def same_documents(ours: Path, theirs: Path) -> str:
    """Whether two datasets hold the same documents in the same order, by their index and their tokens."""

    def lengths(prefix: Path) -> np.ndarray:
        with open(prefix.with_name(prefix.name + ".idx"), "rb") as file:
            header = file.read(34)
            count = int.from_bytes(header[18:26], "little")
            return np.fromfile(file, dtype="<i4", count=count)

    mine, other = lengths(ours), lengths(theirs)
    if not np.array_equal(mine, other):
        return f"DIFFERENT: {len(mine):,} and {len(other):,} documents, or other lengths"
    a, b = (
        np.memmap(p.with_name(p.name + ".bin"), dtype=np.uint16, mode="r") for p in (ours, theirs)
    )
    if not np.array_equal(a, b):
        return f"DIFFERENT from token {int(np.flatnonzero(a != b)[0]):,} on"
    return f"all {len(mine):,} documents, {len(a):,} tokens, are the same"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="JSON lines with a field `text` (gathered from this machine)"
    )
    parser.add_argument("--megabytes", type=float, default=500, help="how much to gather (500)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument(
        "--megatron-path", action="append", default=[], help="more folders for its PYTHONPATH"
    )
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    from megacode.tokenizer.training import sample, train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="bench-preprocess-"))
    try:
        corpus = args.corpus or folder / "corpus.jsonl"
        if not args.corpus:
            with console.status("gathering sources and prose"):
                gather(corpus, args.megabytes)
        texts = texts_of(corpus)
        size = sum(len(text.encode()) for text in texts) / 1e6
        console.print(f"{len(texts):,} documents, {size:,.1f} MB of text")
        model = folder / "tokenizer.model"
        with console.status("training the tokenizer"):
            train_tokenizer(
                (t for t in sample(texts, min(1.0, 60 / size)) if len(t) < 100_000), model, 32_000
            )
        del texts
        results = []

        def note(result: Result) -> None:
            results.append(result)
            console.print(
                f"{result.side}: {result.seconds:.1f} s, {size / result.seconds:.1f} MB/s"
            )

        missing = []
        for result in fast_sides(corpus, model, folder, args.workers):
            note(result)
        note(megacode(corpus, model, folder, args.workers, "--exact"))
        if args.megatron_lm:
            note(
                megatron_lm(
                    corpus,
                    model,
                    folder,
                    args.workers,
                    args.megatron_lm.resolve(),
                    args.megatron_path,
                )
            )
        else:
            missing.append("Megatron-LM (no --megatron-lm)")
        try:
            import datatrove as _  # noqa: F401

            note(datatrove(corpus, model, folder, args.workers))
        except ImportError as error:
            missing.append(f"datatrove ({error})")
        lines = table(results, size, args.workers)
        if args.megatron_lm:
            lines.append(
                "Tokens beside Megatron-LM's: "
                + same_documents(folder / "round-0" / "megacode", folder / "megatron_text_document")
                + "."
            )
        lines.append(coordinator(corpus, model, folder, args.workers))
        lines += [f"Not measured: {', '.join(missing)}."] if missing else []
        lines += [
            "",
            f"{size:,.1f} MB of text. {date.today()}, {machine_line()}",
            f"    {' '.join(sys.argv)}",
        ]
        text = "\n".join(lines)
        console.print(text, markup=False)
        if args.table:
            args.table.write_text(f"# Corpus to tokens: `bench/preprocess.py`\n\n{text}\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(results: list[Result], size: float, workers: int) -> list[str]:
    ours = results[0]
    lines = [
        f"| {workers} processes | MB/s | M tokens/s | peak MB | megacode is |",
        "|---|---:|---:|---:|---:|",
    ]
    for result in results:
        memory = f"{result.memory:,.0f}" if result.memory else ""
        ratio = "" if result is ours else f"{result.seconds / ours.seconds:.2f} ×"
        rate = f"{size / result.seconds:.1f} | {result.tokens / result.seconds / 1e6:.2f}"
        lines.append(f"| {result.side} | {rate} | {memory} | {ratio} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
