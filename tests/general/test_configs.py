"""Every configuration that ships is one that the commands take, and says what it is for."""

from pathlib import Path

import pytest
import yaml

from common.cli import config_parser, parse
from common.config import Config
from models.fit import check_trainer
from models.network import build_network, check_network

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CALIBRATION_IMAGES = 500
CHANNELS = {"imagefolder": 3, "cifar10": 3}


def read(path: Path, *arguments: str) -> Config:
    return parse(config_parser("test", "A test.", {}), ["--config", str(path), *arguments])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_what_it_says_and_its_trainer_and_network_can_be_made(path: Path) -> None:
    config = read(path)
    assert config.run == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert config.calibration.batches * config.calibration.batch_size == CALIBRATION_IMAGES
    assert config.calibration.subset == "stratified"

    check_trainer(config.trainer)

    channels = CHANNELS.get(config.data.dataset, 1)
    size = config.data.image_size if config.data.dataset == "imagefolder" else 28
    network = build_network(config.model, 10, channels)
    check_network(network, path.stem, (channels, size, size), 10)


def test_a_model_of_class_and_arguments_alone_is_a_model(tmp_path: Path) -> None:
    """jsonargparse knows these two keys from its own notation for subclasses."""
    path = tmp_path / "own.yaml"
    for model in ({"class_path": "a.B"}, {"class_path": "a.B", "init_args": {"depth": 3}}):
        path.write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
        config = read(path)
        assert config.model.class_path == "a.B"
        assert config.model.init_args == model.get("init_args", {})
        assert config.model.weights is None


def test_arguments_of_the_network_can_be_given_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "a.B", "init_args": {"depth": 3}}}), encoding="utf-8")

    config = read(path, "--model.init_args.width", "7", "--model.weights", "w.safetensors")

    assert config.model.init_args == {"depth": 3, "width": 7}
    assert config.model.weights == Path("w.safetensors")
