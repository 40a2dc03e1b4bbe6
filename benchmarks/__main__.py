"""``python -m benchmarks [NAME ...]``: run benchmarks, print their tables, write JSON and the page."""

from __future__ import annotations

from collections.abc import Sequence

from common.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments before anything heavy is imported."""
    from benchmarks.command import main as run

    return run(argv)


if __name__ == "__main__":
    run_command(main)
