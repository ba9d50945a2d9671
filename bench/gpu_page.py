"""The results page of bench/gpu.py: a section for every run of it, the newest first, written anew after every measurement."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_cases import CASES

_COLUMNS = (
    "model", "precision", "side", "ms/step", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "time vs bare", "speed vs bf16",
)  # fmt: skip


class Page:
    """`FOLDER/gpu-DEVICE.md`. Sections that earlier runs left there stay as they are, below this run's."""

    def __init__(self, folder: Path, device: str, about: str, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{device.lower().replace(' ', '-')}.md"
        text = self.path.read_text() if self.path.exists() else ""
        self._head = f"# Training speed on one {device}\n\n{about}\n\n## {time.strftime('%Y-%m-%d %H:%M')}\n\n"
        self._head += f"{_versions()}. Command: `{command}`\n\n"
        self._earlier = "".join(f"\n## {section}" for section in ("\n" + text).split("\n## ")[1:])

    def write(self, rows: list[dict[str, Any]]) -> str:
        """The page with this run's `rows`; what of it is this run's."""
        cases = dict.fromkeys((r["case"], r["layers"]) for r in rows)
        lines = [
            *(f"- `{name}`: {CASES[name].describe(layers)}" for name, layers in cases),
            "",
            _line(_COLUMNS),
        ]
        lines += ["|---" * len(_COLUMNS) + "|", *(_line(_cells(row, rows)) for row in rows)]
        own = self._head + "\n".join(lines) + "\n"
        self.path.write_text(own + self._earlier)
        return own


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    which = (row["case"], row["precision"], row["side"])
    if "none" in row:
        return (*which, row["none"], *[""] * (len(_COLUMNS) - 4))
    seconds = {(r["case"], r["precision"], r["side"]): r["ms"] for r in rows if "ms" in r}
    bare, in_bf16 = seconds.get((*which[:2], "bare")), seconds.get((which[0], "bf16", which[2]))
    return (
        *which,
        f"{row['ms']:.0f}",
        f"{row['tokens']:,.0f}",
        f"{row['tflops']:.0f}",
        f"{row['mfu']:.1%}" if row["mfu"] else "unknown peak",
        f"{row['memory']:.1f}",
        f"{row['ms'] / bare:.3f}" if bare else "",
        f"{in_bf16 / row['ms']:.2f}" if in_bf16 else "",
    )


def _versions() -> str:
    """Of the libraries, asked in a process of its own: this one takes no memory of the device."""
    ask = (
        "import torch, importlib.metadata as m\n"
        "def v(n):\n"
        "    try: return m.version(n)\n"
        "    except m.PackageNotFoundError: return 'none'\n"
        "print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, Transformer Engine ' + v('transformer-engine')"
        " + ', megatron-core ' + v('megatron-core'))"
    )
    return subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
