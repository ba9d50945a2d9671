"""`megacode VERB ...` imports the module of that verb only: `megacode plan` needs no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megacode.cli.arguments import HelpFormatter, Parser
from megacode.errors import UserError
from megacode.version import __version__

# verb -> (module with add_arguments, run and EXAMPLE; one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "plan": ("megacode.cli.plan", "print the whole run as tables before it starts"),
    "preprocess": ("megacode.cli.preprocess", "tokenize text and code into indexed datasets"),
    "pairs": ("megacode.cli.pairs", "functions with candidates that compute the same, or do not"),
    "synthesize": ("megacode.cli.synthesize", "new records from served models, to train on"),
    "inspect": ("megacode.cli.inspect", "what is in a dataset, and whether it is whole"),
    "tokenizer": ("megacode.cli.tokenizer", "train a SentencePiece tokenizer"),
    "train": ("megacode.cli.train", "train a recipe, or go on with a run"),
    "sweep": ("megacode.cli.sweep", "train variants of a recipe and compare them on one page"),
    "mix": ("megacode.cli.mix", "the best mixture, from the losses of runs with several"),
    "fork": ("megacode.cli.fork", "a new run that shares another's first steps"),
    "average": ("megacode.cli.average", "the mean of a run's checkpoints, as a checkpoint"),
    "evaluate": ("megacode.cli.evaluate", "validation loss of a checkpoint, by source and domain"),
    "tasks": ("megacode.cli.tasks", "write tasks that models are scored on, from a seed"),
    "generate": ("megacode.cli.generate", "continue a prompt with a checkpoint"),
    "export": ("megacode.cli.export", "a checkpoint as a Hugging Face folder"),
    "import": ("megacode.cli.import_model", "a Hugging Face model as a checkpoint to start from"),
    "report": ("megacode.cli.report", "write a run's page of plots"),
    "trace": ("megacode.cli.trace", "which documents were in step N"),
    "doctor": ("megacode.cli.doctor", "what is installed, what is missing, and how to get it"),
}


def _parser(verb: str | None) -> Parser:
    parser = Parser(
        prog="megacode",
        description="Train code-and-language models on Megatron-Core from one recipe file.",
        epilog="example: megacode plan recipes/crystal-tiny.yaml",
    )
    parser.add_argument("--version", action="version", version=f"megacode {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module_name, help_line) in VERBS.items():
        module = importlib.import_module(module_name) if name == verb else None
        sub = verbs.add_parser(
            name,
            help=help_line,
            description=help_line[0].upper() + help_line[1:] + ".",
            epilog=getattr(module, "EXAMPLE", None),
            formatter_class=HelpFormatter,
        )
        if module:
            module.add_arguments(sub)
            sub.set_defaults(entry=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, 2 after a sentence about a mistake of the user, or the verb's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((a for a in arguments if not a.startswith("-")), None)
    verb = verb if verb in VERBS else None
    program = f"megacode {verb}" if verb else "megacode"
    try:
        args = _parser(verb).parse_args(arguments)
        return int(args.entry(args) or 0)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
