"""What to train, as typed and frozen data.

A recipe is one YAML file; `megacode.recipe.load` reads it into the classes below. Nothing here
imports torch: a recipe can be read, checked and planned on a login node in a fraction of a second.
Every class refuses unknown keys. Checks that need one key only stand beside it; checks across keys
(heads against tensor parallel, batch against micro-batch) stand in `megacode.recipe.checks`.

Units are in the names: `steps` are optimizer updates, `tokens` are tokens, `batch_size` counts
sequences over all ranks. Counts accept `4_000`, `4k`, `1.2M`, `344.8B` and `1.4T`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, model_validator

from megacode.recipe.schema_mixture import (  # noqa: F401 - all classes are read from here
    Additive,
    Budget,
    BudgetPart,
    Competitive,
    FimLevel,
    Mixed,
    Mixture,
    MixtureDomain,
    MixtureSource,
    Online,
    Schedule,
    Weight,
)
from megacode.recipe.schema_model import (  # noqa: F401
    Model,
    Mup,
    RotaryScaling,
    TokenizerSection,
)
from megacode.recipe.schema_objective import (  # noqa: F401
    Contrastive,
    Objective,
    WeightedTokens,
)
from megacode.recipe.schema_run import (  # noqa: F401
    Checkpoints,
    Ema,
    Evaluation,
    Fusion,
    HarnessTasks,
    Logging,
    MlflowLogging,
    Optimizer,
    Overlap,
    Parallel,
    ParameterGroup,
    Precision,
    Recompute,
    WandbLogging,
)
from megacode.recipe.section import Count, CountOrZero, Fraction, Section

Packing = Literal["concatenate", "best_fit", "one_document"]
LossOn = Literal["all", "answers", "last_answer", "query", "equivalent"]
OF_PAIRS = ("query", "equivalent")
"""Values of `loss_on` that only sources of pairs have."""
SampleOrder = Literal["shuffled", "file"]


# ------------------------------------------------------------------------------------------ sources


class Source(Section):
    """One tokenized corpus: Megatron-Core IndexedDatasets (`PREFIX.bin` + `PREFIX.idx`), in the
    order given."""

    path: str | list[str] | None = None
    """Prefixes (with or without .bin), or globs of them. Relative to the recipe file."""
    domain: str = "text"
    """Label for ratios and losses: code, text, math ..."""
    tokens: Count | None = None
    """Expected size, to plan before the corpus is there. A corpus that is there is
    counted instead."""
    documents: Count | None = None
    """Expected number, to plan `packing: one_document` before the corpus is there."""
    window: Count | None = None
    """Shuffle unit in tokens; default: the sequence length of the first phase that
    reads the source."""
    validation: str | list[str] | None = None
    """Prefixes of held-out data for this source."""
    validation_samples: Count | None = None
    """Sequences of it in an evaluation, the first ones; default: `evaluation.samples`."""
    packing: Packing | None = None
    """How its documents become samples; default: the recipe's `data.packing`."""
    loss_on: LossOn = "all"
    """Which tokens have a next-token loss. Of conversations (`megacode preprocess
    --conversations`): all, those that an assistant wrote, or its last turn. Of pairs (`--pairs`):
    those of queries, or of queries and equivalent candidates."""
    order: SampleOrder = "shuffled"
    """Of its samples: another random one in each epoch, or as they are in the files."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path or [])

    @property
    def validation_paths(self) -> list[str]:
        return (
            [self.validation] if isinstance(self.validation, str) else list(self.validation or [])
        )


# -------------------------------------------------------------------------------- rates and phases


class LearningRate(Section):
    """A rate for every step of a phase, t = 0, 1, ...: `start` + (`peak` - `start`) t / warmup
    while t < warmup, then `schedule` from `peak` to `final` over `decay_steps` (default: the rest
    of the phase), then `final`.

    `wsd` holds the peak and decays over the last `wsd_decay` of `decay_steps` by `wsd_shape`;
    `inverse-sqrt` is peak x sqrt(max(warmup, 1) / t).
    """

    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"] = "cosine"
    peak: float = Field(gt=0)
    start: float = Field(default=0.0, ge=0)
    final: float = Field(default=0.0, ge=0)
    warmup: CountOrZero = 0
    """Steps."""
    decay_steps: Count | None = None
    """Steps from the end of the warm-up to `final`; may be longer than the phase
    (Crystal's phase 1)."""
    wsd_decay: Fraction = 0.1
    wsd_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """`sqrt` is 1 - sqrt(x) (Haegele et al., arXiv 2405.18392)."""


_MOST_STAIRS = 100_000


class BatchRamp(Section):
    """Batch size that grows in equal stairs of `increment` sequences from `start` to `end` over
    `over` steps."""

    start: Count
    end: Count
    increment: Count
    over: Count

    @model_validator(mode="after")
    def _stairs(self) -> BatchRamp:
        if self.end <= self.start or (self.end - self.start) % self.increment:
            raise ValueError(
                f"a batch ramp goes up from `start` to `end` in whole increments; {self.start} to "
                f"{self.end} by {self.increment} does not"
            )
        if (self.end - self.start) // self.increment > _MOST_STAIRS:
            raise ValueError(f"a batch ramp has {_MOST_STAIRS:,} stairs at most; raise `increment`")
        return self


class PhasePart(Section):
    """Where a piece begins in a schedule of `steps` steps: at its step `first`."""

    first: CountOrZero
    steps: Count

    @model_validator(mode="after")
    def _begins_inside(self) -> PhasePart:
        if self.first >= self.steps:
            raise ValueError(
                f"`first` counts from 0 and is {self.first}, in a schedule of {self.steps} steps; "
                "lower it"
            )
        return self


class Within(Section):
    """Makes a phase a piece of a longer one (`megacode fork` writes it). Schedules named here go on
    where the longer phase stands, those without a length of their own too; the others begin with
    the piece."""

    learning_rate: PhasePart | None = None
    batch_size: PhasePart | None = None
    mixture: PhasePart | None = None


class Phase(Section):
    """A stretch of steps with one mixture (whose shares may move) and one rate schedule."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    steps: Count | None = None
    tokens: Count | None = None
    """Instead of `steps`: as many whole steps as it takes to see at least this many tokens."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead of `steps`: as many whole steps as it takes to read every source of the phase (or
    `epochs_of`) this often."""
    epochs_of: str | None = None
    """The source whose epochs count."""
    budget: Budget | None = None
    """Instead of `steps` and of the mixture's ratios."""
    batch_size: Count | BatchRamp
    sequence_length: Count
    mixture: Mixture
    learning_rate: LearningRate
    fim_rate: Fraction = 0.0
    fim_level: FimLevel | None = None
    """Default: `data.fim.level`."""
    cursor: Literal["continue", "restart"] = "continue"
    optimizer_state: Literal["keep", "fresh"] = "keep"
    """`fresh` drops Adam's moments and step count at the phase's first step (weights stay)."""
    reset_at_eod: bool | None = None
    """Attention and positions reset at end-of-document; default: the recipe's
    `data.reset_at_eod`."""
    rotary_base: float | None = Field(default=None, gt=0)
    """Of this phase; default: the model's. A checkpoint is exported and evaluated with the rotary
    positions of its phase."""
    rotary_scaling: RotaryScaling | None = None
    """Of this phase; default: the model's."""
    objective: Objective | None = None
    """What is minimised; default: next-token loss."""
    checkpoint_every: Count | None = None
    """Steps of this phase between checkpoints, counted from its start; default:
    `checkpoints.every`."""
    within: Within | None = None

    @property
    def begun(self) -> int:
        """Steps of the longer phase before this piece of it; 0 for a phase of its own."""
        parts = (
            (self.within.learning_rate, self.within.batch_size, self.within.mixture)
            if self.within
            else ()
        )
        return max((part.first for part in parts if part), default=0)

    def placed(
        self, schedule: Literal["learning_rate", "batch_size", "mixture"], steps: int
    ) -> tuple[int, int]:
        """(first step, length) of one of the phase's schedules, which has `steps` unless `within`
        says otherwise."""
        part: PhasePart | None = getattr(self.within, schedule, None)
        return (part.first, part.steps) if part else (0, steps)


# --------------------------------------------------------------------------------------------- data


class FimSection(Section):
    """Fill-in-the-middle (arXiv 2207.14255): of what, with which tokens, and how often
    suffix first."""

    level: FimLevel = "context"
    """Rearrange what a sample shows of a document (Crystal), or the whole document before samples
    are cut (StarCoder)."""
    spm_rate: Fraction = 0.5
    prefix: str = "<|fim_prefix|>"
    middle: str = "<|fim_middle|>"
    suffix: str = "<|fim_suffix|>"
    pad: str = "<|fim_pad|>"


class Data(Section):
    """How samples become batches."""

    packing: Packing = "concatenate"
    """Documents end to end, cut every sequence length; whole documents in packs that fill a
    sequence (arXiv 2404.10830); or one document a sequence, padded."""
    pack_cache: str | None = None
    """Folder for the indexes of packed sources; default: beside the corpus."""
    reset_at_eod: bool = False
    mask_eod_loss: bool = False
    fim: FimSection = FimSection()
    prefetch: int = Field(default=4, ge=0)
    """Batches prepared ahead by each rank's loader thread; 0 prepares them in the loop."""


class Recipe(Section):
    """One training run, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    model_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of initial weights and dropout; default: `seed`."""
    data_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the order of samples and of fill-in-the-middle; default: `seed`."""
    tokenizer: TokenizerSection | None = None
    model: Model
    sources: dict[str, Source]
    phases: list[Phase] = Field(min_length=1)
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    fusion: Fusion = Fusion()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    initialize_from: str | None = None
    """A run, a checkpoint or a Hugging Face folder whose weights (nothing else) start this run."""
    initialize_new_rows: Literal["mean", "init"] = "mean"
    """Rows of the embedding and output layer for tokens that `initialize_from` lacks: the mean of
    its rows, or drawn as the recipe draws a new model's."""

    @property
    def resolved_model_seed(self) -> int:
        return self.seed if self.model_seed is None else self.model_seed

    @property
    def resolved_data_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def seeds(self) -> str:
        """`7`, or `1 (model), 2 (data)` where they differ."""
        model, data = self.resolved_model_seed, self.resolved_data_seed
        return str(data) if model == data else f"{model} (model), {data} (data)"

    def packing(self, source: str) -> Packing:
        """How a source's documents become samples."""
        return self.sources[source].packing or self.data.packing

    def resets(self, phase: Phase) -> bool:
        """Whether attention and positions reset at end-of-document in a phase."""
        return self.data.reset_at_eod if phase.reset_at_eod is None else phase.reset_at_eod

    def model_in(self, name: str | None) -> Model:
        """The model as a phase trains it: with its rotary positions, and with a context length.

        That is what YaRN stretches to; else the model's own, or the longest sequence: of all
        phases, but only of those so far where phases have rotary positions of their own.

        Args:
            name: of the phase; None is before the first.
        """
        phases, model = self.phases, self.model
        index = next((i for i, phase in enumerate(phases) if phase.name == name), 0)
        own = {key: getattr(phases[index], key) for key in ("rotary_base", "rotary_scaling")}
        if name is not None:
            model = model.model_copy(update={k: v for k, v in own.items() if v is not None})
        scaling, length = model.rotary_scaling, model.context_length
        if scaling and scaling.kind == "yarn":
            length = round(scaling.factor * scaling.original_length)
        elif any(phase.rotary_base or phase.rotary_scaling for phase in phases):
            length = max(phase.sequence_length for phase in phases[: index + 1])
        elif length is None:
            length = max(phase.sequence_length for phase in phases)
        return model.model_copy(update={"context_length": length})


# --------------------------------------------------------------------------- the schema's own shape


def sections_at(path: Sequence[str], root: type[Section] = Recipe) -> list[type[Section]]:
    """The sections that may stand at a path of keys; entries of lists and mappings may
    have any name."""
    kinds: list[Any] = [root]
    for key in path:
        kinds = [inner for kind in kinds for inner in _under(kind, key)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def all_keys(kind: Any = Recipe, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every dotted key that a recipe may have, sections too; NAME stands for the name
    of an entry."""
    if get_origin(kind) in (dict, list):
        for inner in _under(kind, "NAME"):
            yield from all_keys(inner, (*above, "NAME"))
    elif isinstance(kind, type) and issubclass(kind, Section):
        for name in kind.model_fields:
            yield ".".join((*above, name))
            for inner in _under(kind, name):
                yield from all_keys(inner, (*above, name))


def _under(kind: Any, key: str) -> list[Any]:
    """Types of what a type has at a key."""
    if get_origin(kind) in (dict, list):
        return _members(get_args(kind)[-1])
    if isinstance(kind, type) and issubclass(kind, Section) and key in kind.model_fields:
        return _members(kind.model_fields[key].annotation)
    return []


def _members(kind: Any) -> list[Any]:
    """The types of a union; of another type itself."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [one for member in get_args(kind) for one in _members(member)]
    return [kind]
