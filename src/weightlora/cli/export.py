"""``weightlora export``: an adapter in the layout that a runtime reads right."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from weightlora.cli._help import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        run,
        help="write an adapter in the layout that a runtime reads right",
        description=(
            "Write an adapter so that a runtime computes with it what PEFT computes: padded to one rank, the scales "
            "multiplied into B, and missing layers filled with zeros, as far as this runtime needs it."
        ),
        examples=["weightlora export runs/sums/adapter --for sglang --output_dir served"],
    )
    parser.add_argument("adapter", type=Path, help="a LoRA adapter's folder, as PEFT saves it, or a run's")
    parser.add_argument("--for", dest="reader", required=True, help="a runtime such as vllm or sglang, or everywhere")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the new directory; an earlier export in it is replaced"
    )
    parser.add_argument("--base", help="folder or hub name of the base model; default: the one that the adapter names")
    parser.add_argument(
        "--converter",
        type=Path,
        help="llama.cpp's convert_lora_to_gguf.py, to write adapter.gguf, too, for llama.cpp and ollama",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the directory, and say where it is, how long that took and what comes next."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.runs.files import adapter_in
    from weightlora.serving import reader_of
    from weightlora.serving.adapter import base_name, read_files
    from weightlora.serving.export import export, next_step

    start, folder = time.perf_counter(), adapter_in(arguments.adapter)
    with quiet_libraries():
        output = export(
            folder, arguments.reader, arguments.output_dir, base=arguments.base, converter=arguments.converter
        )
    seconds = time.perf_counter() - start
    reader, base = reader_of(arguments.reader), arguments.base or base_name(read_files(folder))
    console = PlainConsole()
    for line in (
        f"wrote {output} for {reader.title} ({seconds:.1f} s)",
        next_step(reader, output, base, gguf=arguments.converter is not None),
    ):
        console.print(line, highlight=False, soft_wrap=True)
