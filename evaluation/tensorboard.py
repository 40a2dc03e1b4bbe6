"""The evaluation's figures and the calibration's histograms in TensorBoard, beside the training curves."""

from __future__ import annotations

from pathlib import Path

from common.errors import InputError
from evaluation.results import Report, TensorFigures


def log_report(report: Report, folder: Path) -> None:
    """Add a report's scalars and histograms to an event file in ``folder``.

    The step is the number of epochs of the network's training, so that figures of a network that was trained further
    follow those of the earlier one.

    Raises:
        InputError: the folder cannot be written.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    try:
        with SummaryWriter(str(folder)) as writer:
            for tag, value in scalars(report).items():
                writer.add_scalar(tag, value, report.model.epochs)
            for tensor in report.tensors:
                _add_histogram(writer, tensor, report.model.epochs)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def scalars(report: Report) -> dict[str, float]:
    """Tag -> figure."""
    found: dict[str, float] = {}
    for row in report.rows:
        name = row.precision if row.role != "baseline" else f"{row.precision}_{row.engine}"
        if row.accuracy is not None:
            found[f"evaluation/top1/{name}"] = row.accuracy.top1
            found[f"evaluation/top5/{name}"] = row.accuracy.top5
            found[f"evaluation/agreement/{name}"] = row.accuracy.agreement
            if row.accuracy.sqnr_db is not None:
                found[f"evaluation/sqnr_db/{name}"] = row.accuracy.sqnr_db
        for output in row.outputs:
            for kind, figure in (("cosine", output.cosine), ("sqnr_db", output.sqnr_db), ("mae", output.mae)):
                if figure is not None:
                    found[f"evaluation/{output.name}_{kind}/{name}"] = figure
        if row.targets is not None:
            found[f"evaluation/target_mae/{name}"] = row.targets.mae
        for entry in row.latency:
            found[f"latency_ms/batch_{entry.batch_size}/{name}"] = entry.compute.median
    for tensor in report.tensors:
        for kind, value in (("clipped_percent", tensor.clipped), ("sqnr_db", tensor.sqnr_db)):
            if value is not None:
                found[f"tensors/{kind}/{tensor.name}"] = value
    return found


def _add_histogram(writer: object, tensor: TensorFigures, step: int) -> None:
    histogram = tensor.histogram
    if not histogram.range or not sum(histogram.counts):
        return
    width = histogram.range / len(histogram.counts)
    limits = [width * (index + 1) for index in range(len(histogram.counts))]
    # Sums as if every value lay in the middle of its bin.
    values = [(limit - width / 2, count) for limit, count in zip(limits, histogram.counts, strict=True)]
    writer.add_histogram_raw(  # type: ignore[attr-defined]
        f"calibration/{tensor.name}",
        min=0.0,
        max=histogram.maximum,
        num=sum(histogram.counts),
        sum=sum(value * count for value, count in values),
        sum_squares=sum(value * value * count for value, count in values),
        bucket_limits=limits,
        bucket_counts=histogram.counts,
        global_step=step,
    )
