"""A Hugging Face folder as what a run begins with: what is said of it, and what is left of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from megacode.convert.importing import Found  # noqa: E402
from megacode.convert.tokenizer_files import difference  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from megacode.recipe.schema import Parallel, TokenizerSection  # noqa: E402
from megacode.run.history import initial_start  # noqa: E402
from megacode.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from megacode.tokenizer.training import train_tokenizer  # noqa: E402
from tests.convert.models import recipe_of  # noqa: E402
from tests.convert.test_kept import chat_model  # noqa: E402
from tests.processes import run_on  # noqa: E402
from tests.tokenizer.test_tokenizer import CORPUS  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return chat_model(tmp_path / "hf", True)


def imported(world: Any, folder: str, run: str, tokenizer: TokenizerSection, tensor: int) -> Any:
    """Whether the checkpoint was there in the block and loads, and what was said."""
    from megacode.convert.origin import as_checkpoint
    from megacode.megatron.checkpoint import load_checkpoint
    from megacode.megatron.model import build_model

    found, said = Found.open(Path(folder)), []
    model = found.model.model_copy(update={"pad_multiple": 96})  # the import's own is 128
    recipe = recipe_of(model, Parallel(tensor=tensor))
    loaded = load_tokenizer(tokenizer)
    chunks = build_model(recipe, found.vocab_size)
    with as_checkpoint(
        Path(folder), Path(run), recipe, loaded, world.is_main, said.append
    ) as place:
        info = load_checkpoint(place, chunks, None)
    weight = chunks[0].state_dict()["decoder.final_layernorm.weight"]
    return info["vocab_size"], place.parent.name, said, weight


def test_an_import_lasts_as_long_as_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.rand(64).to(torch.bfloat16)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert small.items() <= config.items()
    own = tmp_path / "own.model"
    train_tokenizer(CORPUS, own, vocab_size=420)
    (tmp_path / "run").mkdir()
    same = TokenizerSection(path=str(folder), added_tokens=["<a>"])
    ((rows, place, said, norm),) = run_on(1, imported, str(folder), str(tmp_path / "run"), same, 1)
    assert (
        rows == config["vocab_size"] and place == "run" and not list((tmp_path / "run").iterdir())
    )
    assert torch.equal(norm, weights["model.norm.weight"].float())
    text = "\n".join(said)
    assert (
        "1 buffer, which is no weight" in text
        and f"1 of {len(weights) - 1} tensors is BF16, now float32" in text
    )
    assert "imported as float32, for a run in fp32" in text and "WARNING" not in text
    other = TokenizerSection(path=str(own))
    results = run_on(
        2, imported, str(folder), str(tmp_path / "run"), other, 2, parallel=Parallel(tensor=2)
    )
    assert "WARNING: the recipe's tokenizer is not that of the weights" in "\n".join(results[0][2])
    assert results[1][2] == [] and not list((tmp_path / "run").iterdir())


def test_tokenizers_are_compared_by_what_they_do(folder: Path, tmp_path: Path) -> None:
    theirs = load_tokenizer(TokenizerSection(path=str(folder)))
    more = load_tokenizer(TokenizerSection(path=str(folder), added_tokens=["<a>", "<b>"]))
    assert difference(theirs, more) is None
    less = difference(more, theirs) or ""
    assert "2 control tokens are missing or have other ids (<a>, <b>)" in less
    assert "texts" not in less
    train_tokenizer(CORPUS, tmp_path / "own.model", vocab_size=420)
    own = load_tokenizer(TokenizerSection(path=str(tmp_path / "own.model")))
    assert "texts get other ids" in (difference(theirs, own) or "")


def test_a_folder_hands_on_what_it_came_with(folder: Path, tmp_path: Path) -> None:
    from megacode.convert.origin import open_origin

    recipe = recipe_of(Found.open(folder).model)
    begun = recipe.model_copy(update={"initialize_from": str(folder)})
    start = initial_start(begun, (), open_origin)
    assert start.step == 0 and start.checkpoint == folder
    assert start.facts()["imported"]["generation"]["temperature"] == 0.6
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors"):
        initial_start(begun, (), open_origin)
