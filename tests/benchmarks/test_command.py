import dataclasses
import json
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.command import BENCHMARKS, PAGE, main, start
from benchmarks.page import markdown
from benchmarks.results import Benchmark, Findings, read_results
from benchmarks.setting import Setting
from common.errors import InputError
from common.files import write_json


@pytest.mark.e2e
@pytest.mark.slow
def test_a_trial_of_everything(command, tmp_path):
    before = PAGE.read_bytes()

    # Python anew: forked, this command was seen to finish its work and not to end.
    done = command("benchmarks", "--quick", "--artifacts", str(tmp_path), timeout=3000, fresh=True)

    assert "mean nothing" in done.stdout
    results = read_results(tmp_path / "bench-quick" / "bench.json")
    assert [one.name for one in results.benchmarks] == list(BENCHMARKS)
    assert results.quick
    assert "digits" in results.subject
    for benchmark in results.benchmarks:
        assert benchmark.findings.targets, benchmark.name
        for table in benchmark.findings.tables:
            assert table.entries, (benchmark.name, table.title)
            names = [entry.name for entry in table.entries]
            assert len(set(names)) == len(names), table.title
            assert table.reference is None or table.reference in names
    assert all(target.figure is not None for target in results.targets)
    assert str(tmp_path) not in markdown(results)
    assert PAGE.read_bytes() == before


@pytest.mark.e2e
def test_a_trial_of_one(command, tmp_path):
    command("benchmarks", "--quick", "accuracy", "--artifacts", str(tmp_path))
    path = tmp_path / "bench-quick" / "bench.json"
    assert [one["name"] for one in json.loads(path.read_text())["benchmarks"]] == ["accuracy"]

    shown = command("benchmarks", "--quick", "--no-run", "--artifacts", str(tmp_path))
    assert "Evaluation: accuracy over" in shown.stdout


@pytest.mark.parametrize("change", [None, "processor", "subject"])
def test_results_are_kept_beside_new_ones_of_the_same_machine_alone(tmp_path, change):
    setting = cast(Setting, SimpleNamespace(quick=True, subject="LeNet on the digits"))
    path = tmp_path / "bench.json"
    new = start(setting, path)
    assert new.benchmarks == []
    kept = Benchmark("cost", "Cost", "2026-01-02T03:04:05+00:00", 1.0, [], Findings("", []))
    last = dataclasses.replace(new, benchmarks=[kept])
    if change == "processor":
        last = dataclasses.replace(last, environment=dataclasses.replace(last.environment, processor="another"))
    if change == "subject":
        last = dataclasses.replace(last, subject="LeNet on MNIST")
    write_json(path, dataclasses.asdict(last))

    assert start(setting, path).benchmarks == ([] if change else [kept])


def test_unknown_names_and_a_page_of_a_trial_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown benchmark 'speed'"):
        main(["speed", "--artifacts", str(tmp_path)])
    with pytest.raises(InputError, match="--page goes with a full run"):
        main(["--quick", "--page", "--artifacts", str(tmp_path)])
    with pytest.raises(InputError, match="leave the names out"):
        main(["cost", "--no-run", "--artifacts", str(tmp_path)])
    with pytest.raises(InputError, match=r"bench\.json"):
        main(["--no-run", "--artifacts", str(tmp_path)])


def test_help_names_the_benchmarks(command):
    done = command("benchmarks", "--help")
    assert all(name in done.stdout for name in BENCHMARKS)
