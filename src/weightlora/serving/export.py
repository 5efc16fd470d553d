"""The same adapter in the layout that a runtime reads right.

Where the runtime reads the adapter as it is, the files are copied. Otherwise the scales are multiplied into B, and
``lora_alpha`` is ``r``. As far as the runtime needs it, each adapter is padded with zeros to the largest rank, and
adapters of zeros complete the layers and the fused matrices.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from weightlora.errors import OptionError, ServingError
from weightlora.files import write_json
from weightlora.folders import require_replaceable, whole_folder
from weightlora.model.sites import Site
from weightlora.plan.plan import ADAPTER_FILES
from weightlora.serving import GGUF_FILE, READERS, Reader, padded_rank, reader_of
from weightlora.serving.adapter import (
    Adapter,
    BaseModel,
    base_name,
    is_here,
    last_name,
    matrix_name,
    missing_layers,
    read_base,
    read_files,
)
from weightlora.serving.check import Problem, find_problems, needed_option
from weightlora.serving.write import Planned, copy_beside, require_apart, stock_config, write_gguf, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_WRITER = "weightlora export"


@dataclass(frozen=True)
class _Piece:
    """A site of the exported adapter."""

    site: Site
    r: int
    """Its rank in the export."""
    factor: float
    """What B is multiplied by; 0 for an adapter of zeros that is added."""
    embedding: bool = False


def export(
    folder: str | Path,
    reader: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    converter: str | Path | None = None,
) -> Path:
    """Write the adapter in ``folder`` so that ``reader`` computes what PEFT computes, and return ``output_dir``.

    The adapter is read and written one matrix at a time. What an earlier export wrote there is replaced, and
    stays as it was if this one fails; a folder with anything else is refused.

    Args:
        folder: A directory that PEFT saved a LoRA adapter into.
        reader: ``"vllm"``, ``"sglang"``, ``"tgi"``, ``"lorax"``, ``"llama.cpp"``, ``"ollama"``, ``"mlx"``, or
            ``"everywhere"`` for the layout that all but MLX and Ollama's own conversion read.
        output_dir: The new directory, outside of ``folder``.
        base: Folder or hub name of the base model, whose configuration tells the shapes of adapters that are added.
            None takes the name in the adapter's configuration.
        converter: llama.cpp's convert_lora_to_gguf.py, which then writes ``adapter.gguf`` beside PEFT's files, for
            llama.cpp and Ollama. It runs with this Python, which needs its packages, such as gguf.

    Raises:
        OptionError: There is no such runtime, or no such converter.
        PlanError: The folder holds no LoRA adapter.
        ServingError: The runtime cannot read this adapter in any layout, such as one of DoRA; or the converter fails.
        DataError: The base model's configuration is needed and cannot be read.
        OutputError: The folder holds other files, is or contains ``folder`` or lies in it, or cannot be written.
    """
    target = _target(reader, converter)
    adapter = read_files(folder)
    require_apart(adapter.folder, Path(output_dir))
    require_replaceable(output_dir, _WRITER)
    known = base or base_name(adapter)
    layers = _base_of(adapter, known) if base or is_here(known) else BaseModel()
    problems = _problems(adapter, target, layers)
    if problems and not layers.layers and _has_holes(adapter, target):
        layers = _base_of(adapter, known)
        problems = _problems(adapter, target, layers)
    with whole_folder(output_dir, _WRITER) as draft:
        if problems:
            _write(draft, adapter, target, _pieces(adapter, target, layers.layers))
        else:
            for name in ADAPTER_FILES:
                shutil.copyfile(adapter.folder / name, draft / name)
        copy_beside(adapter.folder, draft)
        if target.weights_name:
            shutil.copyfile(draft / ADAPTER_FILES[1], draft / target.weights_name)
        if target.peft_folder:
            left = _problems(read_files(draft), target, layers)
            assert not left, f"the export itself cannot be read: {left}"
        if converter is not None:
            write_gguf(converter, draft, _named(adapter, known), adapter.config.get("task_type"))
    return Path(output_dir)


def next_step(reader: Reader, output_dir: Path, base: str, *, gguf: bool) -> str:
    """Return what to do with an export, for the screen.

    Args:
        reader: The runtime.
        output_dir: The export's folder.
        base: The base model; empty where it is not known.
        gguf: Whether a converter wrote a GGUF file there.
    """
    if reader.gguf_only and not gguf:
        return (
            f"no GGUF file was written, and {reader.name} reads nothing else: call this again with --converter "
            "llama.cpp/convert_lora_to_gguf.py (git clone --depth 1 https://github.com/ggml-org/llama.cpp)"
        )
    option = needed_option(read_files(output_dir), reader) if reader.peft_folder else None
    # Ollama looks for relative paths beside its Modelfile, LoRAX in the hub's cache.
    folder = output_dir.absolute()
    adapter = str(folder / GGUF_FILE if gguf else folder)
    return "next: " + reader.start.format(
        folder=quote(str(folder)),
        adapter=quote(adapter),
        path=adapter,
        base=quote(base or "BASE"),
        option=f" {option}" if option else "",
    )


def _problems(adapter: Adapter, reader: Reader, base: BaseModel) -> list[Problem]:
    """What the export has to mend.

    Raises:
        ServingError: Something that no layout mends.
    """
    problems = [problem for problem in find_problems(adapter, reader, base) if problem.known]
    for problem in problems:
        if not problem.mended:
            raise ServingError(f"{adapter.folder} cannot be exported for {reader.name}: {problem.text}")
    return problems


def _target(reader: str, converter: str | Path | None) -> Reader:
    """The runtime; what reads the converter's file reads what llama.cpp reads."""
    target = reader_of(reader)
    if converter is None:
        return target
    if not target.gguf:
        names = ", ".join(own.name for own in READERS if own.gguf)
        raise OptionError(f"converter makes a GGUF file, which {reader} does not read; export for one of {names}")
    return reader_of("llama.cpp") if reader == "ollama" else target


def _named(adapter: Adapter, base: str) -> str:
    if not base:
        raise ServingError(f"{adapter.folder} names no base model, whose layers are needed; give --base")
    return base


def _base_of(adapter: Adapter, base: str) -> BaseModel:
    return read_base(_named(adapter, base), adapter.config.get("task_type"))


def _has_holes(adapter: Adapter, reader: Reader) -> bool:
    """Whether adapters of zeros may have to be added."""
    return reader.every_layer or any(
        last_name(own.site.name) in g.names for g in reader.groups for own in adapter.sites
    )


def _pieces(adapter: Adapter, reader: Reader, base: Mapping[str, Site]) -> list[_Piece]:
    """The sites of the adapter, and those that ``reader`` needs in addition, sorted by name."""
    most = _most(adapter, reader)
    pieces: dict[str, _Piece] = {}
    for own in adapter.sites:
        r = most if reader.one_rank else own.r
        # The configuration's scale is most / r.
        pieces[own.site.name] = _Piece(own.site, r, own.scale * r / most, own.embedding)
    for group in reader.groups:
        for name in list(pieces):
            stem = name.removesuffix(last_name(name))
            partners = [stem + other for other in group.names if last_name(name) in group.names]
            pieces |= {
                other: _Piece(base[other], most, 0.0) for other in partners if other in base and other not in pieces
            }
    if reader.every_layer:
        holes = missing_layers([piece.site for piece in pieces.values()], base)
        pieces |= {name: _Piece(base[name], most, 0.0) for names in holes.values() for name in names}
    return [pieces[name] for name in sorted(pieces)]


def _most(adapter: Adapter, reader: Reader) -> int:
    """The export's largest rank."""
    return padded_rank(adapter.rank) if reader.padded else adapter.rank


def _write(draft: Path, adapter: Adapter, reader: Reader, pieces: Sequence[_Piece]) -> None:
    """Write configuration and weights of ``pieces``."""
    with safe_open(adapter.folder / ADAPTER_FILES[1], framework="pt") as tensors:
        if reader.peft_folder:
            most = _most(adapter, reader)
            config = stock_config(adapter.config, {piece.site.name: piece.r for piece in pieces}, most, alpha=most)
            write_json(draft / ADAPTER_FILES[0], {**config, "bias": "none"})
            planned = _planned(adapter, pieces, tensors, _peft_name, transposed=False)
            write_tensors(draft / ADAPTER_FILES[1], planned)
        else:
            write_json(draft / ADAPTER_FILES[0], _mlx_config(adapter, pieces))
            planned = _planned(adapter, pieces, tensors, _mlx_name, transposed=True)
            write_tensors(draft / "adapters.safetensors", planned)


def _planned(
    adapter: Adapter, pieces: Sequence[_Piece], tensors: Any, named: Callable[[_Piece, str], str], *, transposed: bool
) -> dict[str, Planned]:
    """A and B of each piece under their new names, to be read when it is their turn."""
    first = adapter.sites[0]
    usual = tensors.get_slice(matrix_name(first.site.name, "A", embedding=first.embedding)).get_dtype()
    planned: dict[str, Planned] = {}
    for piece in pieces:
        for matrix, factor, shape in (
            ("A", 1.0 if piece.factor else 0.0, (piece.r, piece.site.in_features)),
            ("B", piece.factor, (piece.site.out_features, piece.r)),
        ):
            source = _peft_name(piece, matrix)
            dtype = _exact(tensors.get_slice(source).get_dtype(), factor) if factor else usual
            make = partial(_padded, tensors, source, factor, shape, transposed)
            planned[named(piece, matrix)] = Planned(dtype, shape[::-1] if transposed else shape, make)
    return planned


def _peft_name(piece: _Piece, matrix: str) -> str:
    return matrix_name(piece.site.name, matrix, embedding=piece.embedding)


def _mlx_name(piece: _Piece, matrix: str) -> str:
    return f"{piece.site.name}.lora_{matrix.lower()}"


def _padded(tensors: Any, name: str, factor: float, shape: tuple[int, int], transposed: bool) -> Tensor:
    """``factor`` times a matrix of the file, with zeros up to ``shape``."""
    import torch

    if factor == 0:
        made = torch.zeros(shape)
    else:
        own: Tensor = tensors.get_tensor(name)
        made = torch.nn.functional.pad(own, (0, shape[1] - own.shape[1], 0, shape[0] - own.shape[0]))
        made = made if factor == 1 else made.float() * factor
    return made.t() if transposed else made


def _exact(dtype: str, factor: float) -> str:
    """A type of number in which the product with ``factor`` is as exact as the matrix."""
    power_of_two = math.frexp(factor)[0] == 0.5
    return dtype if factor == 1 or (power_of_two and dtype != "F16") else "F32"


def _mlx_config(adapter: Adapter, pieces: Sequence[_Piece]) -> dict[str, Any]:
    """MLX LM's configuration; ``keys`` are full names, so that no other layer gets an adapter."""
    return {
        "fine_tune_type": "lora",
        "num_layers": len({piece.site.block for piece in pieces}),
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": [piece.site.name for piece in pieces],
        },
    }
