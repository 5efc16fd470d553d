"""The words of a command line: our own options and the names of transformers' are checked before it is imported."""

from __future__ import annotations

import ast
import dataclasses
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_origin, get_type_hints

from weightlora.errors import MissingPackageError, OptionError
from weightlora.tasks.base import Kind
from weightlora.validation import MOST_SEED, Count, Natural, NotNegative, Positive, Seed, Share, checked

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments

_TRAINING = ("transformers", "training_args.py")
_OF_TRL = (("trl", "trainer/base_config.py"), ("trl", "trainer/sft_config.py"))
#: Where the training arguments of a kind of task are written down, as package and file.
_SOURCES: Mapping[Kind, Sequence[tuple[str, str]]] = {
    "classification": (_TRAINING,),
    "question_answering": (_TRAINING,),
    "summarisation": (_TRAINING, ("transformers", "training_args_seq2seq.py")),
    "completion": (_TRAINING, *_OF_TRL),
}
#: Training arguments of which transformers' own classes do not check the range.
_KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Count),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), Count),
    **dict.fromkeys(("max_length", "generation_max_length", "generation_num_beams"), Count),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor"), Count),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"), NotNegative),
    **dict.fromkeys(("learning_rate", "neftune_noise_alpha"), NotNegative),
    "dataloader_num_workers": Natural,
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Share),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "num_train_epochs"), Positive),
    "max_steps": Count | Literal[-1],
    **dict.fromkeys(("seed", "data_seed"), Seed),
}


class Parser(ArgumentParser):
    """Splits words as transformers' ``HfArgumentParser`` does, which takes seconds to import; pydantic reads them."""

    def __init__(self, *parts: type) -> None:
        super().__init__(allow_abbrev=False, add_help=False, argument_default=SUPPRESS)
        self._parts = parts
        for part in parts:
            hints = get_type_hints(part)
            for field in dataclasses.fields(part):
                words = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
                self.add_argument(*words, **_how(field, hints[field.name]))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise OptionError(message)

    def read(self, words: Sequence[str]) -> tuple[list[Any], list[str]]:
        """Return the dataclasses with their values, and the words that are no options of theirs.

        Raises:
            OptionError: A value is not of its option's type, or out of its range.
        """
        values, rest = self.parse_known_args(list(words))
        given = vars(values)
        made = [
            part(**{k: checked(h, given[k], k, strict=False) for k, h in get_type_hints(part).items() if k in given})
            for part in self._parts
        ]
        return made, rest


def training_names(kind: Kind) -> set[str]:
    """Return the names of a kind's training arguments, read from the source of their classes without an import.

    The set is empty where a source is not found: the classes themselves are asked later.
    """
    names: set[str] = set()
    for package, file in _SOURCES[kind]:
        spec = find_spec(package)  # of a package without a dot in its name; nothing is imported
        try:
            source = (Path(str(spec and spec.origin)).parent / file).read_text(encoding="utf-8")
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        except (OSError, SyntaxError, ValueError):
            return set()
        fields = [node.target for one in classes for node in one.body if isinstance(node, ast.AnnAssign)]
        names |= {target.id for target in fields if isinstance(target, ast.Name) and not target.id.startswith("_")}
    return names


def training_parser(arguments: type[TrainingArguments], defaults: Mapping[str, Any]) -> HfArgumentParser:
    """Return the parser of a class of training arguments; it says in one line what is wrong."""
    from transformers import HfArgumentParser

    class OneLine(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise OptionError(message)

    parser = OneLine(arguments, allow_abbrev=False, add_help=False)  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**defaults)
    return parser


def read_training(parser: HfArgumentParser, words: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the training arguments, and the words that are none of them.

    TRL trains in bf16 unless it is told otherwise; here only where an accelerator has it.

    Raises:
        MissingPackageError: A package that an argument needs is not installed.
        OptionError: An argument has a value that it cannot have.
    """
    from transformers.utils import is_torch_bf16_gpu_available

    if parser.parse_known_args(list(words))[0].use_cpu or not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    try:
        made, rest = parser.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
    except OptionError:
        raise
    except ImportError as error:
        raise MissingPackageError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever a TrainingArguments raises about its values, and the files that they name
        raise OptionError(" ".join(str(error).split())) from error
    return made, rest


def actions_of(parser: ArgumentParser) -> dict[str, Action]:
    """Return what the parser knows of each option, by its name."""
    return {action.dest: action for action in parser._actions}  # pyright: ignore[reportPrivateUsage]  # no public list


def option_name(word: str) -> str:
    """Return the option that a word of a command line names.

    Example:
        >>> option_name("--learning-rate=1e-3"), option_name("--time")
        ('learning_rate', 'time')
    """
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def check_training(arguments: TrainingArguments) -> None:
    """Raise where a training argument is out of its range.

    Raises:
        OptionError: With the value and what is allowed.
    """
    for field in dataclasses.fields(arguments):
        name, value = field.name, getattr(arguments, field.name)
        if name.endswith("_kwargs") and isinstance(value, str):
            raise OptionError(f'{name}={value!r:.80} is not allowed: give an object, such as {{"name": 1}}')
        if name == "optim_args" and value and not all("=" in part for part in value.split(",")):
            raise OptionError(f"optim_args={value!r:.80} is not allowed: give name=value, ...")
        if value is None or isinstance(value, str):  # left out; or a word that transformers gives a meaning
            continue
        if isinstance(value, (int, float)) and not abs(value) <= MOST_SEED:
            raise OptionError(f"{name}={value!r:.80} is not allowed: give a number of at most {MOST_SEED}")
        checked(_KINDS.get(name, Any), value, name)


def _how(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """How many words argparse takes for a field."""
    how = {name: value for name, value in field.metadata.items() if name in ("nargs", "const")}
    if hint is bool:
        return {**how, "nargs": "?", "const": "true"}
    return {**how, "nargs": "+"} if get_origin(hint) is list else how
