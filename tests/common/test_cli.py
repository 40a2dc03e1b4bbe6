"""The command line and the configuration file: what is wrong is one line and exit code 2, and nothing is executed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from common import cli, options
from common.cli import DEFAULT_CONFIG, ROOT, SECTIONS, check_config_file, config_parser, parse
from common.config import DataConfig, DatasetName, EvaluationConfig
from common.errors import InputError

COMMANDS = ("train", "quantize", "evaluate")


@pytest.fixture(scope="module", params=COMMANDS)
def parser(request):
    return getattr(options, f"{request.param}_parser")()


@pytest.fixture
def refused(capsys):
    """Parse and return the one line that says what is wrong."""

    def line(arguments, parser=None):
        try:
            parse(parser or config_parser("train.py", "Train.", {"--engine": "engine.name"}), arguments)
        except InputError as error:
            text = f"error: {error}\n"
        except SystemExit as stop:
            assert stop.code == 2
            text = capsys.readouterr().err
        else:
            pytest.fail(f"{arguments} were taken")
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert text.endswith("\n")
        assert len(text) < 600
        return text

    return line


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_defaults_are_those_of_the_shipped_configuration(parser):
    config, _ = parse(parser, [])
    assert config.run == "lenet_mnist"
    assert config.data == DataConfig()
    assert config.evaluation == EvaluationConfig()
    assert config.trainer == (yaml.safe_load(DEFAULT_CONFIG.read_text()).get("trainer") or {})


def test_flags_go_over_the_file(tmp_path):
    path = write(tmp_path, "seed: 3\ndata: {batch_size: 7, dataset: digits}\ntrainer: {max_epochs: 2, callbacks: [1]}")
    config, _ = parse(config_parser("x", "X.", {}), ["--config", path, "--data.batch_size=9", "--trainer.precision=16"])
    assert (config.seed, config.data.batch_size, config.data.dataset) == (3, 9, "digits")
    assert config.trainer == {"max_epochs": 2, "callbacks": [1], "precision": 16}


def test_a_short_flag_with_a_sections_name():
    for arguments in (["--engine", "torch"], ["--engine=torch"], ["--engine.name", "torch"]):
        config, _ = parse(config_parser("x", "X.", {"--engine": "engine.name"}), arguments)
        assert config.engine.name == "torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--data.nonsense=1"], "nonsense"),
        (["stray"], "stray"),
        (["--seed"], "--seed"),
        (["--seed=x"], "seed"),
        (["--seed=1.5"], "seed"),
        (["--seed=-1"], "seed"),
        (["--seed=99999999999999999999999"], "seed"),
        (["--data.batch_size=0"], "data.batch_size must be at least 1, not 0"),
        (["--data.batch_size=1e9"], "batch_size"),
        (["--data.batch_size=9999999999"], "data.batch_size must be between"),
        (["--data.dataset=imagenet"], "dataset"),
        (["--data.download=perhaps"], "download"),
        (["--optimizer.lr=nan"], "optimizer.lr"),
        (["--optimizer.lr=.inf"], "optimizer.lr must be a finite number"),
        (["--optimizer.lr=-1"], "optimizer.lr must be positive"),
        (["--calibration.percentile=101"], "calibration.percentile must be in (0, 100]"),
        (["--calibration.algorithm=best"], "algorithm"),
        (["--engine=cuda"], "engine.name"),
        (["--engine.threads=0"], "engine.threads must be from 1 to"),
        (["--engine.threads=1000000"], "engine.threads must be from 1 to"),
        (["--evaluation.precisions=[]"], "evaluation.precisions must name at least one"),
        (["--evaluation.precisions=[int4]"], "int4"),
        (["--evaluation.precisions=[fp32,fp32]"], "precisions"),
        (["--evaluation.latency_batch_sizes=[1,0]"], "latency_batch_sizes must be positive"),
        (["--evaluation.latency_batch_sizes=[99999999999]"], "latency_batch_sizes must be between"),
        (["--evaluation.tolerance=-1"], "evaluation.tolerance must not be negative"),
        (["--data=[1]"], "data"),
        (["--trainer=5"], "trainer"),
        (["--config"], "--config"),
        (["--config="], "config"),
        (["--config=/no/such/file.yaml"], "File does not exist"),
        (["--config", "/"], "/"),
    ],
)
def test_wrong_options(refused, arguments, message):
    assert message in refused(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a YAML mapping of options"),
        ("# nothing", "must be a YAML mapping of options"),
        ("5", "must be a YAML mapping of options"),
        ("- run: x", "must be a YAML mapping of options"),
        ("run: [", "config.yaml line 1 is not YAML: "),
        ("seed: 1\n\tdata: 2", "config.yaml line 2 is not YAML: "),
        ("a: b\n---\nc: d", "is not YAML: "),
        ("run: *nowhere", "is not YAML: "),
        (b"run: \xff", "is not UTF-8 text (byte 5)"),
        (b"\xff\xfer\0u\0n\0:\0 \0x\0", "is not UTF-8 text"),
        ("run: \x07", "is not YAML: unacceptable character"),
        ("colour: red", "colour"),
        ("data: {colour: red}", "colour"),
        ("data: {batch_size: many}", "batch_size"),
        ("data: {batch_size: null}", "batch_size"),
        ("data: {batch_size: [1]}", "batch_size"),
        ("run: x\nseed:", "seed must not be empty"),
        ("seed: 1\nrun:", "run must not be empty"),
        ("artifacts: null", "artifacts must not be empty"),
        ("trainer: null", "trainer must not be empty"),
        ("data: [1]", "data must be a mapping"),
        ("data: null", "data must not be empty"),
        ("data: /etc/passwd", "data"),
        ("evaluation: {latency_batch_sizes: 5}", "latency_batch_sizes"),
        ("quantization: {keep_fp: {a: b}}", "keep_fp"),
        ("model: {init_args: [1]}", "init_args"),
        ("run: 5", "run"),
        ("seed: " + "9" * 5000, "digits"),
        ("optimizer: {lr: 1.0e+400}", "finite"),
        ("optimizer: {lr: .nan}", "finite"),
        ("trainer: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("trainer: " + "{a: " * 60 + "1" + "}" * 60, "nested too deeply"),
        ("trainer: &a {b: *a}", "nested too deeply, or its aliases"),
        ("# " + "x" * 300_000, "is larger than 262144 bytes"),
    ],
)
def test_configurations_that_are_none(refused, tmp_path, content, message):
    assert message in refused(["--config", write(tmp_path, content)])


def test_aliases_that_stand_for_millions_of_values(refused, tmp_path):
    """The YAML form of the "billion laughs": each line repeats the line before nine times."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    assert "too many values" in refused(["--config", write(tmp_path, "trainer:\n  " + "\n  ".join(lines))])


def test_modest_aliases_are_welcome(tmp_path):
    path = write(tmp_path, "data: {batch_size: &size 32}\nevaluation: {batch_size: *size}")
    config, _ = parse(config_parser("x", "X.", {}), ["--config", path])
    assert (config.data.batch_size, config.evaluation.batch_size) == (32, 32)


@pytest.mark.parametrize(
    "content",
    [
        "run: !!python/object/apply:os.mkdir [RAN]",
        "!!python/object/new:os.mkdir [RAN]",
        "trainer: {logger: !!python/object/apply:os.mkdir {args: [RAN]}}",
        "run: !!python/name:os.mkdir",
        "run: !!python/module:antigravity",
        "run: !mine x",
    ],
)
def test_tags_construct_nothing(refused, tmp_path, content):
    assert "tag" in refused(["--config", write(tmp_path, content.replace("RAN", str(tmp_path / "ran")))])
    assert not (tmp_path / "ran").exists()


def test_values_that_look_like_classes_are_not_called(tmp_path):
    """They are Lightning's to make, in train.py alone; quantize.py and evaluate.py read the same file."""
    call = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "ran")}}
    content = {"model": {"init_args": {"x": call}}, "trainer": {"logger": call, "callbacks": [call]}}
    config, _ = parse(config_parser("x", "X.", {}), ["--config", write(tmp_path, json.dumps(content))])
    assert not (tmp_path / "ran").exists()
    assert config.trainer["logger"] == config.model.init_args["x"] == call
    assert type(config.trainer["callbacks"][0]) is dict


def test_a_configuration_may_be_given_as_text():
    config, _ = parse(config_parser("x", "X.", {}), ["--config", '{"seed": 5}'])
    assert config.seed == 5


def test_only_files_are_checked_beforehand(tmp_path):
    check_config_file(str(tmp_path / "missing"))
    check_config_file("seed: 5")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["nan", "1e400", "0x10", "1_000", "null", "~", "[]", "!!python/none", "\0", "*a", "&a b", "../.."]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner))
OPTIONS = sorted(f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in dataclasses.fields(kind))
OPTIONS += ["run", "seed", "artifacts", "trainer", *SECTIONS]


@given(option=st.sampled_from(OPTIONS), value=VALUES.map(lambda value: yaml.safe_dump(value, width=10_000)) | st.text())
@example(option="trainer", value="[[]]")
@example(option="data", value="config.yaml")
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(capsys, option, value):
    one_line_or_config(capsys, [f"--{option}={value}"])


PARSER = config_parser("train.py", "Train.", {})


def one_line_or_config(capsys, arguments):
    try:
        config, _ = parse(PARSER, arguments)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as stop:
        assert stop.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    else:
        assert isinstance(config.trainer, dict)
        assert config.data.dataset in get_args(DatasetName)


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_options_end_each_command_with_two(command, name, tmp_path):
    for argument in ("--nonsense", "--seed=x", "--config=/no/such/file", "--run=../x"):
        ended = command(f"{name}.py", argument, cwd=tmp_path, code=2)
        assert ended.stdout == ""
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    script = (
        f"import sys, {name}\n"
        f"try: {name}.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'lightning', 'torchvision', 'numpy'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for option in ("--config", "--data-dir", "--batch-size", "--seed", "--json"):
        assert option in result.stdout


def test_the_largest_configuration_is_taken(refused, tmp_path):
    head = f"trainer: {{callbacks: [{'x, ' * 9000}]}} # "
    largest = head + "x" * (cli.MAX_CONFIG_BYTES - len(head))
    config, _ = parse(PARSER, ["--config", write(tmp_path, largest)])
    assert len(config.trainer["callbacks"]) == 9000
    assert "is larger than" in refused(["--config", write(tmp_path, largest + "x")])
