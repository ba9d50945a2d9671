"""Megatron-Core's datasets as its own training scripts build them, for the benchmarks that stand beside them."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PlainTokenizer:
    """The few attributes that Megatron-Core's datasets ask of a tokenizer, over a megacode one (or none, for plain ids)."""

    def __init__(self, vocab_size: int, eod: int = 2, pad: int = 0, tokenizer: Any = None) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, eod, pad
        self.special_tokens_dict: dict[str, int] = {"eod": eod}
        self.unique_identifiers = {"class": "PlainTokenizer", "vocab_size": vocab_size}
        self.tokenizer = tokenizer
        self._tokenizer = self

    def tokens_to_ids(self, tokens: Any) -> Any:
        names = [tokens] if isinstance(tokens, str) else tokens
        ids = [self.eod if name == "<eod>" else self.tokenizer.token_id(name) for name in names]
        return ids[0] if isinstance(tokens, str) else ids

    def ids_to_text(self, ids: Any, remove_special_tokens: bool = True) -> str:
        return str(
            self.tokenizer.base.decode(ids.tolist())
        )  # control tokens of the file's own decode to nothing

    def text_to_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode_batch([text])[0])


def be_one_rank() -> None:
    """What Megatron-Core's blended dataset needs before it is built: a process group of one, and quiet."""
    import torch

    if not torch.distributed.is_initialized():  # it asks for the rank
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def build_blend(
    dataset_class: Any, config_class: Any, prefixes: Sequence[Path], weights: Sequence[float], samples: int,
    sequence_length: int, cache: Path, tokenizer: PlainTokenizer, **settings: Any,
) -> Any:  # fmt: skip
    """The training split of a blend, by BlendedMegatronDatasetBuilder; its indices are written to `cache`."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    be_one_rank()
    config = config_class(
        random_seed=1234, sequence_length=sequence_length, blend=([str(p) for p in prefixes], list(weights)),
        split="1,0,0", path_to_cache=str(cache), tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, **settings,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(
        dataset_class, [samples, 0, 0], lambda: True, config
    ).build()[0]


def machine_line() -> str:
    """Processor, cores and the versions that matter, for a result's caption."""
    import numpy

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    versions = [f"Python {platform.python_version()}", f"numpy {numpy.__version__}"]
    for name in ("torch", "megatron.core"):
        try:
            versions.append(f"{name} {__import__(name, fromlist=['_']).__version__}")
        except ImportError:
            versions.append(f"no {name}")
    return f"{model}, {os.cpu_count()} cores; " + ", ".join(versions)
