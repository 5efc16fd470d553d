"""``weightlora check``: whether a runtime reads an adapter right, and why not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command

if TYPE_CHECKING:
    from weightlora.serving import Reader
    from weightlora.serving.adapter import Adapter
    from weightlora.serving.check import Problem


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        run,
        help="whether vLLM, SGLang, llama.cpp and others read an adapter right",
        description=(
            "Print whether a runtime computes with an adapter what PEFT computes, and each reason why not. Only the "
            "adapter's files are read, and the configuration of its base model where that is a folder. Exit code 0: "
            "it does; 1: it does not, or this is not known; 2: a mistake."
        ),
        examples=["weightlora check runs/sums/adapter --for all"],
    )
    parser.add_argument("adapter", type=Path, help="a LoRA adapter's folder, as PEFT saves it, or a run's")
    parser.add_argument("--for", dest="reader", required=True, help="a runtime such as vllm or sglang, or all")
    parser.add_argument("--base", help="folder or hub name of the base model; default: the one that the adapter names")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts; return 1 where one of them is no."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.runs.files import adapter_in
    from weightlora.serving import READERS, reader_of
    from weightlora.serving.adapter import read_files
    from weightlora.serving.check import base_at, find_problems

    readers = READERS if arguments.reader == "all" else (reader_of(arguments.reader),)
    adapter = read_files(adapter_in(arguments.adapter))
    with quiet_libraries():
        base = base_at(adapter, arguments.base)
    console, right = PlainConsole(), True
    for reader in readers:
        found = find_problems(adapter, reader, base)
        right = right and not found
        console.print(f"{reader.name:<11} {_verdict(adapter, reader, found)}", highlight=False, soft_wrap=True)
        for problem in found:
            console.print(f"{'':<11} - {problem.text}", highlight=False, soft_wrap=True)
        if any(problem.mended for problem in found) and all(problem.mended or not problem.known for problem in found):
            console.print(f"{'':<11} {_way_out(arguments.adapter, reader)}", highlight=False, soft_wrap=True)
    return 0 if right else 1


def _verdict(adapter: Adapter, reader: Reader, found: Sequence[Problem]) -> str:
    from weightlora.serving.check import most_gpus, needed_option

    if found:
        return "no" if any(problem.known for problem in found) else "not known"
    option, gpus = needed_option(adapter, reader), most_gpus(adapter, reader)
    needs = [f"with {option}"] if option else []
    needs += [f"on at most {gpus} GPU{'s' if gpus > 1 else ''}"] if gpus else []
    return ", ".join(["yes", *needs])


def _way_out(adapter: Path, reader: Reader) -> str:
    return f"to mend it: weightlora export {adapter} --for {reader.name} --output_dir {adapter.name}-{reader.name}"
