"""Tasks on a model: what each item scores, accuracy by task and group. Collective over all ranks.

1. `score_tasks` asks the model, whose ranks share the items.
2. `write_results` keeps every item's score, so that runs can be compared item by item.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from megacode.data.fim import make_fim
from megacode.errors import UserError
from megacode.evaluate.checking import check_answers, edit_similarity, pass_at_k
from megacode.evaluate.generate import Sampling, continuation, continue_batch
from megacode.evaluate.lecs import similarities
from megacode.evaluate.likelihood import encode_pair, log_likelihoods
from megacode.evaluate.model import LoadedModel
from megacode.evaluate.statistics import Interval, bootstrap
from megacode.evaluate.tasks import (
    Generation,
    GenerationItem,
    Lecs,
    LecsItem,
    OpenTask,
    Ranking,
    RankingItem,
    Task,
    open_tasks,
)
from megacode.files import write_text
from megacode.recipe.schema import HarnessTasks, Recipe
from megacode.sandbox import run_program

_TEXTS_AT_ONCE = 32
"""Texts that are written together."""


@dataclass(frozen=True)
class TaskResult:
    """A task's scores.

    Attributes:
        accuracy: mean of `scores`.
        groups: mean score of each group, where items have groups.
        scores: of each item, 0 to 1, in the order of the file.
        given: of each item, what the model gave: the number of a choice, the texts it wrote, or
            the scores of a pair's two candidates.
        more: further numbers by name: `answer_loss` (nats a scored token of the right choice) and
            `chance` (accuracy of a guess) of a ranking, `pass@k` of programs and answers.
        cut: items whose text lost its beginning, because it was longer than the model's context.
    """

    task: OpenTask
    accuracy: float
    groups: dict[str, float]
    scores: list[float]
    given: list[Any]
    more: dict[str, float]
    cut: int

    def interval(self, group: str | None = None) -> Interval:
        """Accuracy of all items or of a group's, with its interval over items (by cluster)."""
        numbers = [
            number
            for number, item in enumerate(self.task.items)
            if group is None or item.group == group
        ]
        scores = np.array([self.scores[number] for number in numbers])
        clusters = np.array([self.task.items[n].cluster for n in numbers])
        return bootstrap([scores], clusters, shares=True)

    def summary(self) -> dict[str, Any]:
        """As in metrics.jsonl."""
        found: dict[str, Any] = {
            "accuracy": self.accuracy,
            "items": len(self.scores),
            **self.more,
        }
        if self.groups:
            found["groups"] = self.groups
        return found | ({"cut": self.cut} if self.cut else {})


def score_tasks(model: LoadedModel, tasks: Sequence[OpenTask]) -> list[TaskResult]:
    """Results of tasks, equal on every rank. Collective."""
    found = []
    for task in tasks:
        if task.task.ranking:
            items = cast("tuple[RankingItem, ...]", task.items)
            answers = _rank(model, task.task.ranking, items)
        elif task.task.lecs:
            answers = _select(model, task.task.lecs, task)
        else:
            assert task.task.generation
            written = cast("tuple[GenerationItem, ...]", task.items)
            answers = _generate(model, task.task, task.task.generation, written)
        scores = answers.scores
        groups = _by_group(task, scores)
        found.append(TaskResult(task, _mean(scores), groups, *astuple(answers)))
    return found


@dataclass(frozen=True)
class _Answers:
    scores: list[float]
    given: list[Any]
    more: dict[str, float]
    cut: int


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_group(task: OpenTask, scores: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for item, score in zip(task.items, scores, strict=True):
        groups.setdefault(item.group, []).append(score)
    return {} if set(groups) == {""} else {name: _mean(groups[name]) for name in sorted(groups)}


@dataclass(frozen=True)
class RunTasks:
    """What a recipe's `evaluation` names: tasks, and what the harness found of its own."""

    tasks: list[OpenTask]
    harness: HarnessTasks | None = None
    found: tuple[list[str], Any] | None = None

    @classmethod
    def open(cls, recipe: Recipe) -> RunTasks | None:
        """None where the recipe names no tasks.

        Raises:
            UserError: a task cannot be read, or cannot be done in this layout or on this machine.
        """
        evaluation = recipe.evaluation
        if not evaluation.tasks and not evaluation.harness:
            return None
        tasks = open_tasks(evaluation.tasks)
        check_tasks(tasks, recipe)
        if not evaluation.harness:
            return cls(tasks)
        from megacode.evaluate.harness import find_tasks

        own = evaluation.harness
        folder = Path(own.folder) if own.folder else None
        return cls(tasks, own, find_tasks(own.tasks, folder))

    def score(self, model: LoadedModel) -> tuple[dict[str, dict[str, Any]], list[TaskResult]]:
        """(numbers by task, as in metrics.jsonl, results of the recipe's own tasks). Collective."""
        results = score_tasks(model, self.tasks)
        numbers = {result.task.task.name: result.summary() for result in results}
        if self.harness and self.found:
            from megacode.evaluate.harness import ask
            from megacode.evaluate.harness_model import MegatronLM

            own = MegatronLM(model, _TEXTS_AT_ONCE)
            answers = ask(own, *self.found, self.harness.shots, self.harness.limit, _TEXTS_AT_ONCE)
            numbers |= {f"harness.{name}": dict(values) for name, values in answers.items()}
        return numbers, results


def check_tasks(tasks: Sequence[OpenTask], recipe: Recipe | None = None) -> None:
    """UserError where a task cannot be done in the recipe's layout or on this machine."""
    for task in tasks:
        how = task.task.generation
        if how and recipe and recipe.parallel.context > 1:
            raise UserError(
                f"task {task.task.name}: writes text, and parallel.context cuts sequences over "
                "ranks; leave it out of the run, and score checkpoints with `megacode evaluate "
                "--tasks`"
            )
        if how and how.check == "run":
            run_program("")  # an error where there is no sandbox
        lecs = task.task.lecs
        if lecs and lecs.layer != "last" and recipe and recipe.parallel.pipeline > 1:
            raise UserError(
                f"task {task.task.name}: asks for a layer, and a pipeline has only the `last`; "
                "leave it out of the run, and score checkpoints with `megacode evaluate --tasks`"
            )


def _select(model: LoadedModel, how: Lecs, task: OpenTask) -> _Answers:
    items = cast("tuple[LecsItem, ...]", task.items)
    found, cut = similarities(model, how, items)
    # Equal similarities share the point.
    scores = [(right > wrong) + (right == wrong) / 2 for right, wrong in found]
    return _Answers(scores, [list(one) for one in found], {"chance": 0.5}, cut)


# ----------------------------------------------------------------------------------------- ranking


def _rank(model: LoadedModel, how: Ranking, items: Sequence[RankingItem]) -> _Answers:
    texts = [_parts(how, item, choice) for item in items for choice in item.choices]
    pairs = [encode_pair(model.tokenizer, model.bos, *text) for text in texts]
    found = log_likelihoods(model, pairs)
    values = []
    for (_, text), one in zip(texts, found, strict=True):
        per = {"token": one.tokens, "byte": len(text.encode()), "none": 1}[how.normalise]
        values.append(one.log_likelihood / max(per, 1))
    scores, given, losses, tokens, first = [], [], 0.0, 0, 0
    for item in items:
        own = values[first : first + len(item.choices)]
        best = max(own)
        # Equal likelihoods share the point: a model that cannot tell scores chance.
        scores.append((own[item.answer] == best) / max(own.count(best), 1))
        given.append(own.index(best))
        right = found[first + item.answer]
        losses, tokens = losses - right.log_likelihood, tokens + right.tokens
        first += len(item.choices)
    cut = _count_cut(model, [len(context) + len(text) - 1 for context, text in pairs])
    chance = _mean([1 / len(item.choices) for item in items])
    more = {"answer_loss": losses / max(tokens, 1), "chance": chance}
    return _Answers(scores, given, more, cut)


def _parts(how: Ranking, item: RankingItem, choice: str) -> tuple[str, str]:
    """(context, text that is scored after it)."""
    if how.score == "continuation":
        return item.prompt + choice, item.continuation
    if how.score == "label":
        return item.prompt, choice
    return "", item.prompt + choice + item.continuation


def _count_cut(model: LoadedModel, lengths: Sequence[int]) -> int:
    return sum(length > model.context_length for length in lengths)


# -------------------------------------------------------------------------------------- generation


def _generate(
    model: LoadedModel, task: Task, how: Generation, items: Sequence[GenerationItem]
) -> _Answers:
    texts, cut = write_answers(model, task.name, how, items)
    outcome: list[Any] = [None, None]
    if model.world.is_main:
        try:
            outcome = [check_answers(task, items, texts), None]
        except UserError as error:
            outcome = [None, str(error)]
    torch.distributed.broadcast_object_list(outcome, 0)
    passes, problem = outcome
    if problem:
        raise UserError(problem)
    right, count = [sum(one) for one in passes], how.samples
    more = {}
    if how.check == "exact" and not how.answer_after:
        closest = [
            edit_similarity(text, item.answer)
            for item, own in zip(items, texts, strict=True)
            for text in own
        ]
        more["edit_similarity"] = _mean(closest)
    more |= {
        f"pass@{k}": _mean([pass_at_k(count, n, k) for n in right])
        for k in how.k
        if how.samples > 1 or how.check == "run"
    }
    return _Answers([n / count for n in right], texts, more, cut)


def write_answers(
    model: LoadedModel, name: str, how: Generation, items: Sequence[GenerationItem]
) -> tuple[list[list[str]], int]:
    """(texts of each item, `samples` each; prompts that lost their beginning). Collective.

    Raises:
        UserError: no prompt fits in front of `max_tokens`.
    """
    room = model.context_length - how.max_tokens
    if room < 1:
        raise UserError(
            f"task {name}: max_tokens is {how.max_tokens:,}, and the model's context of "
            f"{model.context_length:,} tokens has to hold the prompt too; lower it"
        )
    prompts, cut = [], 0
    for item in items:
        prompt, shortened = _prompt(model, item, room)
        prompts.append(prompt or [model.tokenizer.eod_id])
        cut += shortened
    wanted = [(number, sample) for number in range(len(items)) for sample in range(how.samples)]
    wanted.sort(key=lambda one: (len(prompts[one[0]]), one))  # little is forced on longer prompts
    world = model.world
    parts = [wanted[i : i + _TEXTS_AT_ONCE] for i in range(0, len(wanted), _TEXTS_AT_ONCE)]
    own: dict[tuple[int, int], str] = {}
    for part in parts[world.data_rank :: world.data_size]:
        own |= _write(model, how, [prompts[number] for number, _ in part], part)
    every: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(every, own)
    texts = {key: text for one in every for key, text in one.items()}
    return [
        [texts[number, sample] for sample in range(how.samples)] for number in range(len(items))
    ], cut


def _prompt(model: LoadedModel, item: GenerationItem, room: int) -> tuple[list[int], bool]:
    """At most `room` tokens that the model goes on from, and whether more did not fit. A prompt
    loses its beginning, a suffix its end. Of an item with a suffix: <prefix> prompt <suffix> suffix
    <middle>."""
    start = [model.tokenizer.bos_id] if model.bos else []
    before = model.tokenizer.encode(item.prompt)
    if item.suffix is None:
        prompt = [*start, *before]
        return prompt[-room:], len(prompt) > room
    fim = make_fim(model.recipe.data.fim, model.tokenizer)
    left = max(room - len(start) - 3, 0)
    after = model.tokenizer.encode(item.suffix)
    cut = len(before) + len(after) > left
    before = before[max(len(before) - max(left - len(after), left // 2), 0) :]
    after = after[: left - len(before)]
    return [*start, fim.prefix, *before, fim.suffix, *after, fim.middle], cut


def _write(
    model: LoadedModel,
    how: Generation,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], str]:
    """(item, sample) -> text, up to a stop text or the end of the document."""
    tokenizer = model.tokenizer
    eod = tokenizer.base.eod_id

    def ended(written: list[int]) -> bool:
        if written[-1] == eod:
            return True
        return bool(how.stop) and any(stop in tokenizer.decode(written) for stop in how.stop)

    sampling = Sampling(how.temperature, how.top_k, how.top_p)
    seeds = [number * 1_000_003 + sample for number, sample in wanted]
    answers = continue_batch(model, prompts, how.max_tokens, sampling, seeds, ended)
    found = {}
    for one, prompt, written in zip(wanted, prompts, answers, strict=True):
        kept = written[:-1] if written[-1:] == [eod] else written
        text = continuation(tokenizer, prompt, kept)
        for stop in how.stop:
            text = text.split(stop, maxsplit=1)[0]
        found[one] = text
    return found


# ----------------------------------------------------------------------------------------- results


def write_results(folder: Path, results: Sequence[TaskResult]) -> None:
    """Write `folder/NAME.jsonl`, an item a line: number, group, cluster, score, what was given."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        columns = zip(result.task.items, result.scores, result.given, strict=True)
        lines = [
            json.dumps(
                {
                    "item": number,
                    "group": item.group,
                    "cluster": item.cluster,
                    "score": score,
                    "given": given,
                }
            )
            for number, (item, score, given) in enumerate(columns)
        ]
        write_text(folder / f"{result.task.task.name}.jsonl", "".join(f"{x}\n" for x in lines))
