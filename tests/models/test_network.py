import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.config import ModelConfig
from common.errors import InputError
from models import LeNet, build_network, save_checkpoint
from models.network import (
    check_network,
    logits_of,
    network_arguments,
    network_name,
    to_eval_mode,
    without_wrapper,
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current folder; gives its name."""
    (tmp_path / "users_networks.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes, channels=1, bias=True): super().__init__(channels, num_classes, bias)\n"
        "def factory(**kwargs): return Net(**kwargs)\n"
        "def nothing(): return 3\n"
        "CONSTANT = 1\n"
    )
    (tmp_path / "broken_networks.py").write_text("raise OSError('no such device')\n")
    monkeypatch.chdir(tmp_path)
    return "users_networks"


def test_default_is_lenet():
    network = build_network(ModelConfig(), num_classes=7, channels=1)
    assert isinstance(network, LeNet)
    assert network.ip2.out_features == 7


def test_arguments_come_from_the_data_unless_given(mine):
    assert network_arguments(ModelConfig(f"{mine}.Net"), 5, 3) == {"num_classes": 5, "channels": 3}
    assert network_arguments(ModelConfig(f"{mine}.Net", {"num_classes": 9}), 5, 3)["num_classes"] == 9
    assert network_arguments(ModelConfig(f"{mine}.factory"), 5, 3) == {"num_classes": 5}
    assert network_arguments(ModelConfig(f"{mine}.nothing"), 5, 3) == {}
    network = build_network(ModelConfig(f"{mine}:Net", {"bias": False}), 5, 3)
    assert isinstance(network, nn.Linear)
    assert (network.in_features, network.out_features, network.bias) == (3, 5, None)


def test_torchvision():
    network = build_network(ModelConfig("torchvision.models.squeezenet1_1"), num_classes=4, channels=3)
    check_network(network, "squeezenet1_1", (3, 64, 64), 4)


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("LeNet", "not of the form package.module.Class"),
        ("models.", "not of the form"),
        ("models..LeNet", "not of the form"),
        ("a b.c", "not of the form"),
        ("no_such_package.Net", "No module named 'no_such_package'"),
        ("models.LeNot", "module 'models' has no 'LeNot'"),
        ("users_networks.CONSTANT", "neither a class nor a function"),
        ("users_networks.nothing", "made a int, not a torch.nn.Module"),
        ("broken_networks.Net", "importing .* failed: OSError: no such device"),
        ("torch.nn.Conv2d", "failed: TypeError"),
    ],
)
def test_class_paths_that_do_not_serve(mine, class_path, message):
    with pytest.raises(InputError, match=message):
        build_network(ModelConfig(class_path), 10, 1)


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match=r"models.LeNet\(num_classes=10, colour='red'\) failed: TypeError"):
        build_network(ModelConfig("models.LeNet", {"colour": "red"}), 10, 1)


@pytest.mark.parametrize(
    "form",
    [
        *("plain", "nested", "torchvision's", "under another key", "wrapped", "twice wrapped"),
        *("safetensors", "a checkpoint of ours"),
    ],
)
def test_weights(tmp_path, form, meta):
    trained = LeNet()
    state = trained.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "a checkpoint of ours":
        save_checkpoint(path, trained, meta)
    else:
        wrapped = {f"net.{name}": value for name, value in state.items()}
        forms = {
            "plain": state,
            "nested": {"state_dict": state, "epoch": 3},
            "torchvision's": {"model": state, "optimizer": {"lr": 0.1}},
            "under another key": {"ema": state, "epoch": 3},
            "wrapped": {"state_dict": wrapped},
            "twice wrapped": {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        }
        torch.save(forms[form], path)
    network = build_network(ModelConfig(weights=path), 10, 1)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


def test_counts_of_batches_may_be_missing():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = {f"module.{name}": value for name, value in network.state_dict().items() if "num_batches" not in name}
    assert without_wrapper(state, network).keys() == network.state_dict().keys()


def test_weights_that_do_not_serve(tmp_path):
    def refused(name: str, message: str, num_classes: int = 10) -> None:
        with pytest.raises(InputError, match=message):
            build_network(ModelConfig(weights=tmp_path / name), num_classes, 1)

    refused("missing.pt", "there is no file")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    refused("noise.pt", "damaged")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    refused("noise.safetensors", "cannot read the weights")
    torch.save(LeNet(), tmp_path / "module.pt")
    refused("module.pt", r"an object of models.lenet.LeNet, which is not loaded .*: save .*model.state_dict")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    refused("script.pt", "is a TorchScript program")
    torch.save({"a": 1}, tmp_path / "values.pt")
    refused("values.pt", r"holds no state_dict \(tensors by name\) but a$")
    torch.save({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, tmp_path / "two.pt")
    refused("two.pt", "holds several state_dicts, a, b: save the one to use alone")
    torch.save(LeNet().state_dict(), tmp_path / "lenet.pt")
    refused("lenet.pt", r"ip2.weight is \(10, 500\), not \(7, 500\)", num_classes=7)
    state = LeNet().state_dict()
    state["conv2.bias"][3] = torch.inf
    torch.save(state, tmp_path / "infinite.pt")
    refused("infinite.pt", "NaN or infinity in conv2.bias")


def test_misfits_are_found_before_training():
    check_network(LeNet(), "LeNet", (1, 28, 28), 10)
    with pytest.raises(InputError, match="LeNet does not take images of 3x32x32"):
        check_network(LeNet(), "LeNet", (3, 32, 32), 10)
    with pytest.raises(InputError, match=r"gives \(2, 10\) for 2 images: expected \(2, 9\)"):
        check_network(LeNet(), "LeNet", (1, 28, 28), 9)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    check_network(flat, "flat", (1, 2, 2), 3)
    with pytest.raises(InputError, match="gives probabilities"):
        check_network(nn.Sequential(flat, nn.Softmax(dim=1)), "flat", (1, 2, 2), 3)


def test_checking_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3))
    check_network(network, "network", (1, 2, 2), 3)
    assert network.training
    assert network[0].num_batches_tracked == 0


def test_logits():
    network = LeNet()
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(logits_of(network)(images), network.logits(images))
    plain = nn.Flatten()
    assert logits_of(plain) is plain


@pytest.mark.parametrize(
    ("class_path", "name"), [("models.LeNet", "LeNet"), ("a.b:Net", "Net"), ("torchvision.models.resnet18", "resnet18")]
)
def test_name(class_path, name):
    assert network_name(class_path) == name


def test_a_module_of_torch_export_keeps_its_mode():
    exported = torch.export.export(nn.Sequential(nn.Dropout()).eval(), (torch.rand(1, 2),)).module()
    assert to_eval_mode(exported) is exported
    assert not to_eval_mode(nn.Dropout()).training
