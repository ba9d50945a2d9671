"""What was asked of models and what it took: requests, tokens, dollars."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megacode.synthesize.journal import Usage
from megacode.synthesize.schema import Price


@dataclass(frozen=True)
class Spent:
    """Tokens, and dollars by the price of the synthesis file."""

    prompt: int
    completion: int
    money: float


@dataclass(frozen=True)
class Totals:
    """Of a role, since the start. Nothing but `in_flight` goes down.

    Attributes:
        sent: requests, with those that were tried again.
        replies: answers of this run.
        hits: replies from the journal.
        estimated: replies whose tokens no server counted.
        seconds: of this run's replies, summed.
        retries: requests to be sent again, by the reason.
        everything: this run and the replies from the journal.
    """

    sent: int
    replies: int
    hits: int
    refusals: int
    estimated: int
    seconds: float
    retries: dict[str, int]
    in_flight: int
    this_run: Spent
    everything: Spent


@dataclass
class Tally:
    """What `Totals` is made of."""

    sent: int = 0
    replies: int = 0
    hits: int = 0
    refusals: int = 0
    estimated: int = 0
    seconds: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    new: list[int] = field(default_factory=lambda: [0, 0])
    kept: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, usage: Usage, tokens: list[int]) -> None:
        tokens[0] += usage.prompt
        tokens[1] += usage.completion
        self.estimated += usage.estimated

    def totals(self, price: Price) -> Totals:
        def spent(prompt: int, completion: int) -> Spent:
            money = (prompt * price.input + completion * price.output) / 1e6
            return Spent(prompt, completion, money)

        return Totals(
            self.sent,
            self.replies,
            self.hits,
            self.refusals,
            self.estimated,
            self.seconds,
            dict(self.retries),
            self.in_flight,
            spent(self.new[0], self.new[1]),
            spent(self.new[0] + self.kept[0], self.new[1] + self.kept[1]),
        )
