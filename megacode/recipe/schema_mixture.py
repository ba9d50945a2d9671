"""What a phase reads: mixtures of sources and domains, schedules of their weights, budgets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from megacode.recipe.section import Count, CountOrZero, Fraction, Section, parse_count

FimLevel = Literal["context", "document"]


class Schedule(Section):
    """A number that moves during a phase.

    `linear` and `cosine` go from `start` to `end` over `over` steps (default: the phase) and stay
    there: the first of these steps has `start`, the last one `end`. `stepwise` holds each of
    `values` for an equal part of `over`, the last one to the end of the phase. A given `over` keeps
    the ramp where it is when the phase is made longer.
    """

    shape: Literal["linear", "cosine", "stepwise"]
    start: float | None = Field(default=None, ge=0)
    end: float | None = Field(default=None, ge=0)
    values: list[Annotated[float, Field(ge=0)]] | None = None
    over: Count | None = None

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if self.shape == "stepwise":
            if not self.values or self.start is not None or self.end is not None:
                raise ValueError(
                    "a stepwise schedule takes `values: [a, b, ...]` and neither `start` nor `end`"
                )
        elif self.start is None or self.end is None or self.values is not None:
            raise ValueError(f"a {self.shape} schedule takes `start` and `end`, and no `values`")
        return self


Weight = Annotated[float, Field(ge=0)] | Schedule


class MixtureSource(Section):
    """How a phase (or a domain of it) reads one source."""

    short_for: ClassVar[str | None] = "weight"

    weight: Weight | None = None
    """Share of sequences before normalisation; inside a domain the default is the source's token
    count ("natural")."""
    fim_rate: Fraction | None = None
    """Share of documents rearranged for fill-in-the-middle; default: the domain's, else
    the phase's."""
    fim_level: FimLevel | None = None
    """Default: the domain's, else the phase's, else `data.fim.level`."""
    subset: str | None = None
    """Part of the source by position, `0.0-0.1`; each subset has a cursor of its own."""
    max_epochs: float | None = Field(default=None, gt=0)
    """The plan refuses to read the source more often than this over the run so far."""
    cursor: Literal["continue", "restart"] | None = None
    """Go on where earlier phases stopped, or from the first sample; default: the phase's."""
    loss_weight: float = Field(default=1.0, ge=0)
    """What the loss of its tokens counts: a step's loss is the sum of weight x loss over the sum of
    weights. Reported losses are not weighted."""

    @property
    def subset_range(self) -> tuple[float, float]:
        if self.subset is None:
            return (0.0, 1.0)
        low, high = self.subset.split("-")
        return (float(low), float(high))

    @model_validator(mode="after")
    def _subset_is_a_range(self) -> MixtureSource:
        try:
            low, high = self.subset_range
        except ValueError:
            low, high = 1.0, 0.0
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(
                "subset: expected LOW-HIGH with 0 <= LOW < HIGH <= 1, such as 0.0-0.1, not "
                f"{self.subset!r}"
            )
        return self


def _names_are_enough(value: Any) -> Any:
    return dict.fromkeys(value) if isinstance(value, list) else value


def _nothing_is_enough(value: Any) -> Any:
    return {} if value is None else value


Mixed = Annotated[MixtureSource, BeforeValidator(_nothing_is_enough)]
"""`c4:` with nothing behind it is a source with its natural weight."""


class MixtureDomain(Section):
    """A domain's share of a phase. Without `sources`: every source of that domain, by
    natural weights."""

    short_for: ClassVar[str | None] = "ratio"

    ratio: Weight | None = None
    """Share of sequences before normalisation. Needed, except beside a `budget`."""
    sources: Annotated[dict[str, Mixed], BeforeValidator(_names_are_enough)] | None = None
    fim_rate: Fraction | None = None
    fim_level: FimLevel | None = None


Share = Annotated[float, Field(gt=0, le=1)]


class Online(Section):
    """Shares of a phase's domains (or sources, where it has no domains) in blocks of steps, decided
    while training. The mixture's own weights are the shares of the first block."""

    short_for: ClassVar[str | None] = "algorithm"

    algorithm: Literal["odm", "fixed"] = "odm"
    """Online Data Mixing (arXiv 2312.02406), which raises shares of high loss; or the blocks of
    `shares`, the last of which holds to the phase's end."""
    every: Count = 10
    """Steps of a block."""
    warmup: CountOrZero = 0
    """Steps of the phase that keep its own weights, and whose losses do not count."""
    decay: float = Field(default=0.9, gt=0, le=1)
    """Part of a reward estimate that stays at each block: 0.9 is the paper's moving average, 1
    EXP3's sum."""
    shares: dict[str, list[Share]] | None = None
    """By domain (or source), of each block that is known. A run records them; `megacode plan RUN
    --fixed-mixture` writes them."""


class Mixture(Section):
    """Either `sources` with weights, or `domains` with ratios and weights inside."""

    weight_by: Literal["sequences", "tokens"] = "sequences"
    """Of what the shares are: sequences, or tokens that are trained on."""
    over_epochs: Literal["error", "clip"] = "error"
    """Where a source would be read more often than its `max_epochs`: refuse, or read it that often
    and give what is left to the other sources by their weights. The shares of a clipped phase
    depend on its length, so that it cannot be made longer in a run that has begun."""
    sources: dict[str, Mixed] | None = None
    domains: dict[str, MixtureDomain] | None = None
    online: Online | None = None
    """Shares that are decided while training, from the losses."""

    @property
    def group_weights(self) -> dict[str, Any]:
        """Ratios of the domains, or weights of the sources."""
        if self.domains:
            return {name: part.ratio for name, part in self.domains.items()}
        return {name: entry.weight for name, entry in (self.sources or {}).items()}

    @model_validator(mode="after")
    def _one_of_two(self) -> Mixture:
        if bool(self.sources) == bool(self.domains):
            raise ValueError(
                "a mixture has either `sources` (name: weight) or `domains` (name: ratio)"
            )
        return self


Tokens = Annotated[float, BeforeValidator(parse_count), Field(ge=0)]


class BudgetPart(Section):
    """Tokens (or a weight) of several domains together, and how they share them."""

    weight: Tokens
    split: dict[str, Tokens]


class Competitive(Section):
    """The total is fixed, and code takes tokens from language (Petty et al., arXiv 2409.04556)."""

    total: Count
    m: Fraction
    """Share of the total that `of` has."""
    of: str
    """Domain (or source) of the mixture. The others share the rest by their ratios."""


class Additive(Section):
    """Language is fixed, and code comes on top: the total is `language` / (1 - `m`)."""

    language: Count
    """Tokens of all others together, which share them by their ratios."""
    m: float = Field(ge=0, lt=1)
    """Share of the total that `of` has."""
    of: str
    """Domain (or source) of the mixture."""


class Budget(Section):
    """Tokens of everything in a phase's mixture; they decide its ratios and the phase's `tokens`.
    Exactly one of `split`, `competitive` and `additive`. Loading replaces it by what it comes to.
    """

    total: Count | None = None
    """With `split`, whose numbers are weights then; default: their sum, in tokens."""
    split: dict[str, Tokens | BudgetPart] | None = None
    """Tokens of each domain (or source) of the mixture; some may share theirs:
    `{general: 48.3B, rest: {weight: 14.7B, split: {math: 7, problems: 3}}}`."""
    competitive: Competitive | None = None
    additive: Additive | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Budget:
        if sum(form is not None for form in (self.split, self.competitive, self.additive)) != 1:
            raise ValueError("a budget has exactly one of `split`, `competitive` and `additive`")
        if self.total is not None and self.split is None:
            raise ValueError("`total` goes with `split`; a competitive budget has its own")
        return self
