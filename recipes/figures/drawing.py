"""SVG by hand for the pictures of README and docs: few elements, the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
INK, MUTED, GRID, OURS, OTHER = "#1f2328", "#59636e", "#d8dee4", "#0072b2", "#d55e00"


@dataclass
class Drawing:
    """A picture of a fixed size on a white card, so that it can be read on a dark page too.

    Attributes:
        width: in pixels.
        height: in pixels.
        title: what a screen reader says in place of the picture.
        parts: the elements so far.
    """

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, *, size: int = 12, colour: str = INK, anchor: str = "start",
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Words whose baseline begins (or ends, or is centred) at x, y."""
        weight = ' font-weight="600"' if bold else ""
        at = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
        self.parts.append(f"<text {at}>{escape(words)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1.0) -> None:
        """A straight line."""
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.parts.append(f'<line {ends} stroke="{colour}" stroke-width="{width}"/>')

    def dot(self, x: float, y: float, colour: str, *, hollow: bool = False, radius: float = 3.6) -> None:
        """A point, filled or as a ring."""
        fill = "#ffffff" if hollow else colour
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="1.4"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle from its upper left corner."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{colour}"/>'
        )

    def interval(self, low: float, high: float, y: float, colour: str) -> None:
        """A horizontal interval with a stroke at either end."""
        self.line(low, y, high, y, colour, 1.6)
        for x in (low, high):
            self.line(x, y - 3.5, x, y + 3.5, colour, 1.6)

    def svg(self) -> str:
        """The file's text."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {FONT}>'
        card = f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" fill="#ffffff"'
        lines = [head, f"<title>{escape(self.title)}</title>", f'{card} stroke="{GRID}"/>', *self.parts, "</svg>"]
        return "\n".join(lines) + "\n"
