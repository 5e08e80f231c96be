# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Drawing of the objects of ToyScenes (numpy and OpenCV only).

Every shape is drawn twice with the same polygon: with a color into the
image and with a class into the label map. Both canvases have twice the final
size, so that the image can be area-averaged (soft edges, mixed pixels) while
the labels stay crisp.
"""
from dataclasses import dataclass, field
from typing import Dict, List, Sequence, Tuple

import cv2
import numpy as np

CLASSES = ('sky', 'building', 'road', 'sidewalk', 'pole', 'car', 'truck',
           'person')
# Those of Cityscapes, but for the truck, which must stand out from the car.
PALETTE = [[70, 130, 180], [70, 70, 70], [128, 64, 128], [244, 35, 232],
           [153, 153, 153], [0, 0, 142], [255, 140, 0], [220, 20, 60]]
IGNORE_INDEX = 255
SKY, BUILDING, ROAD, SIDEWALK, POLE, CAR, TRUCK, PERSON = range(8)

# BGR, all a little washed out so that no class is given away by its color.
COLORS: Dict[str, Tuple[int, int, int]] = dict(
    red=(55, 50, 165),
    blue=(160, 95, 55),
    green=(75, 115, 65),
    yellow=(60, 165, 190),
    white=(205, 205, 205),
    black=(45, 42, 42),
    gray=(122, 120, 118),
    brown=(60, 85, 120),
)
VEHICLE_COLORS = ('red', 'blue', 'green', 'yellow', 'white', 'black', 'gray')
CLOTHES_COLORS = tuple(COLORS)
BUILDING_COLORS = ('red', 'yellow', 'white', 'gray', 'brown', 'blue')


@dataclass
class SceneObject:
    """Object in a scene, for captions and crops.

    Args:
        label (int): Index into ``CLASSES``.
        box (tuple[int]): x1, y1, x2, y2 in pixels of the final image.
        color (str): Key of ``COLORS``.
        near (bool): Whether it stands in the front half of the ground.
        kind (str): Variant, such as 'van' or 'lamp'. Defaults to ''.
    """
    label: int
    box: Tuple[int, int, int, int]
    color: str
    near: bool
    kind: str = ''


@dataclass
class Canvas:
    """Image and label map at twice the final size.

    Args:
        height (int): Final height in pixels.
        width (int): Final width in pixels.
        rng (np.random.Generator): The only source of chance.
    """
    height: int
    width: int
    rng: np.random.Generator
    objects: List[SceneObject] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.h, self.w = 2 * self.height, 2 * self.width
        self.img = np.zeros((self.h, self.w, 3), np.uint8)
        self.lab = np.full((self.h, self.w), SKY, np.uint8)
        self.horizon = 0.
        self.vanish_x = 0.

    def poly(self, points: Sequence, color: Sequence, label: int) -> None:
        """Fill a polygon in the image and in the label map."""
        pts = np.round(np.asarray(points, np.float64)).astype(np.int32)
        cv2.fillPoly(self.img, [pts],
                     [int(min(max(c, 0), 255)) for c in color])
        cv2.fillPoly(self.lab, [pts], int(label))

    def rect(self, x1: float, y1: float, x2: float, y2: float, color: Sequence,
             label: int) -> None:
        """Fill an axis-aligned rectangle."""
        self.poly([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], color, label)

    def disc(self, x: float, y: float, rx: float, ry: float, color: Sequence,
             label: int) -> None:
        """Fill an ellipse."""
        angle = np.linspace(0, 2 * np.pi, 17)[:-1]
        self.poly(
            np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1),
            color, label)

    def scale_at(self, y: float) -> float:
        """Perspective scale of the ground at row ``y``: 0 far, 1 near."""
        return (y - self.horizon) / (self.h - self.horizon)

    def row_at(self, scale: float) -> float:
        """Row where the ground has perspective scale ``scale``."""
        return self.horizon + scale * (self.h - self.horizon)

    def note(self,
             label: int,
             box: Sequence[float],
             color: str,
             kind: str = '') -> None:
        """Record a drawn object with its box in final pixels."""
        x1, y1, x2, y2 = (int(round(v / 2)) for v in box)
        box = (max(x1, 0), max(y1,
                               0), min(x2 + 1,
                                       self.width), min(y2 + 1, self.height))
        near = self.scale_at(min(y2 * 2, self.h)) > 0.42
        self.objects.append(SceneObject(label, box, color, near, kind))


def shade(color: str,
          rng: np.random.Generator,
          gain: float = 1.) -> np.ndarray:
    """Get a named color with random brightness and shift."""
    base = np.asarray(COLORS[color], np.float64)
    return base * gain * rng.uniform(0.8, 1.2) + rng.normal(0, 7, 3)


def draw_shadow(cv: Canvas, x: float, y: float, rx: float) -> None:
    """Draw the shadow of an object; labels are unchanged."""
    mask = np.zeros(cv.lab.shape, np.uint8)
    cv2.ellipse(mask, (int(x), int(y)), (int(rx), int(rx * .2) + 1), 0, 0, 360,
                1, -1)
    cv.img[mask > 0] = (cv.img[mask > 0] * .5).astype(np.uint8)


def draw_car(cv: Canvas, x: float, y: float, w: float) -> None:
    """Draw a sedan or, one time in five, a van, which resembles a truck.

    Args:
        cv (Canvas): Where to draw.
        x (float): Center column of the car.
        y (float): Row of its wheels' lowest points.
        w (float): Its width.
    """
    rng = cv.rng
    name = VEHICLE_COLORS[rng.integers(len(VEHICLE_COLORS))]
    body, glass = shade(name, rng), rng.uniform(40, 120) * np.ones(3)
    turn, van = rng.choice([-1, 1]), rng.random() < 0.2
    h, x0, x1 = w * (.55 if van else .42), x - w / 2, x + w / 2
    draw_shadow(cv, x, y, w * .55)
    mid, top = y - h * .5, y - h
    a, b, c, d = (-.48, .30, -.46, .44) if van else (-.28, .16, -.40, .32)
    roof = [(x + turn * w * c, mid + 1), (x + turn * w * a, top),
            (x + turn * w * b, top), (x + turn * w * d, mid + 1)]
    cv.poly(roof, body * .95, CAR)
    shrink = np.asarray(roof) * .78 + np.asarray([x, (mid + top) / 2]) * .22
    cv.poly(shrink, glass, CAR)
    cv.rect(x - w * .02, top, x + w * .02, mid, body * .95, CAR)
    cv.poly([(x0, mid + h * .08), (x0 + w * .05, mid), (x1 - w * .05, mid),
             (x1, mid + h * .08), (x1, y - h * .1), (x0, y - h * .1)], body,
            CAR)
    cv.rect(x0, y - h * .2, x1, y - h * .1, body * .6, CAR)
    for wx in (x - w * .29, x + w * .29):
        cv.disc(wx, y - h * .14, w * .09, w * .09, (28, 28, 28), CAR)
    cv.rect(x1 - w * .06, mid + h * .1, x1, mid + h * .2, (120, 200, 220), CAR)
    cv.note(CAR, (x0, top, x1, y), name, 'van' if van else '')


def draw_truck(cv: Canvas, x: float, y: float, w: float) -> None:
    """Draw a truck with a tall load box and a lower cab."""
    rng = cv.rng
    name = VEHICLE_COLORS[rng.integers(len(VEHICLE_COLORS))]
    load, turn = shade(name, rng), rng.choice([-1, 1])
    cab = shade(VEHICLE_COLORS[rng.integers(len(VEHICLE_COLORS))], rng)
    h = w * rng.uniform(.52, .62)
    draw_shadow(cv, x, y, w * .55)

    def at(u: float) -> float:
        return x + turn * w * u

    cv.rect(at(-.5), y - h, at(.2), y - h * .2, load, TRUCK)
    for u in np.linspace(-.4, .1, 5):
        cv.rect(
            at(u), y - h * .95, at(u + .012), y - h * .25, load * .8, TRUCK)
    cv.rect(at(.2), y - h * .74, at(.5), y - h * .15, cab, TRUCK)
    cv.poly([(at(.3), y - h * .68), (at(.47), y - h * .68),
             (at(.5), y - h * .45), (at(.3), y - h * .45)],
            rng.uniform(40, 120) * np.ones(3), TRUCK)
    cv.rect(at(-.5), y - h * .22, at(.5), y - h * .12, (50, 50, 50), TRUCK)
    for u in (-.38, -.2, .36):
        cv.disc(at(u), y - h * .12, w * .07, w * .07, (28, 28, 28), TRUCK)
    cv.note(TRUCK, (x - w / 2, y - h, x + w / 2, y), name)


def draw_person(cv: Canvas, x: float, y: float, h: float) -> None:
    """Draw a standing or walking person of height ``h``, feet at (x, y)."""
    rng = cv.rng
    name = CLOTHES_COLORS[rng.integers(len(CLOTHES_COLORS))]
    coat, legs = shade(name, rng), shade(
        CLOTHES_COLORS[rng.integers(len(CLOTHES_COLORS))], rng, .8)
    skin = np.asarray([110, 140, 190]) * rng.uniform(.45, 1.1)
    step, w = rng.uniform(.02, .13) * h, h * .17
    draw_shadow(cv, x, y, w * 1.3)
    for side in (-1, 1):
        cv.poly([(x - w * .6, y - h * .48), (x + w * .6, y - h * .48),
                 (x + side * step + w * .35, y),
                 (x + side * step - w * .35, y)], legs, PERSON)
    cv.poly([(x - w, y - h * .8),
             (x + w, y - h * .8), (x + w * .8, y - h * .42),
             (x - w * .8, y - h * .42)], coat, PERSON)
    cv.disc(x, y - h * .89, h * .1, h * .11, skin, PERSON)
    cv.note(PERSON, (x - w - step, y - h, x + w + step, y), name)


def draw_pole(cv: Canvas, x: float, y: float, h: float) -> None:
    """Draw a lamp post, a sign post or a bare pole at (x, y)."""
    rng = cv.rng
    name = str(rng.choice(['gray', 'black', 'brown', 'green']))
    paint = shade(name, rng)
    half = max(2., h * rng.uniform(.018, .03))
    kind = str(rng.choice(['lamp', 'sign', '']))
    cv.rect(x - half, y - h, x + half, y, paint, POLE)
    reach = half
    if kind == 'lamp':
        reach = h * .16 * rng.choice([-1, 1])
        x1, x2 = sorted((x, x + reach))
        cv.rect(x1, y - h, x2, y - h + 2 * half, paint, POLE)
        cv.disc(x + reach, y - h + half, h * .035, h * .02, (150, 210, 225),
                POLE)
    elif kind == 'sign':
        reach = h * .055
        cv.disc(x, y - h, reach, reach, shade('red', rng), POLE)
        cv.disc(x, y - h, reach * .6, reach * .6, (190, 190, 190), POLE)
    x1, x2 = sorted((x - half, x + reach))
    cv.note(POLE, (x1, y - h, x2, y), name, kind)


def draw_bin(cv: Canvas, x: float, y: float, h: float) -> None:
    """Draw a litter bin, which is no class and stays unlabeled."""
    w, paint = h * .35, shade('green', cv.rng, .8)
    cv.rect(x - w, y - h, x + w, y, paint, IGNORE_INDEX)
    cv.rect(x - w, y - h, x + w, y - h * .85, paint * .5, IGNORE_INDEX)
