"""The command line of the three commands: the configuration, its flags, one-line errors."""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn, get_args, get_type_hints

from common.command import fail, missing, run_command

try:
    import yaml
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
except ModuleNotFoundError as error:
    # Too early for run_command, which the commands import from here.
    raise SystemExit(fail(missing(error))) from error

from common.config import (
    CalibrationConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PlainValue,
    QuantizationConfig,
)
from common.console import printable
from common.errors import ExitCode, InputError
from common.files import read_text

__all__ = ["DEFAULT_CONFIG", "ROOT", "SECTIONS", "Parser", "config_parser", "parse", "run_command"]

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "lenet_mnist.yaml"

MAX_CONFIG_BYTES = 256 * 1024
_DEEPEST = 50
_MOST_VALUES = 100_000
_LARGEST_INT = 2**31 - 1
_LONGEST_ERROR = 400

SECTIONS: Mapping[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "calibration": CalibrationConfig,
    "quantization": QuantizationConfig,
    "engine": EngineConfig,
    "evaluation": EvaluationConfig,
}


class Parser(ArgumentParser):
    """jsonargparse's parser, with an error that is one line and exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaced: dict[str, str] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse quotes the whole of a file that is not a configuration.
        text = shorten(printable(message), _LONGEST_ERROR, placeholder=" ...")
        print(f"error: {text} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(int(ExitCode.BAD_INPUT))


def config_parser(prog: str, description: str, aliases: Mapping[str, str]) -> Parser:
    """A parser for the whole configuration.

    Args:
        prog: Name of the command, such as ``train.py``.
        description: First line of its help.
        aliases: Short flags of this command, such as ``{"--data-dir": "data.dir"}``.
    """
    # Else jsonargparse takes a model of class_path and init_args alone for a class to put in the place of ModelConfig.
    set_parsing_settings(subclasses_enabled=[ModelConfig])
    parser = Parser(prog=prog, description=description, default_env=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help=f"the run's YAML file (default: configs/{DEFAULT_CONFIG.name})"
    )
    parser.add_argument(
        "--run", type=str, default="lenet_mnist", help="name of the run: results go to <artifacts>/<run>/"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of every random choice")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of all runs")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    parser.add_argument(
        "--trainer",
        type=dict[str, PlainValue],
        default={},
        help="arguments of lightning.Trainer: --trainer.max_epochs 5",
    )
    for flag, destination in aliases.items():
        _add_alias(parser, flag, destination)
    return parser


def _add_alias(parser: Parser, flag: str, destination: str) -> None:
    """Give an existing option a second, shorter flag (argparse has no public way to do it afterwards)."""
    action = next(action for action in parser._actions if action.dest == destination)
    if flag.removeprefix("--") in SECTIONS:
        # jsonargparse resolves a section by this very flag; it is replaced on the command line instead (parse).
        parser.replaced[flag] = f"--{destination}"
        section = parser._option_string_actions[flag]
        section.help, section.metavar = f"short for --{destination}", destination.rpartition(".")[2].upper()
        return
    action.option_strings = [*action.option_strings, flag]
    parser._option_string_actions[flag] = action


def _replace(parser: Parser, argument: str) -> str:
    """``--engine`` or ``--engine=X`` as ``--engine.name`` or ``--engine.name=X``."""
    flag, equals, value = argument.partition("=")
    return parser.replaced.get(flag, flag) + equals + value


def parse(parser: Parser, argv: Sequence[str] | None) -> tuple[Config, Namespace]:
    """Parse ``argv`` over the run's YAML file into a :class:`Config`, and give the raw namespace for other flags.

    Raises:
        InputError: a value is out of range.
        SystemExit: with 2 for a wrong option, a wrong type or an unreadable configuration; with 0 for ``--help``.
    """
    arguments = [_replace(parser, item) for item in (sys.argv[1:] if argv is None else argv)]
    if not any(item == "--config" or item.startswith("--config=") for item in arguments):
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if name == "--config" or name.startswith("--config="):
            check_config_file(value if name == "--config" else name.removeprefix("--config="))
    try:
        namespace = parser.parse_args(arguments)
    except (SystemExit, InputError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever YAML and jsonargparse let through comes from the user's values
        parser.error(f"the configuration cannot be read: {type(error).__name__}: {error}")
    for action in parser._actions:
        if action.dest in namespace and action.default is not None and namespace[action.dest] is None:
            raise InputError(f"{action.dest} must not be empty")
    sections = {name: _section(parser, kind, name, getattr(namespace, name)) for name, kind in SECTIONS.items()}
    config = Config(
        run=namespace.run,
        seed=namespace.seed,
        artifacts=namespace.artifacts,
        trainer=_plain(namespace.trainer),
        **sections,
    )
    return config, namespace


def _section(parser: Parser, kind: type, name: str, value: Any) -> Any:
    """The dataclass of one section. jsonargparse has checked the types; it would also call what a value names."""
    values = _plain(value)
    if not isinstance(values, dict):
        parser.error(f"{name} must be a mapping of options, not {reprlib.repr(values)}")
    kinds = get_type_hints(kind)
    for key, item in values.items():
        if item is None and type(None) not in get_args(kinds[key]):
            raise InputError(f"{name}.{key} must not be empty")
        numbers = item if isinstance(item, list) else [item]
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{name}.{key} must be a finite number, not {number}")
            if isinstance(number, int) and abs(number) > _LARGEST_INT:
                raise InputError(f"{name}.{key} must be between -{_LARGEST_INT} and {_LARGEST_INT}")
    return kind(**values)


def _plain(value: Any) -> Any:
    """The namespaces of jsonargparse, however deep, as dictionaries."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def check_config_file(name: str) -> None:
    """Refuse a configuration file that would be hard to digest, before it is digested.

    Aliases make a YAML file a graph; a dozen lines can stand for millions of values ("billion laughs"), which only
    show when something walks over them.

    Raises:
        InputError: not readable, not UTF-8, not a YAML mapping, too large, too many values, or nested too deeply.
    """
    if not os.path.exists(name):
        return  # text in place of a file, or a missing file: jsonargparse tells them apart
    text = read_text(Path(name), MAX_CONFIG_BYTES)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _count(root, 0, {})
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{name}{line} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not YAML: {str(error).splitlines()[0]}") from error
    except (RecursionError, OverflowError):
        raise InputError(f"{name} is nested too deeply, or its aliases stand for too many values") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{name} is not a configuration: it must be a YAML mapping of options")


def _count(node: yaml.Node | None, depth: int, known: dict[int, int]) -> int:
    """Number of values that a node stands for with its aliases expanded. Raises OverflowError for absurd ones."""
    if depth > _DEEPEST:
        raise OverflowError
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        items = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(item, depth + 1, known) for item in items)
    if known[id(node)] > _MOST_VALUES:
        raise OverflowError
    return known[id(node)]
