"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, where that package is installed.

Its rules are those of the harness' own class for Hugging Face models, so a run and its export get
the same numbers: BOS in front of a text if the recipe says so, a text that is too long loses its
beginning, answers are greedy unless a task asks otherwise.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from megacode.errors import UserError
from megacode.evaluate.generate import Sampling, continue_batch
from megacode.evaluate.likelihood import log_likelihoods
from megacode.evaluate.model import LoadedModel

_MOST_TOKENS = 256
"""Of an answer, where the task does not say: the harness' own number."""


class MegatronLM(TemplateLM):
    """Log-likelihoods and continuations of a model in any layout. Every rank has one, and is asked
    the same."""

    def __init__(self, model: LoadedModel, batch_size: int) -> None:
        super().__init__()
        self.model, self.size = model, batch_size
        self.text, self.max_length = model.tokenizer, model.context_length

    @property
    def eot_token_id(self) -> int:
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.eod_id if self.text.base.bos_id is None else self.text.base.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        bos = self.model.bos if add_special_tokens is None else add_special_tokens
        start = [self.text.base.bos_id] if bos and self.text.base.bos_id is not None else []
        return [*start, *self.text.encode(string)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy answer) of each request."""
        found = log_likelihoods(self.model, [(context, text) for _, context, text in requests])
        return [(one.log_likelihood, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, cut into windows that do not overlap."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append((None, list(context), list(continuation)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop text or end-of-document token.

        Raises:
            UserError: a task asks for so many tokens that no question fits in front of them.
        """
        for request in requests:
            limit = int(normalize_gen_kwargs(dict(request.args[1]), _MOST_TOKENS)["max_gen_toks"])
            if limit >= self.max_length:
                raise UserError(
                    f"--harness {request.task_name}: asks for answers of up to {limit:,} tokens, "
                    f"and the model's context of {self.max_length:,} has to hold the question too; "
                    "give the task a smaller max_gen_toks"
                )
        asked = [request.args[1] for request in requests]
        kinds = [json.dumps(one, default=str) for one in asked]
        wanted = sorted(range(len(asked)), key=lambda i: (kinds[i], len(requests[i].args[0])))
        texts = [""] * len(asked)
        for _, same in itertools.groupby(wanted, key=lambda i: kinds[i]):
            numbers = list(same)
            for first in range(0, len(numbers), self.size):
                part = numbers[first : first + self.size]
                answers = self._answers([requests[i].args[0] for i in part], asked[part[0]])
                for i, text in zip(part, answers, strict=True):
                    texts[i] = text
        return texts

    def _answers(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        asked = normalize_gen_kwargs(dict(asked), _MOST_TOKENS)
        stops, limit = [stop for stop in asked["until"] if stop], int(asked["max_gen_toks"])
        sampling = Sampling(
            float(asked.get("temperature") or 0.0) if asked.get("do_sample") else 0.0,
            int(asked.get("top_k") or 0),
            float(asked.get("top_p") or 1.0),
        )
        end = self.eot_token_id

        def ended(written: list[int]) -> bool:
            text = self.text.decode(written)
            return written[-1] == end or any(stop in text for stop in stops)

        prompts = [self.tok_encode(one)[-(self.max_length - limit) :] for one in contexts]
        seeds = [sampling.seed] * len(prompts)
        found = []
        for written in continue_batch(self.model, prompts, limit, sampling, seeds, ended):
            text = self.text.decode(written[:-1] if written[-1] == end else written)
            for stop in stops:
                text = text.split(stop, maxsplit=1)[0]
            found.append(text)
        return found
