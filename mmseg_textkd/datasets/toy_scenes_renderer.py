# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Rendering of the scenes of ToyScenes."""
from dataclasses import dataclass
from typing import Iterator, List, Tuple

import cv2
import numpy as np

from .toy_scenes_painter import (BUILDING, BUILDING_COLORS, IGNORE_INDEX, ROAD,
                                 SIDEWALK, SKY, Canvas, SceneObject, draw_bin,
                                 draw_car, draw_person, draw_pole, draw_truck,
                                 shade)

LIGHTS = ('bright', 'cloudy', 'sunset', 'dark')


@dataclass
class Scene:
    """Rendered scene.

    Args:
        image (np.ndarray): H×W×3 uint8, BGR.
        label (np.ndarray): H×W uint8, class indices, 255 where unlabeled.
        objects (list[SceneObject]): What was drawn, back to front.
        light (str): One of ``LIGHTS``.
    """
    image: np.ndarray
    label: np.ndarray
    objects: List[SceneObject]
    light: str


def _noise(rng: np.random.Generator, shape: Tuple[int, int],
           cell: int) -> np.ndarray:
    """Make smooth noise of unit variance with a grain of ``cell`` pixels."""
    grid = rng.standard_normal((shape[0] // cell + 2, shape[1] // cell + 2),
                               dtype=np.float32)
    return cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _paint_background(cv: Canvas, light: str) -> None:
    """Paint the sky, the houses at the horizon and the walls at the sides."""
    rng = cv.rng
    zenith, low = dict(
        bright=((215, 150, 85), (225, 205, 180)),
        cloudy=((165, 160, 155), (195, 190, 186)),
        sunset=((150, 105, 110), (110, 160, 215)),
        dark=((60, 45, 40), (95, 80, 75)))[light]
    t = np.linspace(0, 1.6, cv.h)[:, None, None].clip(0, 1)
    sky = np.asarray(zenith) * (1 - t) + np.asarray(low) * t
    cloud = _noise(rng, (cv.h, cv.w), 48) * rng.uniform(4, 20)
    cv.img[:] = (sky + cloud[..., None]).clip(0, 255).astype(np.uint8)

    x = -rng.uniform(0, 40)
    while x < cv.w:
        width = rng.uniform(28, 90)
        if rng.random() < .85:
            top = cv.horizon * rng.uniform(.08, .75)
            _paint_wall(cv, [(x, top), (x + width, top),
                             (x + width, cv.horizon + 3), (x, cv.horizon + 3)])
        x += width + (rng.uniform(4, 26) if rng.random() < .3 else 0)


def _paint_wall(cv: Canvas, quad: List[Tuple[float, float]]) -> None:
    """Paint a facade on a quad (tl, tr, br, bl) with windows."""
    rng = cv.rng
    name = BUILDING_COLORS[rng.integers(len(BUILDING_COLORS))]
    wall = shade(name, rng, .85)
    cv.poly(quad, wall, BUILDING)
    tl, tr, br, bl = np.asarray(quad, np.float64)
    cols = int(max(2, abs(tr[0] - tl[0]) // rng.uniform(9, 16)))
    rows = int(
        max(2,
            max(bl[1] - tl[1], br[1] - tr[1]) // rng.uniform(12, 22)))
    lit, pane = rng.random((rows, cols)) < .2, rng.uniform(.35, 1.35)

    def at(u: float, v: float) -> np.ndarray:
        return (tl * (1 - u) + tr * u) * (1 - v) + (bl * (1 - u) + br * u) * v

    for r in range(rows):
        for c in range(cols):
            u, v, du, dv = (c + .25) / cols, (r +
                                              .25) / rows, .5 / cols, .5 / rows
            color = (130, 200, 220) if lit[r, c] else wall * pane
            cv.poly(
                [at(u, v),
                 at(u + du, v),
                 at(u + du, v + dv),
                 at(u, v + dv)], color, BUILDING)
    xs, ys = [p[0] for p in quad], [p[1] for p in quad]
    cv.note(BUILDING, (min(xs), min(ys), max(xs), max(ys)), name)


def _paint_ground(cv: Canvas) -> Tuple[float, float]:
    """Paint sidewalks, road and side walls; returns the road's edges.

    Asphalt and paving draw their gray from ranges that overlap; what tells
    them apart is the paving's joints, the markings and the place.
    """
    rng, hz, vx = cv.rng, cv.horizon, cv.vanish_x
    tint = rng.normal(0, 5, 3)
    pave = rng.uniform(92, 158) + tint + rng.normal(0, 4, 3)
    tar = rng.uniform(66, 122) + tint
    left = cv.w * rng.uniform(-.12, .27)
    right = cv.w * rng.uniform(.73, 1.12)
    cv.rect(0, hz, cv.w, cv.h, pave, SIDEWALK)
    joint = pave * rng.uniform(.8, .9)
    for x in np.arange(-2.5, 3.5, .075) * cv.w:
        cv2.line(cv.img, (int(vx + (x - vx) * .05), int(cv.row_at(.05))),
                 (int(x), cv.h), joint.tolist(), 1)
    for s in .06 * 1.22**np.arange(16):
        y = int(cv.row_at(s))
        cv2.line(cv.img, (0, y), (cv.w, y), joint.tolist(), 1)
    far = cv.w * .012
    cv.poly([(vx - far, hz), (vx + far, hz), (right, cv.h), (left, cv.h)], tar,
            ROAD)
    for x in (left, right):
        cv2.line(cv.img, (int(vx), int(hz)), (int(x), cv.h),
                 (pave * .7).tolist(), 2)
    if rng.random() < .8:
        for s in np.arange(rng.uniform(.08, .16), 1, .17):
            e, middle = s + .08, (left + right) / 2
            xs, xe = (vx + (middle - vx) * k for k in (s, e))
            cv.poly([(xs - 3 * s, cv.row_at(s)), (xs + 3 * s, cv.row_at(s)),
                     (xe + 3 * e, cv.row_at(e)), (xe - 3 * e, cv.row_at(e))],
                    tar + 75, ROAD)
    for edge, side in ((left, 0.), (right, float(cv.w))):
        if rng.random() < .65:
            outer = edge + (side - edge) * rng.uniform(.9, 2.2) + (
                rng.uniform(30, 110) * (1 if side else -1))
            s = (side - vx) / (outer - vx) if outer != vx else 1.
            if 0 < s < 1:
                depth, top = rng.uniform(.12, .4), -cv.h * rng.uniform(0, .3)
                xs = vx + (outer - vx) * s * depth
                quad = [(side, top), (xs, hz + (top - hz) * depth),
                        (xs, cv.row_at(s * depth)), (side, cv.row_at(s))]
                _paint_wall(
                    cv, quad
                    if side == 0 else [quad[1], quad[0], quad[3], quad[2]])
    return left, right


def _paint_things(cv: Canvas, left: float, right: float) -> None:
    """Paint the objects on the ground, back to front."""
    rng, vx, todo = cv.rng, cv.vanish_x, []

    def walk(s: float) -> float:
        """Sample a column on one of the sidewalks at perspective scale s."""
        edge, sign = (left, -1) if rng.random() < .5 else (right, 1)
        return vx + (edge - vx) * s + sign * cv.w * s * rng.uniform(.02, .22)

    def lane(s: float) -> float:
        return vx + (left + (right - left) * rng.uniform(.1, .9) - vx) * s

    for _ in range(rng.integers(1, 6)):
        s = rng.uniform(.1, .8)
        todo.append(
            (s, draw_car, lane(s), cv.w * .34 * s * rng.uniform(.9, 1.1)))
    if rng.random() < .3:
        s = rng.uniform(.18, .8)
        todo.append(
            (s, draw_truck, lane(s), cv.w * .5 * s * rng.uniform(.9, 1.1)))
    for _ in range(rng.integers(2, 8)):
        s = rng.uniform(.2, .8)
        x = walk(s) if rng.random() < .75 else lane(s)
        todo.append(
            (s, draw_person, x, cv.h * .42 * s * rng.uniform(.85, 1.1)))
    for _ in range(rng.integers(3, 7)):
        s = rng.uniform(.12, .7)
        todo.append((s, draw_pole, walk(s), cv.h * (.12 + .75 * s)))
    if rng.random() < .35:
        s = rng.uniform(.2, .6)
        todo.append((s, draw_bin, walk(s), cv.h * .2 * s))
    for s, draw, x, size in sorted(todo, key=lambda item: item[0]):
        draw(cv, x, cv.row_at(s), size)


def _finish(cv: Canvas, light: str) -> np.ndarray:
    """Apply texture, shadow, light, blur and noise, and resize."""
    rng, shape = cv.rng, (cv.h, cv.w)
    img = cv.img.astype(np.float32)
    amount = np.asarray([2, 9, 9, 8, 6, 7, 7, 7], np.float32)
    lab = np.where(cv.lab == IGNORE_INDEX, BUILDING, cv.lab)
    grain = _noise(rng, shape, 2) * .6 + _noise(rng, shape, 14) * .8
    img += (grain * amount[lab])[..., None]
    if rng.random() < .6:
        x, y = cv.w * rng.uniform(0, 1), cv.horizon
        wide = cv.w * rng.uniform(.1, .45)
        mask = np.zeros(shape, np.float32)
        cv2.fillPoly(mask, [
            np.int32([(x, y), (x + wide, y), (x + 1.6 * wide, cv.h),
                      (x - .6 * wide, cv.h)])
        ], 1.)
        img *= 1 - .38 * (mask * (lab != SKY))[..., None]
    tint = dict(
        bright=(1., 1.05, 1.1),
        cloudy=(.95, .95, .95),
        sunset=(.72, .86, 1.05),
        dark=(.58, .5, .48))[light]
    img *= np.asarray(tint, np.float32) * np.float32(rng.uniform(.85, 1.15))
    img = cv2.GaussianBlur(img, (0, 0), rng.uniform(.7, 1.6))
    img = cv2.resize(img, (cv.width, cv.height), interpolation=cv2.INTER_AREA)
    sigma = rng.uniform(2, 7)
    img += rng.standard_normal(img.shape, dtype=np.float32) * sigma
    return np.rint(img).clip(0, 255).astype(np.uint8)


def _outline(label: np.ndarray) -> np.ndarray:
    """Set the borders of large regions to 255."""
    solid = np.where((label == ROAD) | (label == SIDEWALK), SKY, label)
    kernel = np.ones((3, 3), np.uint8)
    # An opening drops thin and small things: they would be half rim.
    big = cv2.morphologyEx(solid, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
    rim = (cv2.dilate(big, kernel) != big) & (big == SKY) & (solid == SKY)
    out = label.copy()
    out[rim] = IGNORE_INDEX
    return out


def render_video(seed: int,
                 index: int,
                 frames: int,
                 height: int = 128,
                 width: int = 256) -> Iterator[Scene]:
    """Move a camera over one scene, with labels for every frame.

    The scene is painted half as large again; the camera moves to one side and
    forward, at a steady speed, and each frame has noise of its own. Labels
    are those of the pixel that a frame shows.

    Args:
        seed (int): Seed of the data set, >= 0.
        index (int): Number of the video, >= 0.
        frames (int): Number of frames.
        height (int): Defaults to 128 (pixels).
        width (int): Defaults to 256 (pixels).

    Yields:
        Scene: Frame after frame; ``objects`` are those of the whole scene.
    """
    scene = render_scene(seed, 'video', index, height * 3 // 2, width * 3 // 2)
    rng = np.random.default_rng([seed, *b'camera', index])
    side, speed = rng.choice([-1, 1]), rng.uniform(.4, 1.2)
    for number in range(frames):
        # From 0 to 1, whatever the length: a long video is a slow one.
        part = speed * number / max(frames - 1, 1) / 1.2
        scale = 1.45 - .35 * part  # forward: a smaller part, enlarged
        room = np.array([1.5 - scale, 1.5 - scale]) * [width, height] / 2
        center = np.array([.75 * width, .75 * height])
        center += room * [side * (2 * part - 1), part - .5]
        matrix = np.array([[scale, 0, center[0] - scale * width / 2],
                           [0, scale, center[1] - scale * height / 2]])
        views = [
            cv2.warpAffine(
                array,
                matrix, (width, height),
                flags=flag | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE)
            for array, flag in ((scene.image, cv2.INTER_LINEAR),
                                (scene.label, cv2.INTER_NEAREST))
        ]
        noisy = views[0] + rng.standard_normal(views[0].shape) * 3
        image = np.rint(noisy).clip(0, 255).astype(np.uint8)
        yield Scene(image, views[1], scene.objects, scene.light)


def render_scene(seed: int,
                 split: str,
                 index: int,
                 height: int = 128,
                 width: int = 256) -> Scene:
    """Render one scene, which depends on the arguments only.

    Args:
        seed (int): Seed of the data set, >= 0.
        split (str): Any name; its bytes are part of the random seed.
        index (int): Number of the image in its split, >= 0.
        height (int): Defaults to 128 (pixels).
        width (int): Defaults to 256 (pixels).

    Returns:
        Scene: Image, labels and the list of what was drawn.
    """
    rng = np.random.default_rng([seed, *split.encode(), index])
    cv = Canvas(height, width, rng)
    light = str(rng.choice(LIGHTS, p=[.4, .3, .18, .12]))
    cv.horizon = cv.h * rng.uniform(.36, .52)
    cv.vanish_x = cv.w * rng.uniform(.35, .65)
    _paint_background(cv, light)
    left, right = _paint_ground(cv)
    _paint_things(cv, left, right)
    label = _outline(np.ascontiguousarray(cv.lab[::2, ::2]))
    return Scene(_finish(cv, light), label, cv.objects, light)
