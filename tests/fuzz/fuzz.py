"""Coverage-guided fuzzing of what reads files, with atheris: ``python tests/fuzz/fuzz.py TARGET RUNS``."""

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

# Ours and what reads for us in Python; PyTorch itself is not instrumented.
INSTRUMENTED = ["calib", "common", "data.idx", "models", "evaluation.results", "zipfile", "gzip"]

with atheris.instrument_imports(include=INSTRUMENTED):
    import targets


def main() -> None:
    name, runs = sys.argv[1:3]
    corpus = targets.folder() / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(targets.seeds()[name])
    limits = ["-max_len=65536", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    options = [f"-runs={runs}", *limits, str(corpus)]
    # Whatever is raised but InputError ends the process with an error.
    atheris.Setup([sys.argv[0], *options], lambda content: targets.accepts(name, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
