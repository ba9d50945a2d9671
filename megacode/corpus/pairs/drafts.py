"""Pass 1: documents of a part -> drafts of records, with the candidates that need nothing else.

NAME.drafts has a JSON line a draft: a pair record whose candidates are not all there, and the
`generator` of its inputs. NAME.index is int64 [drafts, 4]: where the line begins, its bytes, a hash
of the group, and the language's number times two, plus one for validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from megacode.corpus import inspect
from megacode.corpus.inputs import InputFile
from megacode.corpus.pairs.corruptions import CORRUPTIONS
from megacode.corpus.pairs.functions import Function, functions_of, leaves
from megacode.corpus.pairs.languages import LANGUAGES, language_of, parse
from megacode.corpus.pairs.proof import Trial, prove
from megacode.corpus.pairs.records import EQUIVALENT, RUN, Candidate, PairRecord
from megacode.corpus.pairs.renaming import renamed
from megacode.corpus.pairs.request import PairRequest
from megacode.corpus.pairs.rewriting import rewritten
from megacode.corpus.preprocess.conditions import Condition, field_value, parse_condition
from megacode.corpus.preprocess.counts import Counts
from megacode.corpus.preprocess.finished_parts import PartFiles, input_checksums, part_file
from megacode.corpus.preprocess.quarantine import write_bad
from megacode.corpus.preprocess.splitting import CorpusPart, chunk_path, read_part
from megacode.corpus.preprocess.tokenize import in_validation
from megacode.corpus.readers import BadRecord, Item, TextDocument
from megacode.data.permute import make_key
from megacode.data.records import read_records
from megacode.files import replace_file, write_json
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer, well_formed

MOST_CHARACTERS = 20_000
_TOGETHER = 64
"""Drafts whose candidates are proven at a time."""


@dataclass(frozen=True)
class PairJob:
    """What every part needs to know. `files` from number `datasets` on are datasets' shards."""

    request: PairRequest
    files: tuple[InputFile, ...]
    datasets: int
    folder: Path


@dataclass(frozen=True)
class Draft:
    record: PairRecord
    generator: str = ""

    def line(self) -> bytes:
        return orjson.dumps({**asdict(self.record), "generator": self.generator}) + b"\n"

    @staticmethod
    def parse(line: bytes) -> Draft:
        value = orjson.loads(line)
        value["candidates"] = tuple(Candidate(**one) for one in value["candidates"])
        return Draft(generator=value.pop("generator"), record=PairRecord(**value))


def draft_worker(job: PairJob) -> Callable[[CorpusPart], Iterator[int]]:
    """The function that is returned makes the drafts of a part, and tells the bytes it has read."""
    condition = parse_condition(job.request.where) if job.request.where else None
    return lambda part: _Drafts(job, condition, part).run()


class _Drafts:
    def __init__(self, job: PairJob, condition: Condition | None, part: CorpusPart) -> None:
        self.job, self.request, self.part, self.condition = job, job.request, part, condition
        self.counts = Counts()
        self.read_bytes = self.lines = self.written = 0

    def run(self) -> Iterator[int]:
        """Write the part's files; yields the growth of bytes read."""
        job, part = self.job, self.part
        with ExitStack() as stack:
            self.files = PartFiles(job.folder, part, stack)
            quarantine = part_file(job.folder, part, "bad.jsonl")
            self.quarantine = stack.enter_context(replace_file(quarantine, durable=False))
            for ending in ("drafts", "index"):
                self.files.write(ending, b"")
            waiting: list[Draft] = []
            for number in part.files:
                for item in self._read(number):
                    self.counts.records += 1
                    waiting += self._drafts(job.files[number], item)
                    if len(waiting) >= _TOGETHER:
                        self._write(waiting)
                        waiting = []
                    yield self.read_bytes
                    self.read_bytes = 0
            self._write(waiting)
        summary = {
            "lines": self.lines,
            "groups": {},
            "checksums": self.files.checksums(),
            "inputs": input_checksums(part, job.files),
            "counts": self.counts.to_json(),
        }
        write_json(part_file(job.folder, part, "json"), summary, durable=False)
        if part.chunk is not None:
            chunk_path(job.folder, part).unlink(missing_ok=True)
            self.read_bytes = part.chunk_bytes
        yield self.read_bytes

    # -------------------------------------------------------------------------------------- reading

    def _read(self, number: int) -> Iterator[Item]:
        file = self.job.files[number]
        if number >= self.job.datasets:
            return self._read_dataset(file)
        return read_part(
            self.job.folder,
            self.part,
            file,
            self.request.text_field,
            self._on_bytes,
            columns=self.request.columns,
            on_lines=self._on_lines,
        )

    def _on_bytes(self, count: int) -> None:
        self.read_bytes += count

    def _on_lines(self, count: int) -> None:
        self.lines = count if self.part.span or self.part.chunk is not None else 0

    def _read_dataset(self, file: InputFile) -> Iterator[Item]:
        """Documents of a shard, by its tokenizer, with the path that the dataset knows."""
        prefix = file.path.with_suffix("")
        dataset = inspect.open_dataset(prefix)
        tokenizer = _tokenizer(self.request, prefix)
        origins = read_records(prefix)
        for document in range(*(self.part.span or (0, dataset.documents))):
            shard, first, count = dataset.span(document)
            ids = inspect.read_tokens(shard, first, count).tolist()
            pieces = inspect.pieces_of_text(tokenizer, ids, [False] * len(ids))
            text = "".join(piece for kind, piece, _ in pieces if kind == "text")
            path = origins.origin(document)[0] if origins else ""
            values = {self.request.path_field: path} if language_of(path) else {}
            self.read_bytes += count * shard.dtype.itemsize
            yield TextDocument(well_formed(text).encode(), document, values)

    # --------------------------------------------------------------------------------------- drafts

    def _drafts(self, file: InputFile, item: Item) -> list[Draft]:
        """Drafts of a document; what it lacks is counted."""
        if isinstance(item, BadRecord):
            (self.counts.passed_over if item.harmless else self.counts.bad)[item.reason] += 1
            write_bad(self.quarantine, file.path, item)
            return []
        request = self.request
        if self.condition and not self.condition(
            {name: field_value(file, item, name) for name in self.condition.fields}
        ):
            return self._left_out("documents not wanted (--where)")
        path = self._path(file, item)
        language = self._language(path, file, item)
        if language is None:
            return self._left_out("documents of no language that is known here (--language)")
        problem, generator = path, ""
        for name in filter(None, (request.problem_field, request.generator_field)):
            value = field_value(file, item, name)
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                reason = f"no text or number in {name!r}"
                self.counts.bad[reason] += 1
                write_bad(self.quarantine, file.path, BadRecord(reason, item.record, item.raw))
                return []
            if name == request.problem_field:
                problem = well_formed(str(value))
            elif language == "python":
                generator = well_formed(str(value))
        text = item.text
        if request.problem_field or request.generator_field:  # a document is a solution
            if parse(item.raw, LANGUAGES[language]).root_node.has_error:
                return self._left_out("documents with syntax errors")
            functions = [Function(language, "", text.strip("\n"), 0, 1)]
        else:
            functions = functions_of(text, language)
            if not functions:
                return self._left_out("documents without a function that parses")
        records = (self._record(one, path, problem, bool(generator)) for one in functions)
        return [Draft(record, generator) for record in records if record]

    def _left_out(self, reason: str) -> list[Draft]:
        self.counts.passed_over[reason] += 1
        return []

    def _path(self, file: InputFile, item: TextDocument) -> str:
        """The document's own path, or the file's name and a digest of the text."""
        path = field_value(file, item, self.request.path_field)
        if isinstance(path, str) and path:
            return well_formed(path)
        if file.form == "file" and self.part.span is None:
            return well_formed(file.path.relative_to(file.base).as_posix())
        return f"{well_formed(file.path.name)}#{blake2b(item.raw, digest_size=8).hexdigest()}"

    def _language(self, path: str, file: InputFile, item: TextDocument) -> str | None:
        given = self.request.language
        if given in LANGUAGES:
            return given
        value = field_value(file, item, given) if given else path
        if not isinstance(value, str):
            return None
        by_path = language_of(value)
        by_name = {"c++": "cpp", "golang": "go", "py": "python"}.get(value.lower(), value.lower())
        return by_path.name if by_path else by_name if by_name in LANGUAGES else None

    def _record(self, function: Function, path: str, group: str, runs: bool) -> PairRecord | None:
        request, text, language = self.request, function.text, function.language

        def key(kind: str) -> int:
            return make_key(request.seed, path, function.number, text, kind)

        lines = sum(1 for line in text.split("\n") if line.strip())
        other_names, unwanted = None, ""
        if lines < request.min_lines:
            unwanted = f"shorter than {request.min_lines} lines (--min-lines)"
        elif lines > request.max_lines:
            unwanted = f"longer than {request.max_lines} lines (--max-lines)"
        elif len(text) > MOST_CHARACTERS:
            unwanted = f"longer than {MOST_CHARACTERS:,} characters"
        elif (
            _renamed_names(text, other_names := renamed(text, language, key("renamed")), language)
            < request.min_names
        ):
            unwanted = f"with fewer than {request.min_names} names to rename (--min-names)"
        if unwanted:
            self.counts.passed_over[f"functions {unwanted}"] += 1
            return None
        found: dict[str, str | None] = {"renamed": other_names}
        if language == "python" and (runs or request.unproven):
            found["rewritten"] = rewritten(text, key("rewritten"))
        found |= {
            kind: corrupt(text, language, key(kind))
            for kind, corrupt in CORRUPTIONS.items()
            if kind in request.kinds
        }
        candidates = []
        for kind, new in found.items():
            if kind in request.kinds:
                if new is None:
                    self.counts.passed_over[f"{kind}: not possible"] += 1
                else:
                    candidates.append(Candidate(kind, kind in EQUIVALENT, new))
        id_ = f"{path}:{function.number}"
        return PairRecord(id_, group, language, function.name, text, tuple(candidates))

    def _write(self, drafts: list[Draft]) -> None:
        """Prove what can be run, and write."""
        for draft in proven(drafts, self.request.unproven, self.counts.passed_over):
            record, line = draft.record, draft.line()
            group = blake2b(record.group.encode(), digest_size=8).digest()
            validation = in_validation(record.group.encode(), self.request.validation)
            kind = 2 * list(LANGUAGES).index(record.language) + validation
            row = (self.written, len(line), int.from_bytes(group, "little", signed=True), kind)
            self.files.write("drafts", line)
            self.files.write("index", np.array(row, dtype="<i8").tobytes())
            self.written += len(line)


def proven(drafts: Sequence[Draft], unproven: bool, left_out: Counter[str]) -> list[Draft]:
    """Drafts whose candidates were run where there is a generator. Those that turn out to be of
    the wrong sort are left out. A draft whose program cannot be run loses its generator, and what
    only a proof allows unless `unproven`."""
    run = [draft for draft in drafts if draft.generator and draft.record.candidates]
    trials = [
        Trial(one.record.query, one.generator, tuple(c.text for c in one.record.candidates))
        for one in run
    ]
    verdicts = iter(prove(trials))
    found = []
    for draft in drafts:
        kept = draft.record.candidates
        if draft.generator and kept:
            verdict = next(verdicts)
            if verdict.reason:
                left_out[f"proofs: the program {verdict.reason}"] += 1
                kept = tuple(one for one in kept if unproven or one.kind != "rewritten")
                left_out["rewritten: not proven"] += len(draft.record.candidates) - len(kept)
                draft = replace(draft, generator="")  # noqa: PLW2901
            else:
                both = list(zip(kept, verdict.agrees, strict=True))
                kept = tuple(replace(c, proof=RUN) for c, agrees in both if agrees == c.equivalent)
                for candidate, agrees in both:
                    if agrees != candidate.equivalent:
                        what = "the same" if agrees else "something else"
                        left_out[f"{candidate.kind}: computes {what}"] += 1
        found.append(replace(draft, record=replace(draft.record, candidates=kept)))
    return found


def _renamed_names(text: str, other: str | None, language: str) -> int:
    """How many names are other ones."""
    if other is None:
        return 0
    both = zip(leaves(text, language), leaves(other, language), strict=False)
    return len({one.text for one, two in both if one.text != two.text})


@lru_cache(maxsize=8)
def _tokenizer(request: PairRequest, prefix: Path) -> Tokenizer:
    if request.tokenizer:
        return load_tokenizer(request.tokenizer)
    return inspect.tokenizer_of(prefix, inspect.open_dataset(prefix).manifest)
