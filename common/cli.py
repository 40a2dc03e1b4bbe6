"""The command line of the three commands: the configuration, its flags, one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from common.command import run_command
from common.config import (
    CalibrationConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
)
from common.errors import ExitCode

__all__ = ["DEFAULT_CONFIG", "ROOT", "SECTIONS", "Parser", "config_parser", "parse", "run_command"]

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "lenet_mnist.yaml"

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
        text = " ".join(message.split())
        print(f"error: {text} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(int(ExitCode.BAD_INPUT))


def config_parser(prog: str, description: str, aliases: Mapping[str, str]) -> Parser:
    """A parser for the whole configuration.

    Args:
        prog: Name of the command, such as ``train.py``.
        description: First line of its help.
        aliases: Short flags of this command, such as ``{"--data-dir": "data.dir"}``.
    """
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
        "--trainer", type=dict[str, Any], default={}, help="arguments of lightning.Trainer: --trainer.max_epochs 5"
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
    namespace = parser.parse_args(arguments)
    objects = parser.instantiate(namespace)
    sections = {name: getattr(objects, name) for name in SECTIONS}
    trainer = namespace.trainer
    config = Config(
        run=namespace.run,
        seed=namespace.seed,
        artifacts=namespace.artifacts,
        trainer=dict(trainer.as_dict() if isinstance(trainer, Namespace) else trainer),
        **sections,
    )
    return config, namespace
