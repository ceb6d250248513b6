"""Learning curves as PNG and SVG with matplotlib (extra `control`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import Band, band
from .record import Run

# Told apart in print and by the colour-blind (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = (("return_mean", "mean return"), ("entropy", "entropy, nats"), ("value_loss", "value loss"))


def figure(num_panels: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('Plots need matplotlib: pip install "llm-policy-gradient[control]"') from error
    drawing = Figure(figsize=(width * num_panels**0.75, height), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, num_panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def draw_band(axis: Any, band_: Band, label: str | None, colour: str) -> None:
    axis.plot(band_.steps, band_.median, color=colour, label=label, linewidth=1.6)
    if (band_.high > band_.low).any():
        axis.fill_between(band_.steps, band_.low, band_.high, color=colour, alpha=0.2, linewidth=0)


def save(drawing: Any, path: Path) -> list[Path]:
    """Write `path` with the endings .png and .svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = [path.with_suffix(".png"), path.with_suffix(".svg")]
    drawing.savefig(out[0], dpi=120)
    drawing.savefig(out[1], metadata={"Date": None})
    return out


def compare(runs: Mapping[str, Sequence[Run]], key: str, axis: Any, label: str | None = None) -> None:
    """One band for each name."""
    for (name, of_name), colour in zip(runs.items(), COLOURS, strict=False):
        found = band([run.points for run in of_name], key)
        if found is not None:
            draw_band(axis, found, name, colour)
    axis.set_xlabel("environment steps")
    axis.set_ylabel(label or key)


def plot_runs(runs: Sequence[Run], path: Path) -> list[Path]:
    """Return, entropy and value loss over steps: the median of the seeds and the band between the quartiles."""
    settings = runs[0].settings
    panels = [(key, label) for key, label in PANELS if band([run.points for run in runs], key) is not None]
    drawing, axes = figure(len(panels))
    for axis, (key, label) in zip(axes, panels, strict=True):
        compare({"median, quartiles" if len(runs) > 1 else "": runs}, key, axis, label)
    true = band([run.points for run in runs], "true_return_mean")
    if true is not None:
        axes[0].get_lines()[0].set_label("trained reward")
        draw_band(axes[0], true, "true reward", COLOURS[1])
    if runs[0].threshold is not None:
        axes[0].axhline(runs[0].threshold, color="#777777", linestyle=":", linewidth=1.2, label="solved")
    if len(runs) > 1 or true is not None or runs[0].threshold is not None:
        axes[0].legend(frameon=False)
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else f", seed {settings.seed}"
    drawing.suptitle(f"{settings.row.name} on {settings.env}{seeds}")
    return save(drawing, path)
