"""The configuration of a run: one YAML file, read by all three commands, every value overridable by a flag.

These dataclasses are the schema. jsonargparse checks types and makes the help from their docstrings; ranges are
checked in ``__post_init__``. The defaults are those of ``configs/lenet_mnist.yaml``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from calib.algorithms import ALGORITHMS, DEFAULT, OPTIONS
from common.errors import InputError
from common.threads import available_cores
from engines import ENGINES

DatasetName = Literal["auto", "mnist", "digits", "fashion_mnist", "cifar10", "imagefolder"]
PrecisionName = Literal["fp32", "fp16", "int8"]
# Lists and dictionaries without a type of their own: within Any, jsonargparse imports what looks like a class.
PlainValue = bool | int | float | str | list | dict | None  # type: ignore[type-arg]
Task = Literal["classify", "regress", "embed", "detect"]
"""``classify``: one row of scores per image, compared by the class; ``regress``: numbers, compared by their error;
``embed``: vectors, compared by their direction; ``detect``: several tensors, or one per place (boxes, masks)."""
TaskName = Literal["auto", "classify", "regress", "embed", "detect"]

MYPY = False  # mypy takes it for true. So does jsonargparse TYPE_CHECKING, which therefore does not serve here.
if MYPY:
    AlgorithmName = str
    EngineName = str

    @dataclass
    class _Algorithm:
        algorithm: AlgorithmName = DEFAULT

else:  # of the registries, which mypy does not read
    AlgorithmName = Literal[tuple(ALGORITHMS)]
    EngineName = Literal[("auto", *ENGINES)]
    _OPTIONS = [(name, float, option.default) for name, option in OPTIONS.items()]
    _HELP = "".join(f"    {name}: {option.help}\n" for name, option in OPTIONS.items())
    _Algorithm = make_dataclass(
        "_Algorithm",
        [("algorithm", AlgorithmName, DEFAULT), *_OPTIONS],
        namespace={"__doc__": f"The algorithm and its options.\n\nArgs:\n{_HELP}"},
    )

logger = logging.getLogger(__name__)

MAX_THREADS = 1024
"""Far more make the operating system refuse a thread in the middle of a kernel, which ends the process."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass
class DataConfig:
    """Images and labels.

    Args:
        dataset: Which data set; ``auto`` takes MNIST where it is found or can be downloaded, else scikit-learn's
            bundled digits, and says which.
        dir: Folder with the data set's files. If unset: the one that MNIST_DIR (FASHION_MNIST_DIR, CIFAR10_DIR)
            names, for MNIST $TRT_DATADIR/mnist, and the default folder under the user's cache folder.
        download: Whether a missing data set may be downloaded.
        batch_size: Images per training batch.
        validation: Images held out of the training set to choose by, at most a sixth of it; the test set serves the
            final figure alone.
        augment: Whether training batches are augmented (small random affine).
        image_size: Height and width after resizing and cropping (imagefolder).
        resize: Length of the shorter side before the centre crop (imagefolder).
        channels: 3 for colour, 1 for gray, whatever the files are (imagefolder).
        transform: Own preprocessing in the place of resizing, cropping and normalising (imagefolder): what makes a
            float tensor [C, H, W] of a Pillow image, by its path, such as ``package.module:function`` or
            ``torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms``.
        targets: CSV file with the numbers that a regression network is to give (imagefolder): on each line an
            image's path within ``dir``, and one number or more.
        workers: Decoding threads (imagefolder).
    """

    dataset: DatasetName = "auto"
    dir: Path | None = None
    download: bool = True
    batch_size: int = 128
    validation: int = 5000
    augment: bool = True
    image_size: int = 224
    resize: int = 256
    channels: Literal[1, 3] = 3
    transform: str | None = None
    targets: Path | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"data.batch_size must be at least 1, not {self.batch_size}")
        _require(self.validation >= 1, f"data.validation must be at least 1, not {self.validation}")
        _require(1 <= self.image_size <= self.resize, "data.image_size must be between 1 and data.resize")
        _require(self.workers >= 0, f"data.workers must not be negative, not {self.workers}")


@dataclass
class ModelConfig:
    """The network.

    Args:
        class_path: Class or factory that makes the network, such as ``models.LeNet``,
            ``torchvision.models.resnet18`` or ``package.module:Class``.
        init_args: Its keyword arguments.
        weights: File with a state_dict (``.pt``, ``.pth`` or ``.safetensors``) to start from.
        task: What the outputs are, and so what they are compared by: classes (``classify``), numbers (``regress``),
            a vector (``embed``), several tensors or one value per place (``detect``); ``auto`` finds it and says so.
    """

    class_path: str = "models.LeNet"
    init_args: dict[str, PlainValue] = field(default_factory=dict)
    weights: Path | None = None
    task: TaskName = "auto"


@dataclass
class OptimizerConfig:
    """How the network is trained; the epochs are ``trainer.max_epochs``.

    Args:
        name: Optimiser.
        lr: Learning rate (the peak of ``onecycle``, the start of ``inv`` and ``cosine``).
        momentum: Momentum of SGD (with Nesterov where ``nesterov``).
        nesterov: Whether SGD uses Nesterov's momentum.
        weight_decay: L2 penalty.
        bias_weight_decay: The same of the biases; None: as ``weight_decay``.
        schedule: Learning-rate policy, stepped every batch; ``inv`` is Caffe's
            lr * (1 + gamma * iteration) ** -power.
        gamma: Factor of the iteration in ``inv``, per step.
        power: Exponent of ``inv``.
        average: Decay of the exponential moving average of the weights, per step; 0 trains without. The averaged
            weights are validated and kept.
        label_smoothing: Share of the target that the cross entropy spreads evenly over all classes.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.12
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    bias_weight_decay: float | None = None
    schedule: Literal["onecycle", "inv", "cosine", "constant"] = "onecycle"
    gamma: float = 1e-4
    power: float = 0.75
    average: float = 0.0
    label_smoothing: float = 0.05

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr must be positive, not {self.lr}")
        _require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), not {self.momentum}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        _require(
            (self.bias_weight_decay or 0) >= 0,
            f"optimizer.bias_weight_decay must not be negative, not {self.bias_weight_decay}",
        )
        _require(self.gamma >= 0, f"optimizer.gamma must not be negative, not {self.gamma}")
        _require(0 <= self.average < 1, f"optimizer.average must be in [0, 1), not {self.average}")
        _require(
            0 <= self.label_smoothing < 1, f"optimizer.label_smoothing must be in [0, 1), not {self.label_smoothing}"
        )


@dataclass
class CalibrationConfig(_Algorithm):
    """How the dynamic ranges are found.

    Args:
        algorithm: How thresholds are found; ``entropy2`` is IInt8EntropyCalibrator2's.
        subset: How the representative images are chosen; ``first`` is the training file in its order, as NVIDIA's
            sampleINT8 reads it.
        batches: Calibration batches.
        batch_size: Images per calibration batch; every batch is full.
        skip: Batches to skip at the start (``first``).
        tensorrt_version: Version in the table's first line, such as ``10.12.0``; the installed TensorRT's if unset.
    """

    subset: Literal["stratified", "first", "random"] = "stratified"
    batches: int = 10
    batch_size: int = 50
    skip: int = 0
    tensorrt_version: str | None = None

    def __post_init__(self) -> None:
        _require(self.batches >= 1, f"calibration.batches must be at least 1, not {self.batches}")
        _require(self.batch_size >= 1, f"calibration.batch_size must be at least 1, not {self.batch_size}")
        _require(self.skip >= 0, f"calibration.skip must not be negative, not {self.skip}")
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            _require(option.allows(value), f"calibration.{name} must be in {option.range}, not {value}")


@dataclass
class QuantizationConfig:
    """Which layers run in INT8.

    Args:
        mode: ``implicit`` gives the table to TensorRT (DataLoaderCalibrator, Torch-TensorRT up to 2.8); ``explicit``
            puts quantize/dequantize into the network; ``auto`` chooses by the installed version.
        keep_fp: Layers to keep in higher precision, by name.
        quantize_output: Whether the network's output (the softmax) is quantized as well.
    """

    mode: Literal["auto", "implicit", "explicit"] = "auto"
    keep_fp: list[str] = field(default_factory=list)
    quantize_output: bool = False


@dataclass
class EngineConfig:
    """What executes the network.

    Args:
        name: ``auto`` takes Torch-TensorRT on an NVIDIA GPU with TensorRT, else ONNX Runtime, and says why.
        threads: CPU threads of an engine; all cores if unset.
        device: Index of the GPU.
        tf32: Whether FP32 engines on a GPU may use TF32.
        int8_fp16: Whether an INT8 engine may run layers in FP16 as well.
        timing_iterations: Timing iterations that TensorRT averages when it chooses a kernel.
        workspace: TensorRT's workspace in MiB; 0 leaves it to TensorRT.
        full_compilation: Whether Torch-TensorRT must take the whole network.
        dla_core: DLA core (with GPU fallback); the GPU if unset.
        cuda_graphs: Whether TensorRT engines are timed as CUDA graphs, with the call through Torch-TensorRT beside it.
    """

    name: EngineName = "auto"
    threads: int | None = None
    device: int = 0
    tf32: bool = False
    int8_fp16: bool = False
    timing_iterations: int = 8
    workspace: int = 0
    full_compilation: bool = False
    dla_core: int | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        _require(
            self.threads is None or 1 <= self.threads <= MAX_THREADS,
            f"engine.threads must be from 1 to {MAX_THREADS}, not {self.threads}",
        )
        _require(self.device >= 0, f"engine.device must not be negative, not {self.device}")
        _require(self.timing_iterations >= 1, "engine.timing_iterations must be at least 1")
        _require(self.workspace >= 0, "engine.workspace must not be negative")

    def warn_of_threads(self) -> None:
        """Say so where there are more threads than cores; to be called when logging has been started."""
        cores = available_cores()
        if self.threads is not None and self.threads > cores:
            logger.warning(
                "engine.threads %d is more than the %d cores there are: that may take very long", self.threads, cores
            )


@dataclass
class EvaluationConfig:
    """What is compared, and when it passes.

    Args:
        precisions: Precisions to compare; FP32 is the reference, and without INT8 there is no PASSED.
        split: Images to evaluate on; ``train`` is the whole training file in its order.
        batch_size: Images per batch of the accuracy run.
        start: Batches to skip.
        batches: Batches to evaluate; all if unset.
        tolerance: Largest loss of top-1 and of top-5 against FP32, in points.
        agreement: Least share of the images that get the same class as in FP32, percent.
        relative_error: Largest error of a regression network against FP32, percent of how much FP32's outputs vary.
        cosine: Least cosine similarity to FP32 of each output, mean over the images (``embed`` and ``detect``).
        sqnr: Least signal-to-noise ratio of each output against FP32, dB (``detect``).
        latency_batch_sizes: Batch sizes of the latency measurement.
        latency_seconds: Timed seconds per engine and batch size.
        latency_runs: Least number of timed runs per engine and batch size.
        analysis: Whether the report includes the per-layer analysis.
        analysis_images: Images for the per-layer analysis, spread evenly over those evaluated; as many as a fixed
            amount of arithmetic allows (all 10,000 of MNIST for LeNet) if unset.
    """

    precisions: list[PrecisionName] = field(default_factory=lambda: ["fp32", "fp16", "int8"])
    split: Literal["test", "train", "validation"] = "test"
    batch_size: int = 256
    start: int = 0
    batches: int | None = None
    tolerance: float = 1.0
    agreement: float = 90.0
    relative_error: float = 10.0
    cosine: float = 0.99
    sqnr: float = 15.0
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 32, 256])
    latency_seconds: float = 0.5
    latency_runs: int = 50
    analysis: bool = True
    analysis_images: int | None = None

    def __post_init__(self) -> None:
        _require(bool(self.precisions), "evaluation.precisions must name at least one precision")
        _require(
            len(set(self.precisions)) == len(self.precisions),
            f"evaluation.precisions names one twice: {', '.join(self.precisions)}",
        )
        _require(self.batch_size >= 1, f"evaluation.batch_size must be at least 1, not {self.batch_size}")
        _require(self.start >= 0, f"evaluation.start must not be negative, not {self.start}")
        _require(
            self.batches is None or self.batches >= 1, f"evaluation.batches must be at least 1, not {self.batches}"
        )
        _require(self.tolerance >= 0, f"evaluation.tolerance must not be negative, not {self.tolerance}")
        _require(0 <= self.agreement <= 100, f"evaluation.agreement must lie between 0 and 100, not {self.agreement}")
        _require(self.relative_error >= 0, f"evaluation.relative_error must not be negative, not {self.relative_error}")
        _require(-1 <= self.cosine <= 1, f"evaluation.cosine must lie between -1 and 1, not {self.cosine}")
        _require(all(size >= 1 for size in self.latency_batch_sizes), "evaluation.latency_batch_sizes must be positive")
        _require(self.latency_seconds > 0, "evaluation.latency_seconds must be positive")
        _require(self.latency_runs >= 1, "evaluation.latency_runs must be at least 1")
        _require(
            self.analysis_images is None or self.analysis_images >= 1,
            f"evaluation.analysis_images must be at least 1, not {self.analysis_images}",
        )


@dataclass
class Config:
    """Everything a run is made of.

    ``trainer`` holds arguments of ``lightning.Trainer`` as given; only ``train.py`` reads them.
    """

    run: str
    seed: int
    artifacts: Path
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    calibration: CalibrationConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    evaluation: EvaluationConfig
    trainer: dict[str, Any]

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, f"seed must be between 0 and {2**32 - 1}, not {self.seed}")
