"""Pictures that explain themselves: cells in rows and columns, with a title, labels and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sivae_dist.evaluation.grids import Pixels

_TEXT, _GROUND, _GREY = (20, 20, 20), (255, 255, 255), (105, 105, 105)
_SIZE, _GAP, _MARGIN, _PAD = 13, 2, 10, 6  # of text, between cells, around all, between text and cells; pixels
_APART = 12  # between the sources of a matrix and the matrix


def sheet(
    rows: Sequence[Sequence[Pixels | None]],
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    split_first: bool = False,
) -> Pixels:
    """One picture, uint8 (H, W, 3), on white.

    rows:     cells (h, w, 3) of one size; None stays empty, rows may have different lengths
    title:    above everything; wrapped at blanks where it is wider than the picture
    captions: a text below each cell, by row; shortened in the middle when too long
    split_first: the first row and column stand apart from the others
    """
    first = next(cell for row in rows for cell in row if cell is not None)
    height, width = map(int, first.shape[:2])
    font = ImageFont.load_default(_SIZE)
    line = _line_height(font)
    count = max(len(row) for row in rows)
    left = _MARGIN + (max(int(font.getlength(text)) for text in row_labels) + _PAD if row_labels else 0)
    extra = _APART if split_first else 0
    total = left + count * (width + _GAP) - _GAP + (extra if count > 1 else 0) + _MARGIN
    lines = _wrapped(title, total - 2 * _MARGIN, font) if title else []
    total = max(total, *(int(font.getlength(text)) + 2 * _MARGIN for text in lines or [""]))
    top = _MARGIN + len(lines) * line + (_PAD if lines else 0)
    cells_top = top + (line + 2 if column_labels else 0)
    pitch = height + _GAP + (line + 2 if captions else 0)
    bottom = cells_top + len(rows) * pitch - _GAP + (extra if len(rows) > 1 else 0) + _MARGIN
    picture = Image.new("RGB", (total, bottom), _GROUND)
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + i * line), text, _TEXT, font)

    def x_of(column: int) -> int:
        return left + column * (width + _GAP) + (extra if column else 0)

    for j, text in enumerate(column_labels):
        short = shortened(text, width, font)
        draw.text((x_of(j) + (width - font.getlength(short)) // 2, top), short, _TEXT, font)
    for i, row in enumerate(rows):
        y = cells_top + i * pitch + (extra if i else 0)
        if i < len(row_labels):
            draw.text((_MARGIN, y + (height - line) // 2), row_labels[i], _TEXT, font)
        for j, cell in enumerate(row):
            if cell is not None:
                picture.paste(Image.fromarray(cell), (x_of(j), y))
            if i < len(captions) and j < len(captions[i]):
                short = shortened(captions[i][j], width, font)
                draw.text((x_of(j) + (width - font.getlength(short)) // 2, y + height + 1), short, _GREY, font)
    return np.asarray(picture)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def shortened(text: str, width: int, font: Font) -> str:
    """The text itself if it fits into `width` pixels, else its beginning and end around three dots."""
    keep = len(text)
    short = text
    while keep > 2 and font.getlength(short) > width:
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"
    return short


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ayg|")[:4]
    return round(bottom + max(0.0, top)) + 1


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
