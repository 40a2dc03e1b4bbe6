"""The long form of the fault and fuzzing tests, ``make soak``: prints what was tried; exit code 1 if any failed."""

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]


def run_pytest(folder: str, log: Path, jobs: int, **variables: str) -> bool:
    environment = {**os.environ, "SOAK_LOG": str(log), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "pytest", "-q", ROOT / "tests" / folder, "-n", str(jobs), "--dist", "loadscope"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def run_atheris(target: str, runs: int, log: Path) -> bool:
    """One target under libFuzzer; an input that breaks it lies in the folder that is printed."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-"))
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "fuzz.py"), target, str(runs)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    done = re.search(r"stat::number_of_executed_units: (\d+)", ended.stderr)
    tried = int(done[1]) if done else 0
    with open(log, "a") as stream:
        stream.write(json.dumps({"test": f"atheris {target}", "tried": {"atheris inputs": tried}}) + "\n")
    print(f"atheris {target}: {tried:,} inputs, {'passed' if ended.returncode == 0 else f'FAILED: see {folder}'}")
    if ended.returncode:
        (folder / "output").write_text(ended.stdout + ended.stderr)
    elif not any(folder.iterdir()):
        folder.rmdir()
    return ended.returncode == 0 and tried >= runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="faults of each kind for each command (default: 200)")
    parser.add_argument("--examples", type=int, default=5000, help="hypothesis inputs per target (default: 5000)")
    parser.add_argument("--runs", type=int, default=100_000, help="atheris inputs per target (default: 100000)")
    parser.add_argument("--jobs", type=int, default=2, help="test processes (default: 2)")
    options = parser.parse_args()

    began = time.monotonic()
    log = Path(tempfile.mkstemp(prefix="soak-", suffix=".jsonl")[1])
    passed = [
        run_pytest("fuzz", log, options.jobs, FUZZ_EXAMPLES=str(options.examples)),
        run_pytest("faults", log, options.jobs, SOAK_KILLS=str(options.kills)),
    ]
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Linux): the files were fuzzed with hypothesis alone")
    else:
        from targets import TARGETS

        passed += [run_atheris(target, options.runs, log) for target in TARGETS]

    totals: collections.Counter[str] = collections.Counter()
    for line in log.read_text().splitlines():
        totals.update(json.loads(line)["tried"])
    for kind, count in sorted(totals.items()):
        print(f"{count:>10,}  {kind}")
    print(
        f"{'passed' if all(passed) else 'FAILED'} in {(time.monotonic() - began) / 60:.0f} min; counts by test: {log}"
    )
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
