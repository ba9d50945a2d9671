"""Which chat template an export has, and a chat with the run."""

from __future__ import annotations

from megacode.data.indexed import read_manifest
from megacode.data.source import matching_prefixes
from megacode.errors import UserError
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe
from megacode.tokenizer.chat import (
    ChatTemplate,
    TemplateError,
    chat_template,
    load_chat_template,
    template_beside,
)
from megacode.tokenizer.tokenizer import Tokenizer

OPTION = "--chat-template"


def template_of_export(
    recipe: Recipe, tokenizer: Tokenizer, asked: str | None, option: str = OPTION
) -> tuple[ChatTemplate | None, bool]:
    """The template, and whether it is another than the one beside the tokenizer.

    It is the one asked for, else that of the conversations that the recipe trains on, else the one
    beside the tokenizer. A base model has none.

    Args:
        asked: a built-in template's name, or a file.
        option: of the command line, that asks; for errors.

    Raises:
        UserError: there is none of that name, or `template_of_run` knows none.
    """
    if asked is not None:
        return load_chat_template(tokenizer, asked, option), True
    if (text := template_of_run(recipe, option)) is not None:
        return chat_template(tokenizer, "the template of the conversations", text), True
    return template_beside(tokenizer), False


def template_of_run(recipe: Recipe, option: str = OPTION) -> str | None:
    """Text of the template that the recipe's conversations were rendered with, by the manifests of
    the sources that it trains on answers of; None if there are none.

    Raises:
        UserError: the manifests name different templates, or a source has none.
    """
    found: dict[str | None, list[str]] = {}
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    for name, source in recipe.sources.items():
        if name not in read or getattr(source, "loss_on", None) not in ("answers", "last_answer"):
            continue
        prefixes = [prefix for path in source.paths for prefix in matching_prefixes(path)]
        texts = {(read_manifest(prefix) or {}).get("chat template") for prefix in prefixes}
        for text in texts or {None}:
            found.setdefault(text, []).append(name)
    if None in found:
        raise UserError(
            f"sources.{found[None][0]}: no manifest of it here names the chat template of its "
            f"conversations; name it with {option}"
        )
    if len(found) > 1:
        names = "; ".join(", ".join(names) for names in found.values())
        raise UserError(
            f"sources: the conversations were rendered with different chat templates ({names}); "
            f"choose one with {option}"
        )
    return next(iter(found), None)


def turn_end_of(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int | None, str | None]:
    """The token that ends the assistant's turn, and a note if it cannot be told."""
    try:
        name = template.turn_end()
    except TemplateError as error:
        return None, f"{template.origin}: the token that ends a turn cannot be told: {error}"
    return tokenizer.control_tokens.get(name), None
