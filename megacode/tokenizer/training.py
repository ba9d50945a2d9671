"""A SentencePiece BPE model from documents; the tokenizer of bytes, which needs none.

Settings for code and text alike: nothing is normalised, so decode(encode(text)) is the text with
its newlines, tabs and runs of blanks; every byte has a piece, so nothing is unknown; digits stand
alone; no blank is put in front of a document, so that a piece cut out of the middle
(fill-in-the-middle) survives encoding and decoding."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megacode.errors import UserError
from megacode.files import replace_file
from megacode.tokenizer.tokenizer import well_formed

# SentencePiece writes these itself (space, unknown, end of piece); its trainer drops a document
# that holds one.
_RESERVED = str.maketrans({"\u2581": " ", "\u2585": " ", "\0": " "})


def train_tokenizer(
    documents: Iterable[str], path: Path, vocab_size: int = 8000, character_coverage: float = 0.9995
) -> None:
    """Train on `documents` and write the .model to `path`. Equal documents give an equal file.

    `character_coverage` is the share of characters (by count) that get a piece of their own; the
    rest are bytes. Holds the documents in memory: sample a large corpus first (`sample`)."""
    import sentencepiece

    model = io.BytesIO()
    texts = (well_formed(text).translate(_RESERVED) for text in documents if text)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,
            num_threads=2,  # written into the file, so fixed
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error).strip() or "no documents").splitlines()[-1].rpartition("] ")[2]
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces: {reason} "
            "Give more text or fewer pieces."
        ) from None
    with replace_file(path) as file:
        file.write(model.getvalue())


def write_byte_tokenizer(path: Path) -> None:
    """Write a tokenizer.json whose tokens are the 256 bytes and `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    with replace_file(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def sample(documents: Iterable[str], share: float) -> Iterator[str]:
    """About `share` (0 to 1) of the documents, chosen by a hash of each: the same in any order."""
    limit = int(share * 2**64)
    for text in documents:
        data = text.encode(errors="surrogatepass")
        key = hashlib.blake2b(data, digest_size=8, person=b"tokenizer").digest()
        if int.from_bytes(key, "little") < limit:
            yield text
