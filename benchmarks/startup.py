"""Start-up: what a user waits for before anything happens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import in_turns, spread, timed
from common.cli import ROOT

METHOD = "Each command is started as a process of its own, in turns, and waited for; the files are in the cache."


def run(setting: Setting) -> Findings:
    """See the module."""
    table = str(setting.quantized)
    helps = {f"{name} --help": [name, "--help"] for name in ("train.py", "quantize.py", "evaluate.py")}
    tools = {
        f"python -m calib {name}": ["-m", "calib", name, *files]
        for name, files in {"show": [table], "check": [table], "diff": [table, table]}.items()
    }
    whole = {
        "quantize.py, calibrating": ["quantize.py", *setting.arguments, "--recalibrate"],
        "quantize.py, with the cached table": ["quantize.py", *setting.arguments],
    }
    rounds = setting.rounds(11)
    seconds = in_turns(
        {name: timed(_start(arguments)) for name, arguments in {**helps, **tools, **whole}.items()},
        rounds,
        dict.fromkeys(whole, setting.rounds(3)),
        warm_up=not setting.quick,
    )
    measured = {name: spread(figures) for name, figures in seconds.items()}
    tables = [
        Table("help and table tools", "s", [Entry(name, measured[name]) for name in (*helps, *tools)]),
        Table(
            "whole commands, start-up of PyTorch and reading of the data included",
            "s",
            [Entry(name, measured[name]) for name in whole],
        ),
    ]
    targets = [Target(name, "at most", 1.0, "s", measured[name].median) for name in helps]
    targets += [Target(name, "at most", 0.5, "s", measured[name].median) for name in tools]
    return Findings(METHOD, tables, targets)


def _start(arguments: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
