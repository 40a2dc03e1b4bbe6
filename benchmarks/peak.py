"""``python -S benchmarks/peak.py FILE COMMAND ...``: run a command; write its seconds and peak memory (MiB) to FILE.

A process starts with the peak of the one that started it (getrusage(2)), so that this one is small: it imports
nothing of the project, and is run as a file.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(target: str, command: list[str]) -> int:
    """Run ``command`` with this process's streams; its exit code."""
    begin = time.perf_counter()
    _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
    seconds = time.perf_counter() - begin
    unit = 2**10 if sys.platform.startswith("linux") else 1  # Linux counts in KiB, macOS in bytes
    with open(target, "w", encoding="ascii") as stream:
        json.dump({"seconds": seconds, "peak": usage.ru_maxrss * unit / 2**20}, stream)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
