"""Charts as inline SVG: small, offline, styled by the page (light, dark, print), with a text for every mark.

A mark's text is in its ``data-tip``, which the page's script shows on hover and focus, and in a ``<title>``, which a
browser shows without a script. Every figure is also in a table of the report: the charts add no data of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluation.measures import TITLES, Latency, Row
from evaluation.results import Report, TensorFigures
from evaluation.text import decibel, milliseconds

WIDTH = 440
"""Of every chart, in its own units: text of 12 units stays readable on a phone and is not huge on a desktop."""
BAR = 20
GAP = 10

STANDALONE_STYLE = """
svg{font:12px system-ui,sans-serif;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--fp32:#0060a8;--fp16:#00785a;
--int8:#b84a00;--bad:#b3261e;background:#fff}
@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#9da7b1;--line:#3d444d;--fp32:#6cb6ff;--fp16:#4ad3a5;
--int8:#ff9a57;--bad:#ff8078;background:#0d1117}}
"""
CHART_STYLE = """
.chart text{fill:var(--ink);font-size:12px}.chart .soft{fill:var(--soft)}.chart .end{text-anchor:end}
.chart .mid{text-anchor:middle}.chart .grid{stroke:var(--line);stroke-width:1}.chart .axis{stroke:var(--soft)}
.chart .fp32{--c:var(--fp32)}.chart .fp16{--c:var(--fp16)}.chart .int8{--c:var(--int8)}
.chart .fill{fill:var(--c)}.chart .faint{fill:var(--c);fill-opacity:.35}.chart .hollow{fill:none;stroke:var(--c)}
.chart .stroke{stroke:var(--c);stroke-width:1.5;fill:none}.chart .whisker{stroke:var(--c);stroke-opacity:.5}
.chart .mark{stroke-width:2}.chart .plain{fill:var(--soft);fill-opacity:.55}.chart .bad{fill:var(--bad)}
.chart .limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:4 3}.chart .hit{fill:transparent}
.chart .hit:hover{fill:var(--soft);fill-opacity:.25}
"""


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: Of its file, without the ending.
        title: For people.
        summary: What it shows, in a sentence or two, for those who cannot see it.
        body: The elements within ``<svg>``.
        height: In units.
    """

    name: str
    title: str
    summary: str
    body: Markup
    height: float

    @property
    def svg(self) -> Markup:
        """The element for a page that has ``CHART_STYLE``."""
        return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, self.height, f"{self.title}. {self.summary}", self.body
        )

    @property
    def document(self) -> str:
        """A file of its own."""
        return str(
            Markup(
                '<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {0} {1:.0f}" width="{2}" '
                'height="{3:.0f}" role="img"><title>{4}</title><desc>{5}</desc><style>{6}{7}</style>{8}</svg>\n'
            ).format(
                WIDTH,
                self.height,
                WIDTH * 1.5,
                self.height * 1.5,
                self.title,
                self.summary,
                Markup(STANDALONE_STYLE),  # noqa: S704 - constant
                Markup(CHART_STYLE),  # noqa: S704 - constant
                self.body,
            )
        )


def _element(name: str, content: object = "", **attributes: object) -> Markup:
    """An SVG element; ``class_`` and ``data_tip`` stand for ``class`` and ``data-tip``. Everything is escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, content)  # noqa: S704 - names are constants


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _text(x: float, y: float, text: str, class_: str = "") -> Markup:
    return _element("text", text, x=float(x), y=float(y), class_=class_ or None)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _rect(x: float, y: float, width: float, height: float, class_: str, tip: str | None = None) -> Markup:
    return _element(
        "rect",
        _title(tip),
        x=float(x),
        y=float(y),
        width=max(0.0, float(width)),
        height=max(0.0, float(height)),
        class_=class_,
        data_tip=tip,
    )


def _title(tip: str | None) -> Markup:
    return _element("title", tip) if tip else Markup("")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in [low, high]; the powers alone where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def accuracy_against_latency(report: Report) -> Chart | None:
    """Top-1 with its interval over the latency per image, one mark for each batch size."""
    rows = [row for row in report.rows if row.accuracy is not None and row.latency]
    if not rows:
        return None
    left, right, top, bottom, height = 52.0, 14.0, 40.0, 44.0, 280.0
    times = [entry.compute.per_image for row in rows for entry in row.latency]
    x_low, x_high = min(times) / 1.35, max(times) * 1.35
    lows = [row.accuracy.top1_interval.low for row in rows if row.accuracy]
    highs = [row.accuracy.top1_interval.high for row in rows if row.accuracy]
    margin = max(0.02, 0.08 * (max(highs) - min(lows)))
    y_low, y_high = max(0.0, min(lows) - margin), min(100.0, max(highs) + margin)

    def x(value: float) -> float:
        span = math.log(x_high / x_low)
        return left + (WIDTH - left - right) * math.log(value / x_low) / span

    def y(value: float) -> float:
        return top + (height - top - bottom) * (y_high - value) / (y_high - y_low)

    parts: list[Markup] = []
    digits = 2 if y_high - y_low < 2 else 1
    for tick in ticks(y_low, y_high):
        parts += [
            _line(left, y(tick), WIDTH - right, y(tick), "grid"),
            _text(left - 6, y(tick) + 4, f"{tick:.{digits}f}", "soft end"),
        ]
    for tick in log_ticks(x_low, x_high):
        parts += [
            _line(x(tick), height - bottom, x(tick), height - bottom + 4, "axis"),
            _text(x(tick), height - bottom + 18, f"{tick:g}", "soft mid"),
        ]
    parts += [
        _line(left, height - bottom, WIDTH - right, height - bottom, "axis"),
        _text((left + WIDTH - right) / 2, height - 8, "latency per image, ms (logarithmic)", "soft mid"),
        _text(8, top - 12, "top-1 %", "soft"),
    ]
    for number, row in enumerate(rows):
        parts.append(_accuracy_marks(row, number, x, y))
        offset = left + 8 + (WIDTH - left) / len(rows) * number
        marker = _marker(row.precision, offset, 13.0, bool(row.latency_note), None)
        label = report.title(row) + ("*" if row.latency_note else "")
        parts.append(_element("g", marker + _text(offset + 10, 17, label), class_=row.precision))
    shown = ", ".join(f"{report.title(row)} {row.accuracy.top1:.2f} %" for row in rows if row.accuracy)
    summary = (
        f"Top-1 accuracy with its 95 % interval over the latency per image, a mark for each batch size: {shown}. "
        "Hollow marks: the latency is not representative of the precision."
    )
    return Chart("accuracy_latency", "Accuracy against latency", summary, _join(parts), height)


def _accuracy_marks(row: Row, number: int, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    assert row.accuracy is not None  # the caller chose those that have it
    accuracy = row.accuracy
    level = y(accuracy.top1)
    points = sorted(row.latency, key=lambda entry: entry.compute.per_image)
    parts = [_line(x(points[0].compute.per_image), level, x(points[-1].compute.per_image), level, "stroke")]
    interval = accuracy.top1_interval
    for entry in points:
        place = x(entry.compute.per_image)
        tip = (
            f"{TITLES[row.precision]}, batch {entry.batch_size}: top-1 {accuracy.top1:.2f} % "
            f"({interval.low:.2f} to {interval.high:.2f}), {milliseconds(entry.compute.per_image)} ms per image"
            + (f"; {row.latency_note}" if row.latency_note else "")
        )
        if entry is points[0]:
            parts.append(_line(place, y(interval.low), place, y(interval.high), "whisker"))
        parts += [
            _marker(row.precision, place, level, bool(row.latency_note), tip),
        ]
    # Rows of the same accuracy lie on one line: each has its own height for the batch sizes.
    height = level + (-9, -22, 19)[number % 3]
    parts += [_text(place, height, label, "soft mid") for place, label in _batch_labels(points, x)]
    return _element("g", _join(parts), class_=row.precision)


def _batch_labels(points: Sequence[Latency], x: Callable[[float], float]) -> list[tuple[float, str]]:
    """(place, batch sizes): marks that are close together share a label."""
    groups: list[list[Latency]] = []
    for entry in points:
        near = groups and x(entry.compute.per_image) - x(groups[-1][-1].compute.per_image) < 24
        groups[-1].append(entry) if near else groups.append([entry])
    return [
        (
            sum(x(entry.compute.per_image) for entry in group) / len(group),
            ", ".join(str(entry.batch_size) for entry in group),
        )
        for group in groups
    ]


def _marker(precision: str, x: float, y: float, hollow: bool, tip: str | None) -> Markup:
    """Circle, square or triangle: the shape tells the precision as well as the colour."""
    shape = {
        "fp32": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        "fp16": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "int8": f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z",
    }[precision]
    focus = "0" if tip else None
    return _element(
        "path",
        _title(tip),
        d=shape,
        class_=f"mark {'hollow' if hollow else 'fill'}",
        data_tip=tip,
        tabindex=focus,
        role="img" if tip else None,
        aria_label=tip,
    )


def latency_bars(report: Report) -> Chart | None:
    """Median per batch, with the 90th percentile, one group for each batch size."""
    groups: dict[int, list[tuple[Row, int]]] = {}
    for row in report.rows:
        for index, entry in enumerate(row.latency):
            groups.setdefault(entry.batch_size, []).append((row, index))
    if not groups:
        return None
    labels = [report.title(row) + ("*" if row.latency_note else "") for row in report.rows if row.latency]
    left, right, y = 14.0 + 7.0 * max(map(len, labels)), 70.0, 0.0
    parts: list[Markup] = []
    for size, members in sorted(groups.items()):
        timings = [row.latency[index].compute for row, index in members]
        # A disturbed measurement has long tails: they must not squeeze the medians.
        longest = min(max(timing.p90 for timing in timings), 2 * max(timing.median for timing in timings))
        parts.append(_text(0, y + 13, f"batch {size}", "soft"))
        y += BAR
        for row, index in members:
            timing = row.latency[index].compute
            scale = (WIDTH - left - right) / longest
            title = report.title(row) + ("*" if row.latency_note else "")
            tip = (
                f"{report.title(row)}, batch {size}: median {milliseconds(timing.median)} ms, "
                f"p90 {milliseconds(timing.p90)}, p99 {milliseconds(timing.p99)}, {timing.runs:,} runs"
            )
            middle = y + BAR / 2
            reach = min(timing.p90, longest) * scale
            bar = [
                _text(left - 6, middle + 4, title, "end"),
                _rect(left, y + 3, timing.median * scale, BAR - 6, "faint" if row.latency_note else "fill"),
                _line(left + timing.median * scale, middle, left + reach, middle, "stroke"),
                _text(left + reach + 5, middle + 4, f"{milliseconds(timing.median)} ms"),
                _rect(0, y, WIDTH, BAR, "hit", tip),
            ]
            parts.append(_element("g", _join(bar), class_=row.precision))
            y += BAR
        y += GAP
    summary = "Median milliseconds per batch; the line reaches to the 90th percentile. Each batch size has its scale."
    return Chart("latency", "Latency per batch", summary, _join(parts), y)


def tensor_histogram(tensor: TensorFigures, number: int) -> Chart:
    """Counts of |x| (logarithmic) with the threshold; what lies beyond it is clipped. ``number``: in network order."""
    left, right, top, bottom, height = 34.0, 12.0, 20.0, 32.0, 170.0
    counts, span = tensor.histogram.counts, tensor.histogram.range or 1.0
    high = max(span, tensor.threshold or 0.0) * 1.02
    peak = math.log10(max(10, *counts)) if counts else 1.0
    base = height - bottom

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * value / high

    def y(count: float) -> float:
        return base - (base - top) * math.log10(count) / peak if count >= 1 else base

    parts: list[Markup] = []
    for power in range(1, math.floor(peak) + 1, max(1, math.floor(peak) // 3)):
        parts += [
            _line(left, y(10**power), WIDTH - right, y(10**power), "grid"),
            _text(left - 4, y(10**power) + 4, f"1e{power}", "soft end"),
        ]
    width = span / max(1, len(counts))
    for index, count in enumerate(counts):
        if not count:
            continue
        begin = index * width
        beyond = tensor.threshold is not None and begin >= tensor.threshold
        tip = f"|x| in {begin:.4g} to {begin + width:.4g}: {count:,} values{', clipped' if beyond else ''}"
        step = x(begin + width) - x(begin)
        # A count of 1 is 0 in the logarithm: it still shows.
        bar = min(y(count), base - 1.5)
        parts.append(_rect(x(begin), bar, step * 0.92, base - bar, "bad" if beyond else "plain", tip))
    for tick in ticks(0, high):
        parts.append(_text(x(tick), base + 15, f"{tick:g}", "soft mid"))
    parts.append(_line(left, base, WIDTH - right, base, "axis"))
    shape = f"values up to {tensor.histogram.maximum:.4g}"
    if tensor.threshold is not None:
        place = x(tensor.threshold)
        near = place > WIDTH * 0.6
        parts += [
            _line(place, top - 6, place, base, "limit"),
            _text(
                place - 5 if near else place + 5,
                top - 8,
                f"threshold {tensor.threshold:.4g}, {tensor.clipped or 0:.3g} % clipped",
                "soft end" if near else "soft",
            ),
        ]
        shape += f", threshold {tensor.threshold:.4g}, {tensor.clipped or 0:.3g} % of the values clipped"
    parts.append(_text(WIDTH - right, height - 2, "|x|, counts logarithmic", "soft end"))
    return Chart(
        f"histogram_{number:03d}_{_file_name(tensor.name)}", f"Histogram of {tensor.name}", shape, _join(parts), height
    )


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]


def tensor_noise(tensors: Sequence[TensorFigures]) -> Chart | None:
    """SQNR of each tensor: of its own scale, and in the INT8 network."""
    rows = [tensor for tensor in tensors if tensor.sqnr_db is not None or tensor.own_sqnr_db is not None]
    if not rows:
        return None
    values = [value for t in rows for value in (t.own_sqnr_db, t.sqnr_db) if value is not None]
    left, right, top, step = _label_width(tensor.name for tensor in rows), 16.0, 26.0, 24.0
    low, high = min(0.0, *values), max(*values, 1.0) * 1.04

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * (value - low) / (high - low)

    bottom = top + step * len(rows)
    parts = [
        _element("g", _marker("fp32", 144, 9, True, None), class_="fp32"),
        _text(154, 13, "its own scale alone"),
        _element("g", _marker("int8", 290, 10, False, None), class_="int8"),
        _text(300, 13, "in the INT8 network"),
    ]
    for tick in ticks(low, high):
        parts += [
            _line(x(tick), top, x(tick), bottom, "grid"),
            _text(x(tick), bottom + 15, f"{tick:g}", "soft mid"),
        ]
    for index, tensor in enumerate(rows):
        middle = top + step * (index + 0.5)
        tip = (
            f"{tensor.name}: {decibel(tensor.own_sqnr_db)} dB when quantized by itself, "
            f"{decibel(tensor.sqnr_db)} dB in the INT8 network"
        )
        parts.append(_text(left - 8, middle + 4, _short(tensor.name), "end"))
        if tensor.own_sqnr_db is not None:
            parts.append(_element("g", _marker("fp32", x(tensor.own_sqnr_db), middle, True, None), class_="fp32"))
        if tensor.sqnr_db is not None:
            parts.append(_element("g", _marker("int8", x(tensor.sqnr_db), middle, False, None), class_="int8"))
        parts.append(_rect(0, middle - step / 2, WIDTH, step, "hit", tip))
    parts.append(_text(WIDTH - right, bottom + 31, "SQNR against FP32, dB: more is better", "soft end"))
    summary = "; ".join(f"{tensor.name} {decibel(tensor.sqnr_db)} dB" for tensor in rows[:12])
    return Chart("tensor_noise", "Quantization noise of each tensor", summary, _join(parts), bottom + 36)


def layer_noise(report: Report, most: int = 30) -> Chart | None:
    """Each layer's part of the noise in the outputs, ranked."""
    if report.analysis is None or not report.analysis.layers:
        return None
    layers = report.analysis.layers[:most]
    left, right, step = _label_width(layer.layer for layer in layers), 56.0, 24.0
    longest = max(layer.noise_share for layer in layers) or 1.0
    parts: list[Markup] = []
    for index, layer in enumerate(layers):
        y = 4 + step * index
        width = (WIDTH - left - right) * layer.noise_share / longest
        tip = (
            f"{layer.layer}: {layer.noise_share:.1f} % of the noise; {_effect(layer.only_points, layer.only_sqnr_db)} "
            f"with this layer alone in INT8, {_effect(layer.without_points, layer.without_sqnr_db)} with all but it"
        )
        bar = [
            _text(left - 8, y + step / 2 + 4, _short(layer.layer), "end"),
            _rect(left, y + 4, width, step - 8, "fill"),
            _text(left + width + 6, y + step / 2 + 4, f"{layer.noise_share:.1f} %"),
            _rect(0, y, WIDTH, step, "hit", tip),
        ]
        parts.append(_element("g", _join(bar), class_="int8"))
    summary = ", ".join(f"{layer.layer} {layer.noise_share:.0f} %" for layer in layers[:10])
    return Chart(
        "layer_noise", "What each layer adds to the noise in the outputs", summary, _join(parts), step * len(layers) + 8
    )


def _effect(points: float | None, sqnr_db: float | None) -> str:
    return f"SQNR {decibel(sqnr_db)} dB" if points is None else f"top-1 {points:+.2f} points"


def _short(name: str, most: int = 24) -> str:
    """The end of a long name: what tells layers apart comes last."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _label_width(names: Iterable[str]) -> float:
    return max(60.0, 14 + 6.8 * max(len(_short(name)) for name in names))


def all_charts(report: Report) -> list[Chart]:
    """Every chart of a report, as they are saved to files."""
    charts = [
        accuracy_against_latency(report),
        latency_bars(report),
        layer_noise(report),
        tensor_noise(report.tensors),
        *(tensor_histogram(tensor, number) for number, tensor in enumerate(report.tensors)),
    ]
    return [chart for chart in charts if chart is not None]
