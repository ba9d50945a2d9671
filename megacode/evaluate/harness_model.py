"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, where that package is installed.

Its rules are those of the harness' own class for Hugging Face models, so a run and its export get
the same numbers: BOS in front of a text if the recipe says so, a text that is too long loses its
beginning, answers are greedy unless a task asks otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from rich.progress import track

from megacode.errors import UserError
from megacode.evaluate.generate import Sampling, continue_tokens
from megacode.recipe.schema import Recipe
from megacode.tokenizer.tokenizer import Tokenizer

_MOST_TOKENS = 256
"""Of an answer, where the task does not say: the harness' own number."""


class MegatronLM(TemplateLM):
    """Log-likelihoods and continuations of a Megatron-Core model in this process.

    Args:
        model: in evaluation mode.
        batch_size: texts in a forward pass.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, model: Any, batch_size: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.text = tokenizer
        self.model = model
        self.size = batch_size
        self.max_length = recipe.model.context_length or max(
            phase.sequence_length for phase in recipe.phases
        )

    @property
    def eot_token_id(self) -> int:
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.eod_id if self.text.base.bos_id is None else self.text.base.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        assert self.recipe.tokenizer is not None
        bos = self.recipe.tokenizer.bos if add_special_tokens is None else add_special_tokens
        start = [self.text.base.bos_id] if bos and self.text.base.bos_id is not None else []
        return [*start, *self.text.encode(string)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy answer) of each request."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        lengths = [len(context) + len(answer) for _, context, answer in requests]
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        groups = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        for group in track(groups, "log-likelihoods", transient=True, disable=disable_tqdm):
            windows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in group]
            logits = self._logits([window[:-1] for window in windows])
            for i, window, row in zip(group, windows, logits, strict=True):
                length = len(requests[i][2])
                expected = torch.tensor(window[-length:], device=row.device)
                scores = row[len(window) - 1 - length : len(window) - 1].log_softmax(-1)
                greedy = bool((scores.argmax(-1) == expected).all())
                found[i] = (float(scores.gather(-1, expected[:, None]).sum()), greedy)
        return found

    @torch.no_grad()
    def _logits(self, windows: Sequence[list[int]]) -> torch.Tensor:
        """float32 `[windows, longest, vocab]`; shorter windows are padded at their ends."""
        longest = max(map(len, windows))
        device = next(self.model.parameters()).device
        tokens = torch.tensor(
            [window + [0] * (longest - len(window)) for window in windows], device=device
        )
        positions = torch.arange(longest, device=device).expand_as(tokens)
        mask = torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)[None, None]
        logits = self.model(tokens, positions, mask, runtime_gather_output=True)
        return logits[..., : self.text.vocab_size].float()

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
        shown = track(requests, "answers", transient=True, disable=disable_tqdm)
        return [self._answer(*request.args) for request in shown]

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        asked = normalize_gen_kwargs(dict(asked), _MOST_TOKENS)
        stops, limit = [stop for stop in asked["until"] if stop], int(asked["max_gen_toks"])
        sampling = Sampling(
            float(asked.get("temperature") or 0.0) if asked.get("do_sample") else 0.0,
            int(asked.get("top_k") or 0),
            float(asked.get("top_p") or 1.0),
        )
        prompt = self.tok_encode(context)[-(self.max_length - limit) :]
        written: list[int] = []
        text = ""
        for token in continue_tokens(
            self.model, prompt, limit, [self.eot_token_id], sampling, self.text.vocab_size
        ):
            written.append(token)
            text = self.text.decode(written)
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop, maxsplit=1)[0]
        return text
