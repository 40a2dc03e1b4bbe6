import dataclasses
import json
import os
import pickle
import re
import zipfile

import pytest
import torch
from torch import nn

from common.decode import encode
from common.errors import InputError
from models import LeNet, load_checkpoint, save_checkpoint
from models.checkpoint import FORMAT


@pytest.fixture
def path(tmp_path, meta):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model.ckpt", LeNet(), meta)
    return tmp_path / "model.ckpt"


def meta_of(meta, class_path, **init_args):
    """The metadata of another network."""
    name = re.split("[.:]", class_path)[-1]
    return dataclasses.replace(meta, network=name, class_path=class_path, init_args=init_args)


def rewrite(path, meta, **changes) -> None:
    """A checkpoint whose metadata says something else."""
    content = torch.load(path, weights_only=True)
    content["meta"] = json.dumps({**json.loads(encode(meta)), **changes})
    torch.save(content, path)


def test_round_trip(path, meta):
    torch.manual_seed(0)
    network = LeNet().to(memory_format=torch.channels_last)
    checkpoint = load_checkpoint(path)
    assert checkpoint.meta == meta
    assert not checkpoint.network.training
    for (name, mine), (other, theirs) in zip(
        network.state_dict().items(), checkpoint.network.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
    again = path.with_name("again.ckpt")
    save_checkpoint(again, network, meta)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("trusted", [None, "torchvision.models.squeezenet1_1"])
def test_torchvision_without_fetching_weights(tmp_path, meta, monkeypatch, trusted):
    from torchvision.models import squeezenet1_1

    meta = meta_of(meta, "torchvision.models.squeezenet1_1", num_classes=1000, weights="IMAGENET1K_V1")
    save_checkpoint(tmp_path / "model.ckpt", squeezenet1_1(), meta)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *_, **__: pytest.fail(f"fetches {url}"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_checkpoint(tmp_path / "model.ckpt", trusted).network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_what_torchvision_sets_with_weights_is_set_without_them(tmp_path, meta):
    """Input that GoogLeNet scales, and no auxiliary heads."""
    from torchvision.models import googlenet

    network = googlenet(num_classes=4, transform_input=True, aux_logits=False, init_weights=False)
    meta = meta_of(meta, "torchvision.models.googlenet", num_classes=4, weights="DEFAULT")
    save_checkpoint(tmp_path / "model.ckpt", network, meta)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "model.ckpt").network(images), network.eval()(images))


def test_a_class_of_torchvision_that_the_configuration_names(tmp_path, meta):
    """The builders alone are known to make classifiers."""
    from torchvision.models import SqueezeNet

    name = "torchvision.models.SqueezeNet"
    meta = meta_of(meta, name, num_classes=4)
    save_checkpoint(tmp_path / "model.ckpt", SqueezeNet(num_classes=4), meta)
    with pytest.raises(InputError, match="is not a network"):
        load_checkpoint(tmp_path / "model.ckpt")
    assert load_checkpoint(tmp_path / "model.ckpt", trusted=name).meta == meta


class Evil:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["whole", "meta", "state_dict", "tensor", "plain pickle"])
def test_hostile_pickle_runs_nothing(path, tmp_path, where):
    content = torch.load(path, weights_only=True)
    evil = Evil(tmp_path / "ran")
    if where == "whole":
        content = evil
    elif where == "tensor":
        content["state_dict"]["conv1.weight"] = evil
    elif where != "plain pickle":
        content[where] = evil
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", "which this run's configuration does not"),
        ("stranger:Network", "which this run's configuration does not"),
        ("torchvision.models.list_models", "is not a network"),
        ("torchvision.models.detection.fasterrcnn_resnet50_fpn", "is not a network"),
        ("models.network.construct", "is not a network"),
        ("models.load_checkpoint", "is not a network"),
        ("models.network.nn", "neither a class nor a function"),
        ("models.Missing", "has no 'Missing'"),
        ("models", "which this run's configuration does not"),
        ("", "which this run's configuration does not"),
    ],
)
def test_named_class_is_not_called(path, meta, tmp_path, monkeypatch, class_path, message):
    (tmp_path / "stranger.py").write_text("open('ran', 'w')\nclass Network: pass\n")
    monkeypatch.chdir(tmp_path)
    rewrite(path, meta, class_path=class_path, init_args={})
    with pytest.raises(InputError, match=message):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "width"), [("mine_for_checkpoint", "width"), ("computing", "int(torch.ones(width).sum().item())")]
)
def test_users_own_class_is_trusted_by_configuration(tmp_path, meta, monkeypatch, module, width):
    """Also one that computes with values while it is made."""
    (tmp_path / f"{module}.py").write_text(
        "import torch\nfrom torch import nn\n"
        f"class Net(nn.Linear):\n    def __init__(self, width): super().__init__({width}, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    name = f"{module}:Net"
    meta = meta_of(meta, name, width=3)
    save_checkpoint(tmp_path / "model.ckpt", nn.Linear(3, 2), meta)
    with pytest.raises(InputError, match="--model.class_path"):
        load_checkpoint(tmp_path / "model.ckpt")
    assert load_checkpoint(tmp_path / "model.ckpt", trusted=name).network.in_features == 3


def test_compressed(path):
    packed = path.with_suffix(".packed")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, bytes(entry.file_size))
    with pytest.raises(InputError, match="compressed"):
        load_checkpoint(packed)


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"there is no checkpoint .*: run train.py first"):
        load_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "not a checkpoint of this project"),
        ([1, 2], "not a checkpoint of this project"),
        ({"format": FORMAT + 1, "meta": "{}", "state_dict": {}}, f"checkpoint format {FORMAT + 1}, not {FORMAT}"),
        ({"format": FORMAT, "meta": 1, "state_dict": {}}, "metadata is not text"),
        ({"format": FORMAT, "meta": "{", "state_dict": {}}, "JSON"),
        ({"format": FORMAT, "meta": "[" * 100_000, "state_dict": {}}, "JSON"),
        ({"format": FORMAT, "meta": "{}", "state_dict": {}}, "lacks the field"),
    ],
)
def test_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "meta.seed is 'x', not int"),
        ({"network": "../../etc/passwd"}, "is not the name of a network"),
        ({"data": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"init_args": {"num_classes": 10**12}}, "of another architecture"),
        ({"init_args": {"num_classes": -1}}, "failed"),
        ({"init_args": {"colour": "red"}}, "failed"),
    ],
)
def test_wrong_metadata(path, meta, change, message):
    rewrite(path, meta, **change)
    with pytest.raises(InputError, match=message):
        load_checkpoint(path)


def test_arguments_of_a_users_class_get_no_memory_that_the_file_does_not_fill(path, meta, tmp_path, monkeypatch):
    (tmp_path / "large_for_checkpoint.py").write_text("from models import LeNet\nclass Large(LeNet): pass\n")
    monkeypatch.chdir(tmp_path)
    rewrite(path, meta, class_path="large_for_checkpoint:Large", init_args={"num_classes": 10**12})
    with pytest.raises(InputError, match="of another architecture"):
        load_checkpoint(path, "large_for_checkpoint:Large")


def test_weights_that_are_not_finite_are_not_written(tmp_path, meta):
    network = LeNet()
    torch.nn.init.constant_(network.conv2.bias, torch.nan)
    with pytest.raises(InputError, match="training ended with NaN or infinity in conv2.bias"):
        save_checkpoint(tmp_path / "new" / "model.ckpt", network, meta)
    assert not (tmp_path / "new").exists()


def test_another_architecture(path, meta):
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    for change, message in (
        ({key: value for key, value in state.items() if key != "ip2.bias"}, "it lacks ip2.bias"),
        ({**state, "ip3.bias": torch.zeros(1)}, "the network has no ip3.bias"),
        ({**state, "ip2.bias": torch.zeros(11)}, r"ip2.bias is \(11,\), not \(10,\)"),
        ({**state, "ip2.bias": 1.0}, "ip2.bias is float"),
        ({**state, "ip2.bias": torch.full((10,), torch.nan)}, "NaN or infinity in ip2.bias"),
        ({**state, "ip2.bias": torch.full((10,), -torch.inf)}, "NaN or infinity in ip2.bias"),
        ({**state, "ip2.bias": torch.zeros(1).expand(10)}, "ip2.bias is no plain tensor"),
        ([1], "holds no state_dict"),
    ):
        torch.save({**content, "state_dict": change}, path)
        with pytest.raises(InputError, match=message):
            load_checkpoint(path)
