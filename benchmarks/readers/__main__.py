"""What the runtimes' own code does with adapters as PEFT saved them, what ``check`` said, and what exports do there.

    python benchmarks/readers --vllm vllm-0.33.0-*.whl --sglang sglang-0.5.23-*.whl --tgi text-generation-inference.git
        --lorax lorax.git --llama-cpp llama.cpp/convert_lora_to_gguf.py

prints Markdown and writes benchmarks/results/readers.jsonl.gz. All runs on a CPU. A runtime that is not given, or
whose code is missing, is left out with one line; MLX and llama.cpp's inference are Python packages (``mlx-lm``,
``mlx-cpu``, ``xllamacpp``). The wheels are not installed: their files that read adapters are imported, and stand-ins
take the place of what these import and do not use.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adapters import Saved, peft_updates, relative_error, save_adapters
from transformers.utils import logging

from weightlora.errors import ServingError, WeightLoraError
from weightlora.serving import reader_of
from weightlora.serving.adapter import read_base, read_files
from weightlora.serving.check import find_problems, needed_option
from weightlora.serving.export import export

RESULTS = Path(__file__).parents[1] / "results" / "readers.jsonl.gz"
#: By runtime: its module here, and the option that says where its code is.
MODULES = {
    "vllm": ("read_vllm", "vllm"),
    "sglang": ("read_sglang", "sglang"),
    "tgi": ("read_tgi", "tgi"),
    "lorax": ("read_lorax", "lorax"),
    "llama.cpp": ("read_llama_cpp", "llama_cpp"),
    "ollama": ("read_ollama", "llama_cpp"),
    "mlx": ("read_mlx", None),
}


@dataclass(frozen=True)
class Row:
    """An adapter and a runtime."""

    adapter: str
    reader: str
    found: str
    """What the runtime did with the adapter as PEFT saved it."""
    check: bool
    """Whether ``check`` says that it is read right."""
    reasons: tuple[str, ...]
    exported: str
    """What the runtime did with the export, or why there is none."""
    everywhere: str
    """What the runtime did with the export for all of them."""

    @property
    def agrees(self) -> bool:
        """Whether check was right."""
        return self.check == (self.found == "right")


def main() -> None:
    """Run what is there, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vllm", "sglang", "tgi", "lorax", "llama-cpp"):
        parser.add_argument(f"--{name}", type=Path, help="where this runtime's code is")
    parser.add_argument("--only", help="part of the adapters' names")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    readers = dict(_prepared(arguments))
    work = Path(tempfile.mkdtemp())
    try:
        rows = [
            row
            for saved in save_adapters(work)
            if not arguments.only or arguments.only in saved.name
            for row in _rows(saved, readers, work / "export")
        ]
    finally:
        shutil.rmtree(work)
    if not arguments.only:
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        RESULTS.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(_table(rows, readers))


def _prepared(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for name, (module, option) in MODULES.items():
        place: Path | None = getattr(arguments, option) if option else None
        try:
            if option and place is None:
                raise ImportError(f"--{option.replace('_', '-')} is not given")
            reader = importlib.import_module(module)
            reader.prepare(*([place] if place else []))
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        yield name, reader


def _rows(saved: Saved, readers: dict[str, Any], output: Path) -> Iterator[Row]:
    adapter, base = read_files(saved.folder), read_base(str(saved.base), "CAUSAL_LM")
    for name, reader in readers.items():
        problems = find_problems(adapter, reader_of(name), base)
        yield Row(
            saved.name,
            name,
            _outcome(reader, saved.folder, saved, needed_option(adapter, reader_of(name))),
            not problems,
            tuple(problem.text for problem in problems),
            _exported(name, reader, saved, output),
            _exported("everywhere", reader, saved, output),
        )


def _exported(layout: str, reader: Any, saved: Saved, output: Path) -> str:
    try:
        export(saved.folder, layout, output)
    except ServingError:
        return "refused"
    except WeightLoraError as error:
        return f"no export: {error}"
    option = None
    if reader_of(layout).peft_folder:
        option = needed_option(read_files(output), reader_of(layout))
    return _outcome(reader, output, saved, option)


def _outcome(reader: Any, folder: Path, saved: Saved, option: str | None) -> str:
    """``right``, by how much it is wrong, or how it fails."""
    try:
        if reader.__name__ in ("read_llama_cpp", "read_ollama", "read_mlx"):
            error, limit = reader.error(folder, saved.folder, saved.base, option), reader.LIMIT
        else:
            wanted = peft_updates(saved.folder, saved.base)
            error, limit = relative_error(reader.read(folder, saved.base, option), wanted), 1e-5
    except Exception as error:  # a runtime's own code may raise anything, and that is the finding
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return "right" if error < limit else f"wrong by {error:.2g}"


def _table(rows: list[Row], readers: dict[str, Any]) -> str:
    lines = [f"- `{name}`: {reader.TITLE}; {reader.KIND}" for name, reader in readers.items()]
    lines += ["", f"| adapter | {' | '.join(readers)} |", f"| --- |{' --- |' * len(readers)}"]
    for adapter in dict.fromkeys(row.adapter for row in rows):
        cells = [_cell(row) for row in rows if row.adapter == adapter]
        lines.append(f"| {adapter} | {' | '.join(cells)} |")
    wrong = [row for row in rows if not row.agrees]
    lines += ["", f"{len(rows)} verdicts, {len(wrong)} of them not what the runtime did."]
    lines += [f"- {row.adapter}, {row.reader}: {row.found}; check said {row.check} {row.reasons}" for row in wrong]
    bad = [row for row in rows if row.exported not in ("right", "refused")]
    lines += [f"- export of {row.adapter} for {row.reader}: {row.exported}" for row in bad]
    bad = [row for row in rows if row.reader not in ("mlx", "ollama") and row.everywhere not in ("right", "refused")]
    lines += [f"- export of {row.adapter} for everywhere, read by {row.reader}: {row.everywhere}" for row in bad]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    found = row.found.partition(":")[0].replace("wrong by ", "×")
    return f"{found} / {'yes' if row.check else 'no'} / {row.exported.partition(':')[0].replace('wrong by ', '×')}"


if __name__ == "__main__":
    main()
