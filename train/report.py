"""The report of a comparison: one HTML file that needs no network, and its plots."""

import base64
import dataclasses
import html
import io
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure

from jattn.train.files import write_atomically

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class SchemeResult:
    """What one scheme reached in a comparison.

    Attributes:
      scheme: Its name.
      parameters: Trained numbers.
      validation_bits_per_byte: At the last step.
      training_tokens_per_second: Median over the run, compilation excluded.
      decode_tokens_per_second: One sequence, at the end of a full context.
      cache_bytes: Of one sequence at the end of a full context.
      peak_bytes: What the compiled training step holds at most.
      skipped_steps: Steps whose loss or gradient was not finite.
      curve: (step, validation bits per byte), in order of steps.
      sample: What the trained model wrote.
    """

    scheme: str
    parameters: int
    validation_bits_per_byte: float
    training_tokens_per_second: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int
    skipped_steps: int
    curve: tuple[tuple[int, float], ...]
    sample: str


# Heading, what it means, and how a result shows it.
COLUMNS = (
    ("scheme", "sequence mixer", lambda r: r.scheme),
    ("params", "trained numbers", lambda r: f"{r.parameters:,}"),
    (
        "bits/byte",
        "validation, at the last step; lower is better",
        lambda r: f"{r.validation_bits_per_byte:.3f}",
    ),
    (
        "train tok/s",
        "median over the run, compilation excluded",
        lambda r: f"{r.training_tokens_per_second:,.0f}",
    ),
    (
        "decode tok/s",
        "one sequence, at the end of a full context",
        lambda r: f"{r.decode_tokens_per_second:,.0f}",
    ),
    (
        "cache KiB",
        "one sequence, at the end of a full context",
        lambda r: f"{r.cache_bytes / 1024:,.1f}",
    ),
    (
        "peak MiB",
        "what the compiled training step holds at most",
        lambda r: f"{r.peak_bytes / MEBIBYTE:,.1f}",
    ),
    (
        "skipped",
        "steps whose loss or gradient was not finite",
        lambda r: str(r.skipped_steps),
    ),
)


def table_rows(results: Sequence[SchemeResult]) -> list[list[str]]:
    """The cells of the table, one row a scheme, best bits per byte first."""
    ranked = sorted(results, key=lambda r: r.validation_bits_per_byte)
    return [[show(result) for _, _, show in COLUMNS] for result in ranked]


def curves_figure(
    results: Sequence[SchemeResult], references: Mapping[str, float]
) -> matplotlib.figure.Figure:
    """Validation bits per byte over the steps, with reference lines."""
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        steps = [step for step, _ in result.curve]
        values = [value for _, value in result.curve]
        axes.plot(steps, values, marker=".", label=result.scheme)
    for name, value in references.items():
        axes.axhline(value, color="gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
            color="gray",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("validation bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def trade_off_figure(results: Sequence[SchemeResult]) -> matplotlib.figure.Figure:
    """Quality against what it costs to train and to decode."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    costs = (
        ("training tokens/s", lambda r: r.training_tokens_per_second),
        ("cache KiB of one full context", lambda r: r.cache_bytes / 1024),
    )
    for axes, (label, cost) in zip(figure.subplots(1, 2), costs, strict=True):
        for result in results:
            point = (cost(result), result.validation_bits_per_byte)
            axes.scatter(*point)
            axes.annotate(
                result.scheme, point, xytext=(4, 4), textcoords="offset points"
            )
        axes.set_xscale("log")
        axes.margins(0.15)
        axes.set_xlabel(label)
        axes.set_ylabel("validation bits per byte")
        axes.grid(alpha=0.3)
    return figure


def write_report(
    directory: pathlib.Path,
    results: Sequence[SchemeResult],
    references: Mapping[str, float],
    setup: Mapping[str, str],
) -> pathlib.Path:
    """Writes report.html and its plots into directory.

    Args:
      directory: Where to; it exists.
      results: One or more.
      references: Bits per byte to draw as lines, by name.
      setup: What the comparison was run with, by name.

    Returns:
      The path of report.html.

    Raises:
      UserError: A file cannot be written; the one before is as it was.
    """
    figures = {
        "Validation loss": ("curves.png", curves_figure(results, references)),
        "Quality against cost": ("trade_off.png", trade_off_figure(results)),
    }
    images = {}
    for heading, (name, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        images[heading] = buffer.getvalue()
        write_atomically(directory / name, buffer.getvalue())
    page = _page(results, references, setup, images)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto;
       padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr.reference { color: #777; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap;
      overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; }
dd { margin: 0; }
"""


def _page(results, references, setup, images) -> str:
    escape = html.escape
    head = "".join(
        f'<th title="{escape(meaning)}">{escape(name)}</th>'
        for name, meaning, _ in COLUMNS
    )
    rows = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table_rows(results)
    ]
    rows += [
        f'<tr class="reference"><td>{escape(name)}</td><td></td>'
        f"<td>{value:.3f}</td>" + "<td></td>" * (len(COLUMNS) - 3) + "</tr>"
        for name, value in references.items()
    ]
    legend = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning, _ in COLUMNS
    )
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in setup.items()
    )
    pictures = "".join(
        f"<h2>{escape(heading)}</h2>"
        f'<img alt="{escape(heading)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for heading, png in images.items()
    )
    samples = "".join(
        f"<h3>{escape(result.scheme)}</h3><pre>{escape(result.sample)}</pre>"
        for result in results
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>jattn comparison</title><style>{STYLE}</style></head><body>"
        "<h1>Sequence mixers, side by side</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<dl>{legend}</dl>{pictures}<h2>Setup</h2><dl>{facts}</dl>"
        f"<h2>Samples</h2>{samples}</body></html>"
    )
