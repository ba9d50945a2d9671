"""`megacode VERB ...`: each verb imports its room only when it is used, so `megacode plan` never waits for torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megacode import __version__
from megacode.errors import UserError

# verb -> (module with add_arguments, run and EXAMPLE; one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "plan": ("megacode.recipe.plan_command", "print the whole run as tables before it starts"),
    "preprocess": ("megacode.data.preprocess.command", "tokenize text and code into indexed datasets"),
    "inspect": ("megacode.data.inspect_command", "what is in a dataset, and whether it is whole"),
    "tokenizer": ("megacode.data.tokenizer_training", "train a SentencePiece tokenizer"),
    "train": ("megacode.train.command", "train a recipe, or go on with a run"),
    "fork": ("megacode.train.fork", "a new run that shares another's first steps"),
    "evaluate": ("megacode.evaluate.command", "validation loss of a checkpoint, by source and domain"),
    "generate": ("megacode.evaluate.generate", "continue a prompt with a checkpoint"),
    "export": ("megacode.convert.export_command", "a checkpoint as a Hugging Face folder"),
    "import": ("megacode.convert.import_command", "a Hugging Face model as a checkpoint to start from"),
    "report": ("megacode.report.command", "write a run's page of plots"),
    "trace": ("megacode.data.trace_command", "which documents were in step N"),
    "doctor": ("megacode.doctor", "what is installed, what is missing, and how to get it"),
}


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(sub)
            sub.set_defaults(entry=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code 0, or 2 after a sentence about what the user should change."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((a for a in arguments if not a.startswith("-")), None)
    args = _parser(verb if verb in VERBS else None).parse_args(arguments)
    try:
        return int(args.entry(args) or 0)
    except UserError as error:
        print(f"megacode {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(f"megacode {args.verb}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
