"""Records `llm-pg quickstart` in a terminal of its own, and writes the recording as an animated SVG.

    pip install pyte && python recipes/figures/terminal.py      # runs it (a minute or two), docs/images/quickstart.svg

The run is real: a pseudo-terminal of 100 by 38 characters, read with the time of every byte. The title says how much
faster it is played. tests/docs/test_pictures.py fails where its screen has other lines than the terminal draws today.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[2] / "docs" / "images" / "quickstart.svg"
COLUMNS, LINES = 100, 38
CELL, ROW, MARGIN, BAR = 8.0, 17, 14, 34
BEGIN = "Before"  # the line that ends the preparations
NUM_SCREENS, SECONDS = 16, 11.0  # screens at even distances from there on, and how long they are shown in all
STAYS = {"Held-out prompts, before and after": 4.0, "": 5.0}  # seconds of the screen with this line; of the last one
PALETTE = {"red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff", "magenta": "#d2a8ff",
           "cyan": "#76e3ea", "white": "#f0f6fc", "black": "#6e7681", "default": "#d1d7e0"}  # fmt: skip

Span = tuple[int, str, str, bool]  # column, text, colour, bold
Screen = list[list[Span]]


def record(command: Sequence[str]) -> list[tuple[float, str]]:
    """What a command writes to a terminal, each piece with its second."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    pieces, began = [], time.monotonic()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end in the middle of a character
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            list(command), stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder
        )
        os.close(theirs)
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # its other end is closed
                    break
                pieces.append((time.monotonic() - began, decoder.decode(piece)))
        if process.wait() != 0:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return pieces


def screens(pieces: Sequence[tuple[float, str]], shown: str) -> tuple[list[tuple[Screen, float]], float]:
    """Screens with the seconds that each is shown: the first output, screens at even distances from BEGIN on, those of
    STAYS and the last one; and how many times as fast those at even distances are."""
    import pyte

    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    stream.feed(f"$ {shown}\r\n")
    begin, last, each = next(at for at, piece in pieces if BEGIN in piece), pieces[-1][0], SECONDS / NUM_SCREENS
    out: list[tuple[Screen, float]] = []
    due = [pieces[0][0], *(begin + (last - begin) * i / NUM_SCREENS for i in range(NUM_SCREENS))]
    waited, stays = [line for line in STAYS if line], ""
    for seconds, piece in pieces:
        if piece.startswith(("\r", "\x1b")):  # what was written together is whole
            if stays:
                out.append((_spans(screen), STAYS[stays]))
                stays = ""
            while due and seconds >= due[0]:
                out.append((_spans(screen), each))
                due.pop(0)
        stream.feed(piece)
        if waited and waited[0] in piece:
            stays = waited.pop(0)
    return [*out, (_spans(screen), STAYS[""])], (last - begin) / SECONDS


def _spans(screen: Any) -> Screen:
    lines: Screen = []
    for y in range(LINES):
        spans: list[Span] = []
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            colour = PALETTE.get(cell.fg.removeprefix("bright"), f"#{cell.fg}" if len(cell.fg) == 6 else "#d1d7e0")
            if spans and spans[-1][2:] == (colour, cell.bold) and spans[-1][0] + len(spans[-1][1]) == x:
                spans[-1] = (spans[-1][0], spans[-1][1] + cell.data, colour, cell.bold)
            else:
                spans.append((x, cell.data, colour, cell.bold))
        lines.append([span for span in spans if span[1].strip()])
    return lines


def _text(screen: Screen, top: float) -> Iterator[str]:
    for y, line in enumerate(screen):
        for column, words, colour, bold in line:
            kept = words.rstrip()
            column += len(kept) - len(kept.lstrip())
            kept = kept.lstrip()
            at = f'x="{MARGIN + CELL * column:g}" y="{top + ROW * (y + 1):g}" textLength="{CELL * len(kept):g}"'
            style = f' fill="{colour}"' + (' class="b"' if bold else "")
            yield f"<text {at}{style}>{escape(kept)}</text>"


def svg(shown: Sequence[tuple[Screen, float]], faster: float, command: str) -> str:
    """The screens one below the other, moved up by one at its time; where nothing may move, the last one alone."""
    width, height = 2 * MARGIN + CELL * COLUMNS, BAR + ROW * (LINES + 1)
    total, at, moves = sum(seconds for _, seconds in shown), 0.0, []
    for i, (_, seconds) in enumerate(shown):
        moves.append(f"{100 * at / total:.2f}% {{transform:translateY(-{height * i}px)}}")
        at += seconds
    last = height * (len(shown) - 1)
    style = (
        "text{font:13.2px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}"
        ".b{font-weight:700}"
        f"@keyframes s{{{' '.join(moves)} 100% {{transform:translateY(-{last}px)}}}}"
        f".s{{animation:s {total:g}s steps(1,end) infinite}}"
        f"@media (prefers-reduced-motion:reduce){{.s{{animation:none;transform:translateY(-{last}px)}}}}"
    )
    title = f"{command}: a real run; its training is played {faster:.0f} times as fast"
    size = f'width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}"'
    body = [line for i, (screen, _) in enumerate(shown) for line in _text(screen, BAR + height * i)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>',
        f"<style>{style}</style>",
        f'<clipPath id="c"><rect x="0" y="{BAR}" width="{width:g}" height="{height - BAR}"/></clipPath>',
        f'<rect width="{width:g}" height="{height}" rx="8" fill="#0d1117"/>',
        f'<text x="{MARGIN}" y="22" fill="#8b949e">{escape(title)}</text>',
        '<g clip-path="url(#c)"><g class="s">', *body, "</g></g>", "</svg>",
    ]) + "\n"  # fmt: skip


def last_screen(recording: str) -> list[str]:
    """The lines of the last screen of a recording."""
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" textLength[^>]*>([^<]*)</text>', recording)
    rows: dict[float, list[tuple[float, str]]] = {}
    for x, y, words in found:
        rows.setdefault(float(y), []).append((float(x), unescape(words)))
    last = max(rows) - ROW * LINES
    lines = []
    for _, spans in sorted((y, spans) for y, spans in rows.items() if y > last):
        line = ""
        for x, words in sorted(spans):
            line = line.ljust(round((x - MARGIN) / CELL)) + words
        lines.append(line)
    return lines


def main() -> None:
    pieces = record([sys.executable, "-m", "llm_pg", "quickstart"])
    shown, faster = screens(pieces, "llm-pg quickstart")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(svg(shown, faster, "llm-pg quickstart"), encoding="utf-8")
    print(OUT, f"{OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
