"""The table of networks: what becomes of a network, and that a run goes on where it was cut off."""

import json
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.matrix import SMALL, append, page, read, run_one, setting, table
from benchmarks.one_network import NetworkRow, examine
from common.errors import InputError

DONE = NetworkRow(
    "torchvision:a", 64, 1.0, "torch.fx", 0.5, 100.0, 96.0, ["x (Conv)"], 20.0, 90.0, 97.0, 100.0, 99.0, {"export": 1}
)


@pytest.mark.parametrize("spec", SMALL)
def test_small_networks_go_through_with_every_form_computing_the_same(spec: str) -> None:
    source = spec.partition(":")[0]
    pytest.importorskip(source, reason=f"needs {source}")
    row = examine(NetworkRow(spec, 64))

    assert not row.failed
    assert row.file_share is not None
    assert row.executed_share is not None
    assert min(row.file_share, row.executed_share) >= 95
    assert row.sqnr is not None
    assert min(row.file_agreement or 0, row.cpu_agreement or 0) >= 85
    assert {"trace", "calibrate", "export", "run"} <= row.seconds.keys()


def test_what_fails_says_where_and_why() -> None:
    assert examine(NetworkRow("torchvision:nonsense", 64)).failed.startswith("build: ")
    assert examine(NetworkRow("other:x", 64)).failed == "build: no network other:x"


def test_a_limit_is_a_result() -> None:
    assert run_one("torchvision:resnet18", 64, 0, 16).failed == "not done after 0 s"


def test_results_are_kept_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path, here = tmp_path / "sub" / "networks.jsonl", setting()
    assert read(path, here) == (here, {})
    append(path, here, DONE)
    append(path, here, NetworkRow("timm:b", 64, failed="no"))
    with path.open("a") as file:
        file.write('{"network": "timm:c"')
    assert read(path, here) == (here, {"torchvision:a": DONE, "timm:b": NetworkRow("timm:b", 64, failed="no")})
    append(tmp_path / "other.jsonl", {"processor": "another"}, DONE)
    assert read(tmp_path / "other.jsonl", None)[0] == {"processor": "another"}
    with pytest.raises(InputError, match="another processor or other versions"):
        read(path, {**here, "processor": "another"})
    path.write_text("text\n")
    with pytest.raises(InputError, match="holds no results of this command"):
        read(path, here)


def test_a_run_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(network: str, size: int, seconds: int, memory: int) -> NetworkRow:
        asked.append(network)
        return NetworkRow(network, size, failed="no") if network == "timm:b" else DONE

    monkeypatch.setattr(matrix, "run_one", run)
    path, to = tmp_path / "networks.jsonl", tmp_path / "page.md"
    arguments = ["torchvision:a", "timm:b", "--results", str(path), "--json", "--jobs", "2"]
    assert matrix.main(arguments) == 0
    assert matrix.main([*arguments, "--page", str(to)]) == 0
    assert matrix.main([*arguments, "--again"]) == 0
    assert asked == ["torchvision:a", "timm:b", "timm:b"]
    printed = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert [row["network"] for row in printed["networks"]] == ["torchvision:a", "timm:b"]
    assert "- 1 of 2 networks execute at least 95 %" in to.read_text()


def test_the_page_names_what_is_below_and_what_was_not_run() -> None:
    low = NetworkRow(**{**DONE.__dict__, "network": "timm:low", "executed_share": 80.0})
    text = page([DONE, low, NetworkRow("timm:b", 64, failed="a | b")], ["timm:c"], setting(), 60, 4)
    assert "- timm:low: 80.0 %; x (Conv)" in text
    assert "Not run for this page: timm:c." in text
    assert {line.count(" |") for line in table([DONE, low]).splitlines()} == {14}
    assert "a \\| b" in text
