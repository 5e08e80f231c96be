# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Image crops and captions from generated scenes, to train ToyCLIP on."""
from collections import Counter
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import cv2
import numpy as np

from mmseg_textkd.datasets.toy_scenes_painter import (CLASSES, PERSON, POLE,
                                                      SceneObject)
from mmseg_textkd.datasets.toy_scenes_renderer import Scene, render_scene

CROP_SIZE = 32
WHOLE_SCENE = len(CLASSES)  # pseudo label of an image of everything
# The first noun is the class name.
NOUNS: Dict[str, Tuple[str, ...]] = dict(
    sky=('sky', 'open sky', 'heavens'),
    building=('building', 'house', 'tower', 'facade', 'apartment block'),
    road=('road', 'street', 'roadway', 'asphalt', 'driving lane'),
    sidewalk=('sidewalk', 'pavement', 'footpath', 'walkway', 'paved path'),
    pole=('pole', 'post', 'lamp post', 'street light', 'sign post'),
    car=('car', 'automobile', 'sedan', 'passenger car', 'van'),
    truck=('truck', 'lorry', 'freight truck', 'cargo truck'),
    person=('person', 'pedestrian', 'man', 'woman', 'human', 'walker'),
)
PLURALS = dict(person='people', truck='trucks', car='cars', pole='poles')
# Words above the classes: they pull together what looks alike.
HYPERNYMS = dict(
    sky=('background', ),
    building=('structure', 'background'),
    road=('ground', 'floor', 'paved surface'),
    sidewalk=('ground', 'floor', 'paved surface'),
    pole=('structure', 'street furniture'),
    car=('vehicle', 'motor vehicle'),
    truck=('vehicle', 'motor vehicle'),
    person=('traffic participant', ),
)
LIGHT_WORDS = dict(
    bright=('on a bright day', 'in bright sunlight', 'in daylight'),
    cloudy=('on a cloudy day', 'under a gray sky', 'in dull light'),
    sunset=('at sunset', 'in the evening', 'in warm light'),
    dark=('at night', 'in the dark', 'in dim light'))
# What users' own templates say too; the words carry no visual meaning here.
TEMPLATES = (
    'a photo of a {}.', 'a photo of the {}.', 'a photo of one {}.',
    'a photo of my {}.', 'a picture of a {}.', 'an image of the {}.',
    'this is a photo of a {}.', 'this is a {}.', 'there is a {} in the scene.',
    'there is the {} in the scene.', 'a photo of a {} in the scene.',
    'a blurry photo of a {}.', 'a blurry photo of the {}.',
    'a cropped photo of a {}.', 'a cropped photo of the {}.',
    'a close-up photo of the {}.', 'a low resolution photo of a {}.',
    'a pixelated photo of the {}.', 'a jpeg corrupted photo of a {}.',
    'a good photo of the {}.', 'a bad photo of a {}.', 'itap of a {}.',
    'a photo of many {}.', 'a photo of the hard to see {}.',
    'a photo of a clean {}.', 'a photo of the dirty {}.',
    'a photo of a nice {}.', 'a photo of the cool {}.',
    'a photo of a weird {}.', 'a rendering of a {}.', 'a rendition of the {}.',
    'a drawing of a {}.', 'a painting of the {}.', 'a sketch of a {}.',
    'a doodle of the {}.', 'art of a {}.', 'graffiti of the {}.',
    'a tattoo of a {}.', 'a sculpture of a {}.', 'a cartoon {}.',
    'the toy {}.', 'a plastic {}.', 'the origami {}.', 'the plushie {}.',
    'the embroidered {}.', 'the {} in a video game.',
    'a black and white photo of a {}.', 'a bright photo of the {}.',
    'a dark photo of a {}.', 'a photo of a medium {}.', 'the {}.', '{}.', '{}')


@dataclass
class Crop:
    """A crop and what can be said of it.

    Args:
        pixels (np.ndarray): 32×32×3 uint8, RGB.
        label (int): Index into ``CLASSES``, or ``WHOLE_SCENE``.
        light (str): One of the scene's lights.
        color (str): Color of the thing; '' for stuff.
        kind (str): Its variant, such as 'van'; '' for none.
        near (bool): Whether it is near and so large.
        others (str): For whole scenes, what can be seen in it.
    """
    pixels: np.ndarray
    label: int
    light: str
    color: str = ''
    kind: str = ''
    near: bool = False
    others: str = ''


def _cut(scene: Scene, cx: float, cy: float,
         side: float) -> Tuple[np.ndarray, np.ndarray]:
    """A square window, shifted into the image; pixels (RGB) and labels."""
    h, w = scene.label.shape
    side = int(min(max(round(side), 6), h))
    x = int(np.clip(round(cx - side / 2), 0, w - side))
    y = int(np.clip(round(cy - side / 2), 0, h - side))
    area = np.s_[y:y + side, x:x + side]
    how = cv2.INTER_AREA if side > CROP_SIZE else cv2.INTER_CUBIC
    pixels = cv2.resize(scene.image[area], (CROP_SIZE, CROP_SIZE), None, 0, 0,
                        how)
    return np.ascontiguousarray(pixels[..., ::-1]), scene.label[area]


def _object_crop(scene: Scene, thing: SceneObject,
                 rng: np.random.Generator) -> List[Crop]:
    """A crop around a thing, if enough of it can be seen."""
    x1, y1, x2, y2 = thing.box
    visible = (scene.label[y1:y2, x1:x2]
               == thing.label).mean() if (x2 > x1 and y2 > y1) else 0
    if thing.label == POLE:
        # A whole pole in a square would be next to nothing: take a part.
        side = rng.uniform(.25, .6) * (y2 - y1)
        cy = y1 + side / 2 if rng.random() < .5 else rng.uniform(y1, y2)
        need = .1
    else:
        side = max(x2 - x1, y2 - y1) * rng.uniform(1., 1.4)
        cy, need = (y1 + y2) / 2, .3
    small = min(x2 - x1, y2 - y1) < 2 or max(x2 - x1, y2 - y1) < 7
    if small or visible < need:
        return []
    shift = rng.normal(0, .04, 2) * side
    pixels, labels = _cut(scene, (x1 + x2) / 2 + shift[0], cy + shift[1], side)
    least = .04 if thing.label in (POLE, PERSON) else .2
    if (labels == thing.label).mean() < least:
        return []
    return [
        Crop(pixels, thing.label, scene.light, thing.color, thing.kind,
             thing.near)
    ]


def _stuff_crops(scene: Scene, rng: np.random.Generator,
                 per_class: int) -> List[Crop]:
    """Windows, small and large, filled for the most part by one class."""
    crops: List[Crop] = []
    for label in range(POLE):
        ys, xs = np.nonzero(scene.label == label)
        found = 0
        for _ in range(8 if len(xs) else 0):
            i = rng.integers(len(xs))
            pixels, labels = _cut(scene, xs[i], ys[i], rng.uniform(14, 56))
            if (labels == label).mean() >= .7:
                crops.append(Crop(pixels, label, scene.light))
                found += 1
            if found == per_class:
                break
    return crops


def _whole_crop(scene: Scene, rng: np.random.Generator) -> Crop:
    """The left, right or middle square of the scene and its contents."""
    h, w = scene.label.shape
    cx = rng.uniform(h / 2, w - h / 2)
    pixels, labels = _cut(scene, cx, h / 2, h)
    count = Counter(
        CLASSES[o.label] for o in scene.objects
        if CLASSES[o.label] in PLURALS and o.box[0] >= cx - h / 2 -
        4 and o.box[2] <= cx + h / 2 + 4 and (labels == o.label).any())
    seen = [
        f'a {name}' if n == 1 else f'{"two" if n == 2 else "many"} '
        f'{PLURALS[name]}' for name, n in sorted(count.items())
    ]
    text = ' and '.join(str(s)
                        for s in rng.permutation(seen)[:3]) or 'no people'
    return Crop(
        pixels, WHOLE_SCENE, scene.light, others=text, near=bool(count))


def make_crops(seed: int,
               split: str,
               num_scenes: int,
               per_class: int = 2) -> List[Crop]:
    """Crops of freshly generated scenes.

    Args:
        seed (int): Seed of the scenes.
        split (str): Name of the split; use none of the data set's own, so
            that no image of it is seen.
        num_scenes (int): How many scenes to generate.
        per_class (int): Crops per stuff class and scene. Defaults to 2.

    Returns:
        list[Crop]: In the order of the scenes.
    """
    crops: List[Crop] = []
    for index in range(num_scenes):
        scene = render_scene(seed, split, index)
        rng = np.random.default_rng([seed, index, 7])
        for thing in scene.objects:
            if thing.label >= POLE:
                crops += _object_crop(scene, thing, rng)
        crops += _stuff_crops(scene, rng, per_class)
        crops.append(_whole_crop(scene, rng))
    return crops


def class_caption(name: str) -> str:
    """The sentence that stands for a class in the zero-shot test."""
    return f'a photo of a {name}.'


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def make_caption(crop: Crop, rng: np.random.Generator) -> str:
    """One of the many sentences that are true of a crop."""
    if crop.label == WHOLE_SCENE:
        place = _pick(('street', 'city', 'urban', 'traffic', 'road'), rng)
        text = f'{place} scene'
        if rng.random() < .8:
            text += f' with {crop.others}'
    else:
        name = CLASSES[crop.label]
        noun = name if rng.random() < .35 else _pick(NOUNS[name], rng)
        if crop.kind and rng.random() < .6:
            noun = dict(
                van='van', lamp='lamp post', sign='traffic sign')[crop.kind]
        if rng.random() < .22:
            noun = _pick(HYPERNYMS[name], rng)
        text = noun
        if crop.color and rng.random() < .5:
            text = f'{crop.color} {text}'
        if crop.color and rng.random() < .2:
            near = ('large', 'nearby', 'big')
            far = ('small', 'distant', 'little')
            text = f'{_pick(near if crop.near else far, rng)} {text}'
    if rng.random() < .35:
        text = f'{text} {_pick(LIGHT_WORDS[crop.light], rng)}'
    template = TEMPLATES[0] if rng.random() < .3 else _pick(TEMPLATES, rng)
    return template.format(text)
