"""Every command of README.md, docs/ and `--help`, run by bash as it stands there on what the quickstart makes.

The quickstart runs once, with a smaller model; its run has the steps and checkpoints of the real one. Commands see what
`tools/quickstart` installs and nothing else, whatever is installed here. A command that can be neither run nor checked fails.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megacode.cli.main import VERBS
from megacode.launch import free_port
from megacode.quickstart import __main__ as quickstart
from megacode.quickstart.teacher import make_server
from megacode.run.metrics import read_metrics
from tests.documented import PAGES, ROOT, Command, in_prose, of_help, of_page

SMALLER = {
    "layers: 4, hidden_size: 192, heads: 6, ffn_size: 512": "layers: 2, hidden_size: 32, heads: 2, ffn_size: 64",
    "context_length: 256": "context_length: 64", "sequence_length: 256": "sequence_length: 64", "batch_size: 8": "batch_size: 4",
    "micro_batch_size: 4": "micro_batch_size: 2", "samples: 64": "samples: 8",
}  # fmt: skip
SHORTER = {
    r"^( +)(steps|epochs): \d+$": r"\1steps: 4", r"samples: \d+": "samples: 4", r"(total|language): [\d.]+[kM]": r"\1: 8k",
    r"^seeds: \[1, 2, 3\]": "seeds: [1]", r"\.m: \[0, 0.25, 0.5, 0.75, 1\]": ".m: [0, 1]", r"^metrics: .*\n": "",
    "code-share/tasks": "code-share/tasks/quotes.yaml", r"\n  tasks: \[.*/ntp-plus/tasks\]": "",
}  # fmt: skip
"""Of the twins of studies: patterns and what stands in their place."""
ACTIONS = {"tokenizer": ["train"], "tasks": ["make"]}
"""Whose help has a verb's options."""
LOOKING = "evaluate", "generate", "trace"
ONLY_PLAIN = """
import sys
from importlib.machinery import PathFinder

MISSING = frozenset({missing!r})


class Plain(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)


sys.meta_path = [Plain if finder is PathFinder else finder for finder in sys.meta_path]
"""


def plain_distributions() -> set[str]:
    """Names of what `pip install megacode` brings, without extras."""
    wanted, found = [("megacode", "")], set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for one in map(Requirement, requires):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                wanted += [(normal(one.name), extra) for extra in ("", *one.extras)]
    return {name for name, _ in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_modules() -> list[str]:
    """Top-level modules that are installed here and would not be."""
    plain = {*plain_distributions(), "pip", "setuptools"}
    others = [
        module
        for module, of in metadata.packages_distributions().items()
        if not plain & {normal(name) for name in of}
    ]
    return sorted(module for module in others if not is_vendored(module))


def is_vendored(module: str) -> bool:
    """Whether a module is a copy that setuptools carries and shows to whoever imports it."""
    spec = find_spec(module)
    return (
        spec is not None
        and "_vendor" in f"{spec.origin} {list(spec.submodule_search_locations or [])}"
    )


class Place:
    """A working directory in which commands run."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder = folder
        self.looked: list[list[str]] = []
        """Commands that leave nothing for later ones, and ran before: other pages have them, too."""
        self.kept: set[Path] = set()
        self.served: list[subprocess.Popen[bytes]] = []
        self.ports = {documented: str(free_port()) for documented in ("8000", "8001")}
        path = os.pathsep.join(
            [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        python_path = os.pathsep.join([str(site), str(ROOT)])
        self.installed = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": python_path,
            "COLUMNS": "110",
            "HOME": str(folder / "home"),
        }

    def keep(self) -> None:
        """What is there now stays when `clear` takes away what commands made."""
        self.kept = {*self.folder.glob("*"), *self.folder.glob("*/*")}

    def clear(self) -> None:
        for path in (*self.folder.glob("*/*"), *self.folder.glob("*")):
            if path not in self.kept and not path.parent.is_symlink():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def on_its_ports(self, text: str) -> str:
        """A command or a synthesis file with free ports instead of the documented ones."""
        return re.sub(
            r"(--port |127\.0\.0\.1:)(800[01])\b",
            lambda found: found[1] + self.ports[found[2]],
            text,
        )

    def serve(self, line: str, **environment: str) -> None:
        """Run what a line begins in the background, until it answers; `end_served` ends it."""
        port = re.search(r"--port (\d+)", line)
        assert port and line.endswith("&"), line
        with (self.folder / f"served-{port[1]}.log").open("wb") as log:
            # `exec`: the signal is for the program, and not for a shell around it.
            self.served.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {line.rstrip('& ')}"],
                    cwd=self.folder,
                    env={**self.environment, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        until = time.monotonic() + 200
        while not answers(f"http://127.0.0.1:{port[1]}/health"):
            ended = self.served[-1].poll() is not None
            assert not ended and time.monotonic() < until, (line, Path(log.name).read_text())
            time.sleep(0.2)

    def end_served(self) -> None:
        for one in self.served:
            one.terminate()
        for one in self.served:
            one.wait(30)
        self.served.clear()

    def bash(self, line: str, code: int = 0, **environment: str) -> str:
        """Standard output and error of a command line that ends with `code`."""
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        told = f"{line} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, told
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr, told
        return done.stdout + done.stderr


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkout in which the quickstart has run."""
    folder, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(ONLY_PLAIN.format(missing=missing_modules()))
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    tiny = folder / "recipes" / "crystal-tiny.yaml"
    text = tiny.read_text()
    for usual, small in SMALLER.items():
        assert usual in text, usual
        text = text.replace(usual, small)
    tiny.write_text(text)
    chat = folder / "recipes/crystal-chat-tiny.yaml"
    for twin in (chat, *(folder / "recipes/studies").rglob("*tiny.yaml")):
        shorter = twin.read_text()
        for usual, cut in SHORTER.items():
            shorter = re.sub(usual, cut, shorter, flags=re.M)
        twin.write_text(shorter)
    sweep = folder / "recipes/sweeps/code-share-tiny.yaml"
    base = sweep.with_name("code-share-base-tiny.yaml")
    base.write_text(base.read_text().replace("steps: 120", "steps: 4"))
    text = (
        sweep.read_text().replace("[0, 0.25, 0.5, 0.75, 1]", "[0, 1]").replace("[1, 2, 3]", "[1]")
    )
    sweep.write_text(text.replace("[1, 0.75, 0.5, 0.25, 0]", "[1, 0]"))
    chat.write_text(f"{chat.read_text()}model: {{context_length: 256}}\n")
    for name in ("megacode", "tools", "slurm", "bench", "docs"):
        (folder / name).symlink_to(ROOT / name)
    made = Place(folder, site)
    for file in (folder / "recipes/synthesis").iterdir():
        file.write_text(made.on_its_ports(file.read_text()))
    out = made.bash(f"{sys.executable} -m megacode.quickstart")
    assert "starting crystal-tiny" in out and "finished: 470 steps" in out and "report.html" in out
    make_inputs(made)
    made.keep()
    return made


def make_inputs(place: Place) -> None:
    """What commands take as the reader's own: corpora, a tokenizer, recipes, a Hugging Face model, other runs."""
    folder = place.folder
    tokenizer, run = folder / "data/quickstart/tokenizer.model", folder / "runs/crystal-tiny"
    (folder / "data/crystal").mkdir()
    for name in ("tokenizer.model", "my.model", "data/crystal/tokenizer.model"):
        shutil.copy(tokenizer, folder / name)
    lines = [
        {"text": f"Document {i}: a few words, and then some more of them.", "meta": {}}
        for i in range(300)
    ]
    for i, line in enumerate(lines):
        line["meta"] = {"redpajama_set_name": ("RedPajamaGithub", "RedPajamaBook")[i % 2]}
    write_lines(folder / "corpus/a.jsonl", lines)
    roles = ("user", "assistant") * 2
    chats = [
        {"messages": [{"role": role, "content": f"{role} says {i}"} for role in roles]}
        for i in range(300)
    ]
    write_lines(folder / "chats.jsonl", chats)
    write_synthesis(folder)
    for name in (
        "my/a",
        "my/b",
        "corpus/b",
        *(f"SlimPajama-627B/train/chunk{i}/example" for i in (1, 2, 3)),
    ):
        write_compressed(folder / f"{name}.jsonl.zst", lines)
    for language in ("python", "go"):
        write_stars(folder / "starcoderdata" / language / "train.parquet")
    for repository in ("checkouts/one", "checkouts/two", "my-repository"):
        shutil.copytree(
            ROOT / "megacode/evaluate",
            folder / repository,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for ending in (".bin", ".idx"):
        shutil.copy(
            folder / f"data/quickstart/docs/train{ending}",
            folder / f"from-megatron_text_document{ending}",
        )
    short = "".join(f"  {name}: {{steps: 3}}\n" for name in ("phase1", "phase2", "phase3"))
    (folder / "my-recipe.yaml").write_text(
        f"extends: recipes/crystal-tiny.yaml\nname: mine\nphases:\n{short}"
    )
    shares = [(i / 5, 2 - i / 5, 1 + i / 5, step) for i in range(6) for step in (100, 200, 300)]
    rows = [f"{a},{1 - a},{code + 30 / step},{text},{step}" for a, code, text, step in shares]
    table = "\n".join(["share.code,share.text,loss.code,loss.text,step", *rows])
    (folder / "mixtures.csv").write_text(table + "\n")
    for share in (25, 50, 75):
        shutil.copytree(
            run, folder / f"runs/code-{share}", ignore=shutil.ignore_patterns("checkpoints")
        )
    write_llama(folder / "home/models/Llama-2-7b", tokenizer)
    (folder / "bin").mkdir()
    srun = folder / "bin/srun"  # a job of one task: what follows srun's own options
    srun.write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift 2; done\nexec "$@"\n')
    srun.chmod(0o755)


def write_synthesis(folder: Path) -> None:
    """Problems, and a synthesis that asks a teacher by rules, who is served while the tests run."""
    problems = [
        {"problem": f"What is {i} + {i}? ({i})", "solution": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
        for i in range(80)
    ]
    write_lines(folder / "problems.jsonl", problems)
    server = make_server(0, {one["problem"]: one["solution"] for one in problems})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model = f"{{model: rules, endpoints: [http://127.0.0.1:{server.server_port}/v1]}}"
    (folder / "my-tutorship.yaml").write_text(
        "name: tutorship\ninputs: [problems.jsonl]\noperator: tutorship\noutput: data/tutorship\n"
        f"models:\n  student: {model}\n  teacher: {model}\nchecks: {{near_duplicates: false}}\n"
    )


def write_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_compressed(path: Path, lines: list[dict[str, object]]) -> None:
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        zstandard.compress(
            "".join(json.dumps({**line, "of": path.parts[-2]}) + "\n" for line in lines).encode()
        )
    )


def write_stars(path: Path) -> None:
    """As StarCoderData's parquet files."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True)
    rows = 60
    table = {
        "content": [f"# file {i} of {path.parent.name}\nprint({i})\n" for i in range(rows)],
        "max_stars_repo_name": [f"me/repo{i // 5}" for i in range(rows)],
        "max_stars_repo_path": [f"src/{i}.py" for i in range(rows)], "max_stars_count": list(range(rows)),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def write_llama(folder: Path, tokenizer: Path) -> None:
    """A Llama of random weights with a SentencePiece tokenizer, as its repository has them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    hidden, ffn, vocabulary = 32, 64, 8000
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,),
        **{f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")},
        **{f"{layer}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        **{f"{layer}mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (hidden, ffn),
    }  # fmt: skip
    weights = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(tokenizer, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"})
    )


# ------------------------------------------------------------------------------------------------- what is not run here


def checked(command: Command) -> bool:
    """Whether a command is one that something else runs, or that this machine cannot: its files and options are there."""
    words = shlex.split(command.line, comments=True)
    program = next(word for word in words if word not in ("python", "python3", "sbatch"))
    if words[0] == "pip":  # CI installs from nothing
        asked = [word for word in words if word.startswith((".[", "megacode["))]
        extras = {
            normal(extra) for extra in metadata.metadata("megacode").get_all("Provides-Extra") or []
        }
        return all(set(re.findall(r"\w+", word.partition("[")[2])) <= extras for word in asked)
    if program in ("tools/quickstart", "tools/test", "tools/study-data"):  # run otherwise
        return (ROOT / program).is_file()
    if program.startswith("slurm/"):  # tests/slurm
        recipes = [word for word in words if word.startswith("recipes/")]
        return all((ROOT / one).is_file() for one in (program, *recipes))
    if program.startswith("bench/"):  # minutes to hours
        source = (ROOT / program).read_text() + (ROOT / "bench/gpu_cases.py").read_text()
        return all(f'"{word}"' in source for word in words if word.startswith("--"))
    return False


def of_everything() -> Iterator[Command]:
    for page in PAGES:
        yield from of_page(page)


def test_what_is_read_are_commands() -> None:
    """A page's fences and indented lines, continued lines, comments."""
    commands = list(of_everything())
    assert len(commands) > 45 and len({command.where.split(":")[0] for command in commands}) > 8
    slim = [command.line for command in commands if "SlimPajama" in command.line]
    assert len(slim) == 2 and all("--split-by" in line and "{value}" in line for line in slim), (
        "two lines each"
    )
    verbs = {
        command.line.split()[1] for command in commands if command.line.startswith("megacode ")
    }
    assert verbs >= set(VERBS) - {"tokenizer"}


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_prose_are_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megacode.cli.main import _parser

    for command in in_prose(page):
        words = command.line.split()
        if words[0] != "megacode":
            assert words[0] in ("jq", "torchrun", "srun", "sbatch") or checked(command), command
            continue
        assert words[1] in VERBS or words[1].startswith("-"), command
        with pytest.raises(SystemExit):
            _parser(words[1]).parse_args([*words[1:2], *ACTIONS.get(words[1], []), "--help"])
        told = capsys.readouterr().out
        missing = [
            word for word in words if word.startswith("--") and not re.search(rf"{word}\b", told)
        ]
        assert not missing, (command, missing)


def test_processes_that_cannot_be_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, told in (
        (("--pp", "0"), "at least 1"),
        (("--tp", "0"), "at least 1"),
        (("--pp", "3"), "no multiple"),
    ):
        monkeypatch.setattr(sys, "argv", ["quickstart", *given])
        assert quickstart.main() == 2
        assert told in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is run


def run_all(place: Place, commands: list[Command]) -> None:
    """In one place, in order, without what other pages' commands made."""
    place.clear()
    if any("exported" in command.line for command in commands) and "megacode export" not in str(
        commands
    ):
        place.bash("megacode export runs/crystal-tiny exported")
    try:
        for command in commands:
            run_one(place, command)
    finally:
        place.end_served()


def run_one(place: Place, command: Command) -> None:
    line = place.on_its_ports(command.line)
    words = shlex.split(line, comments=True)
    if line.startswith("kill %"):
        return place.end_served()
    if line.startswith("tools/study-data"):  # without its installation, with its extra
        line = line.replace("tools/study-data", "python -m megacode.quickstart.studies")
        needs = "" if "chat" in line else "reasoning_gym"
    else:
        programs = {
            "megacode pairs": "tree_sitter",
            "megacode synthesize": "aiohttp",
            "transformers serve": "uvicorn",
        }
        needs = programs.get(" ".join(words[:2]), "")
    if needs and not find_spec(needs):
        pytest.skip(f"{command.where}: {needs} is not installed")
    extras = {"PYTHONPATH": place.installed} if needs or "quickstart.studies" in line else {}
    if line.endswith("&"):
        place.serve(line, **extras)
    elif extras:
        place.bash(line, **extras)
    elif not re.match(r"(megacode|tools/(preprocess|convert)|srun|torchrun|jq)\b", line):
        assert checked(command), f"{command.where}: neither run nor checked: {line}"
    elif "--harness" in line:
        told = place.bash(line, code=2)
        assert "pip install 'megacode[harness]'" in told, (command, told)
    elif words not in place.looked and (words[0] != "jq" or shutil.which("jq")):
        place.bash(line)
        if words[1] in LOOKING and "runs/crystal-tiny" in words:
            place.looked.append(words)
    return None


@pytest.mark.slow
def test_the_quickstart_leaves_a_run_that_explains_itself(place: Place) -> None:
    kept = {path.name for path in (place.folder / "runs/crystal-tiny").iterdir()}
    files = {
        "recipe.yaml",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "report.html",
        "samples.txt",
    }
    assert files <= kept
    last = [
        r for r in read_metrics(place.folder / "runs/crystal-tiny") if r["kind"] == "validation"
    ][-1]
    for name in ("python", "docs"):
        manifest = json.loads((place.folder / f"data/quickstart/{name}/valid.json").read_text())
        nats = last["loss_by_source"][name] * manifest["tokens"]
        bits = nats / math.log(2) / manifest["bytes"]
        assert last["bits_per_byte_by_source"][name] == pytest.approx(bits, rel=1e-12)
    assert "nothing to do" in place.bash(f"{sys.executable} -m megacode.quickstart"), (
        "again, it goes on"
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if of_page(page)])
def test_commands_of_a_page_run(place: Place, page: str) -> None:
    run_all(place, of_page(page))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_a_help_run(place: Place, verb: str) -> None:
    text = place.bash(f"megacode {verb} {'train' if verb == 'tokenizer' else ''} --help")
    commands = of_help(verb, text)
    assert commands, f"{verb}: its help shows no example"
    run_all(place, commands)


@pytest.mark.slow
def test_the_readme_s_recipe_plans(place: Place) -> None:
    recipe = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (place.folder / "recipes/more-code.yaml").write_text(recipe)
    assert "more-code" in place.bash("megacode plan recipes/more-code.yaml")


@pytest.mark.slow
def test_the_readme_s_python_trains_evaluates_and_generates(place: Place) -> None:
    """As a script without a guard around it, and again where it goes on."""
    place.clear()
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.count("\n") <= 10
    (place.folder / "mine.py").write_text(code)
    first, again = place.bash("python mine.py"), place.bash("python mine.py")
    for told in (first, again):
        assert "{'python': (" in told and "def main(" not in told.splitlines()[-1]
    assert "step  20/" in first and "continuing from" in again and "step  20/" not in again


@pytest.mark.slow
def test_nothing_but_the_plain_installation_is_seen(place: Place) -> None:
    """What the commands above promise to whoever ran the first one only."""
    found = place.bash("python -c 'import importlib.util as u; print([n for n in (\"pytest\", \"transformers\", \"tiktoken\", "
                       "\"tokenizers\", \"torch\") if u.find_spec(n)])'")  # fmt: skip
    assert found.strip() == "['tokenizers', 'torch']"
