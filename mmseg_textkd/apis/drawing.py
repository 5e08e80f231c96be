# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Visualization of label maps and of similarities."""
import colorsys
import functools
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEGEND_WIDTH, ROW, TEXT_SIZE, NAME_X = 180, 22, 13, 36  # pixels
HEIGHT = 540  # of larger images the legend is larger too
GRAY = [128, 128, 128]


def palette_for(known: Sequence[Optional[Sequence[int]]]) -> List[List[int]]:
    """Complete a palette so that every class has a color.

    Args:
        known (Sequence): For each class its color (R, G, B), or None.

    Returns:
        list[list[int]]: Those colors, and others, as different as can be,
        in the places of None.
    """
    colors = []
    for number, color in enumerate(known):
        if color is None:
            # Turns of the golden ratio never come back to the same hue.
            hue = number * 0.618033988749895 % 1
            value = 1. - number // 12 % 3 * 0.25
            color = [
                round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.85, value)
            ]
        colors.append([int(v) for v in color])
    return colors


def draw_labels(image: np.ndarray,
                labels: np.ndarray,
                classes: Sequence[str],
                palette: Sequence[Sequence[int]],
                opacity: float = 0.5,
                legend: bool = True,
                font: Optional[str] = None) -> np.ndarray:
    """Blend an image with the colors of its label map.

    Args:
        image (np.ndarray): The image, uint8, RGB, shape (H, W, 3).
        labels (np.ndarray): Class numbers, shape (H, W).
        classes (Sequence[str]): Names of the classes.
        palette (Sequence[Sequence[int]]): Their colors, RGB. With those of
            an image in BGR in that order, so is what is returned.
        opacity (float): Weight of the colors, in [0, 1]. Defaults to 0.5.
        legend (bool): Whether the names of the classes that are seen stand
            to the right, in the order of the classes, so that those of a
            video do not jump; where there is no room for all, the largest.
            The end of a long name is cut. Defaults to True.
        font (str, optional): A TrueType font for them. Defaults to None:
            DejaVu Sans, which has Latin, Greek, Cyrillic and more, but no
            Chinese, Japanese or Korean letters.

    Returns:
        np.ndarray: uint8, RGB, shape (H, W, 3), or with a legend
        (H, W + 180, 3), wider by H / 540 if that is more than 1.
    """
    colors = np.array(palette, np.uint8)
    shown = cv2.addWeighted(
        colors.take(labels, axis=0), opacity, np.ascontiguousarray(image),
        1 - opacity, 0)
    if not legend:
        return shown
    rows = len(image) // round(max(1., len(image) / HEIGHT) * ROW)
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = [k for k in np.argsort(-counts, kind='stable') if counts[k]]
    entries = tuple(
        (classes[k], *colors[k].tolist()) for k in sorted(order[:rows]))
    return np.hstack([shown, _legend(len(image), entries, font)])


@functools.lru_cache(maxsize=64)
def _legend(height: int, entries: Tuple[Tuple, ...],
            font: Optional[str]) -> np.ndarray:
    """Draw a legend of names, each with its color; kept for videos."""
    scale = max(1., height / HEIGHT)
    row = round(scale * ROW)
    column, draw, font = _column(height, font)
    for number, (name, *color) in enumerate(entries):
        y = number * row
        draw.rectangle(
            (round(6 * scale), y + round(4 * scale), round(
                30 * scale), y + round(18 * scale)), tuple(color))
        draw.text((round(NAME_X * scale), y + row // 2),
                  _shorten(name, font, scale),
                  'black',
                  font,
                  anchor='lm')
    return np.asarray(column)


def _column(height: int, font: Optional[str] = None) -> tuple:
    """A white column beside an image, to be drawn into; and its font."""
    scale = max(1., height / HEIGHT)
    column = Image.new('RGB', (round(scale * LEGEND_WIDTH), height), 'white')
    font = ImageFont.truetype(
        font or str(_default_font()), round(scale * TEXT_SIZE))
    return column, ImageDraw.Draw(column), font


def draw_similarity(similarity: np.ndarray,
                    image: Optional[np.ndarray] = None,
                    title: str = '',
                    opacity: float = 0.7,
                    font: Optional[str] = None) -> np.ndarray:
    """Draw a map of cosines, from dark blue (lowest) to yellow (highest).

    Args:
        similarity (np.ndarray): Cosines, shape (H, W).
        image (np.ndarray, optional): What lies under the map, uint8, RGB,
            shape (H, W, 3). Defaults to None: nothing, and no legend.
        title (str): Words over the color bar. Defaults to ''.
        opacity (float): Of the map over the image. Defaults to 0.7.
        font (str, optional): As of :func:`draw_labels`. Defaults to None.

    Returns:
        np.ndarray: uint8, RGB, shape (H, W, 3), or over an image
        (H, W + 180, 3) with title and color bar.
    """
    low, high = float(similarity.min()), float(similarity.max())
    gray = (similarity - low) / max(high - low, 1e-6)

    def color(gray: np.ndarray) -> np.ndarray:
        gray = (255 * gray).round().astype(np.uint8)
        return cv2.applyColorMap(gray, cv2.COLORMAP_VIRIDIS)[..., ::-1]

    if image is None:
        return color(gray)
    shown = (1 - opacity) * image.mean(
        -1, keepdims=True) + opacity * color(gray)
    height = len(image)
    scale = max(1., height / HEIGHT)
    column, draw, font = _column(height, font)
    left, row = round(6 * scale), round(ROW * scale)
    draw.text((left, row // 2),
              _shorten(title, font, scale, left),
              'black',
              font,
              anchor='lm')
    column = np.array(column)
    bar = column[row + 4:height - 4, left:4 * left]
    if len(bar):
        bar[:] = color(np.linspace(1, 0, len(bar))[:, None])
        labels = Image.fromarray(column)
        draw = ImageDraw.Draw(labels)
        for y, value, anchor in ((row + 4, high, 'lt'), (height - 4, low,
                                                         'lb')):
            draw.text((5 * left, y), f'{value:.2f}', 'black', font, anchor)
        column = np.asarray(labels)
    return np.hstack([shown.astype(np.uint8), column])


def _shorten(name: str,
             font: ImageFont.FreeTypeFont,
             scale: float = 1.,
             left: int = 0) -> str:
    """Truncate a name to the width of the legend."""
    room = scale * (LEGEND_WIDTH - 6) - (left or scale * NAME_X)
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(f'{name}…') > room:
        name = name[:-1]
    return f'{name}…'


def _default_font() -> Path:
    """Get the font that ships with Matplotlib."""
    return Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
