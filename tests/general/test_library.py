"""The Python of the README and the documentation runs as it is written."""

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from calib import CalibrationTable
from tests.general import zoo

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 224, 224)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readme_calibrates_exports_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = next(block for block in blocks("README.md") if "calibrate(" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    images = torch.rand(24, *SHAPE, generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(tmp_path)
    model = zoo.build("mobilenet_v3_small")

    exec(block, {"model": model, "loader": DataLoader(TensorDataset(images, torch.zeros(24)), batch_size=4)})

    assert re.fullmatch(r"same class for \d+\.\d%\n", capsys.readouterr().out)
    assert CalibrationTable.read("CalibrationTableMyNet").scales["data"] > 0
    session = onnxruntime.InferenceSession("MyNet_int8.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"data": images[:2].numpy()})
    assert found.shape == (2, 10)


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_python_of_the_documentation_is_python(page: str) -> None:
    for block in blocks(page):
        compile(block, page, "exec")
