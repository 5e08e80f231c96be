# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Teach ToyCLIP's image tower what its patches show; its words stay."""
import time
from typing import Callable, Dict, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from corpus import CLASSES, NOUNS, TEMPLATES
from measure import MEAN, STD, word_vectors
from torch import Tensor, nn

from mmseg_textkd.clip.clip_features import CLIPFeatures, encode_image
from mmseg_textkd.datasets.toy_scenes_renderer import render_scene

SIDE = 128  # pixels of a window, sixteen patches
PATCH = 8
LEAST = 24  # pixels of a class in a window that make it a region
# Blocks from which on masks attend, see CLIPFeatures.mask_attention.
STARTS = (0, 1, 2)


def make_windows(seed: int, split: str,
                 num_scenes: int) -> Tuple[Tensor, Tensor]:
    """Cut a square window, in one of three sizes, out of each scene.

    Args:
        seed (int): Seed of the scenes.
        split (str): Name of the split; none of the data set's own.
        num_scenes (int): How many scenes to generate.

    Returns:
        tuple[Tensor, Tensor]: RGB pixels, uint8 with shape (N, 3, 128, 128),
        and labels, int64 with shape (N, 128, 128), 255 where there is none.
    """
    pixels, labels = [], []
    for index in range(num_scenes):
        scene = render_scene(seed, split, index)
        rng = np.random.default_rng([seed, index, 17])
        height, width = scene.label.shape
        side = int(min(height, SIDE / rng.choice([1, 1.5, 2.])))
        y = int(rng.integers(height - side + 1))
        x = int(rng.integers(width - side + 1))
        area = np.s_[y:y + side, x:x + side]
        image = torch.from_numpy(scene.image[area][..., ::-1].copy())
        label = torch.from_numpy(scene.label[area].astype(np.int64))
        size = (SIDE, SIDE)
        image = F.interpolate(
            image.permute(2, 0, 1)[None].float(),
            size,
            mode='bilinear',
            align_corners=False)
        pixels.append(image[0].round().byte())
        labels.append(F.interpolate(label[None, None].float(), size)[0, 0])
    return torch.stack(pixels), torch.stack(labels).long()


def normalise(pixels: Tensor) -> Tensor:
    """Bring uint8 pixels (N, 3, H, W) to what the tower takes."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def encode(visual: nn.Module, images: Tensor) -> CLIPFeatures:
    """Run the image tower on images of any size, with gradient.

    Args:
        visual (nn.Module): open_clip's image tower.
        images (Tensor): Normalized, shape (N, 3, H, W).

    Returns:
        CLIPFeatures: Tokens of all depths.
    """
    return encode_image(visual, images, visual.positional_embedding, 1.)


def shares(labels: Tensor) -> Tensor:
    """How much of each class is in each patch, shape (N, K, h, w)."""
    one_hot = F.one_hot(labels.clamp(max=len(CLASSES)), len(CLASSES) + 1)
    planes = one_hot[..., :-1].permute(0, 3, 1, 2).float()
    return F.avg_pool2d(planes, PATCH)


def region_losses(features: CLIPFeatures, labels: Tensor, text: Tensor,
                  scale: Tensor, start: int) -> Tensor:
    """Cross entropy of patches and of regions with the words of the classes.

    Each class counts alike, however large it is.

    Args:
        features (CLIPFeatures): What the tower made of N windows.
        labels (Tensor): Labels with shape (N, H, W).
        text (Tensor): Unit vectors of the K classes, shape (K, 64).
        scale (Tensor): CLIP's factor.
        start (int): Block from which on regions attend.

    Returns:
        Tensor: Their sum.
    """
    target = shares(labels)
    weight = target / target.sum((0, 2, 3), keepdim=True).clamp(min=1)
    patches = F.normalize(features.dense(1), dim=1)
    logs = torch.einsum('ndhw,kd->nkhw', patches,
                        text).mul(scale).log_softmax(dim=1)
    loss = -(weight * logs).sum() / len(CLASSES)
    planes = target * PATCH**2
    present = planes.sum((2, 3)) >= LEAST  # (N, K)
    masks = torch.where(target > .3, 10., -10.)
    regions = F.normalize(features.mask_attention(masks, start), dim=2)
    logs = (scale * regions @ text.T).log_softmax(dim=2)
    own = logs.diagonal(dim1=1, dim2=2) * present
    return loss - (own.sum(0) / present.sum(0).clamp(min=1)).mean()


def train_regions(model: nn.Module, tokenizer: Callable,
                  windows: Tuple[Tensor, Tensor], crop_loss: Callable,
                  steps: int, batch: int, seed: int) -> None:
    """Tune the image tower on patches, regions and crops; text is locked.

    As in `LiT <https://arxiv.org/abs/2111.07991>`_ the text tower stays what
    it is.

    Args:
        model (nn.Module): The open_clip model, trained on crops.
        tokenizer (Callable): Its tokenizer.
        windows (tuple[Tensor, Tensor]): Of :func:`make_windows`.
        crop_loss (Callable): Gives the contrastive loss of a batch of crops,
            drawn by the generator that it is called with.
        steps (int): Number of steps.
        batch (int): Windows a step.
        seed (int): Seed of what is drawn.
    """
    pixels, labels = windows
    model.requires_grad_(False)
    visual = model.visual.requires_grad_(True)
    rng = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(
        visual.parameters(), lr=1e-3, betas=(.9, .98), weight_decay=.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, steps, pct_start=.1)
    scale, begun = model.logit_scale.exp(), time.time()
    for step in range(steps):
        chosen = rng.choice(len(pixels), batch, replace=False)
        image, label = pixels[chosen], labels[chosen]
        if rng.random() < .5:
            image, label = image.flip(-1), label.flip(-1)
        words = [
            TEMPLATES[rng.integers(len(TEMPLATES))].format(
                NOUNS[name][rng.integers(len(NOUNS[name]))])
            for name in CLASSES
        ]
        with torch.no_grad():
            text = model.encode_text(tokenizer(words), normalize=True)
        features = encode(visual, normalise(image))
        start = int(rng.choice(STARTS))
        regions = region_losses(features, label, text, scale, start)
        loss = regions + crop_loss(rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0:
            print(
                f'step {step + 1}/{steps}: regions {regions.item():.3f}, '
                f'all {loss.item():.3f}, {time.time() - begun:.0f} s',
                flush=True)


@torch.no_grad()
def evaluate_regions(model: nn.Module, tokenizer: Callable,
                     windows: Tuple[Tensor, Tensor]) -> Dict[str, float]:
    """Held-out figures of patches and regions.

    Args:
        model (nn.Module): The open_clip model.
        tokenizer (Callable): Its tokenizer.
        windows (tuple[Tensor, Tensor]): Windows of scenes not trained on.

    Returns:
        dict[str, float]: Accuracy as mean over the classes (chance 1/8), of
        ``patches`` that are mostly of one class and of ``regions``, the
        pixels of a class in a window.
    """
    model.eval()
    pixels, labels = windows
    text = word_vectors(model, tokenizer, CLASSES)
    hits = torch.zeros(2, len(CLASSES))
    total = torch.zeros(2, len(CLASSES))
    for image, label in zip(pixels.split(32), labels.split(32)):
        features = encode(model.visual, normalise(image))
        target = shares(label)
        most, own = target.max(1)
        found = torch.einsum('ndhw,kd->nkhw', features.dense(1), text)
        patches = own[most > .5], found.argmax(1)[most > .5]
        masks = torch.where(target > .3, 10., -10.)
        found = features.mask_attention(masks, STARTS[-1]) @ text.T
        where = target.sum((2, 3)) * PATCH**2 >= LEAST
        regions = where.nonzero()[:, 1], found.argmax(2)[where]
        for i, (true, guess) in enumerate((patches, regions)):
            total[i] += torch.bincount(true, minlength=len(CLASSES))
            hits[i] += torch.bincount(
                true[true == guess], minlength=len(CLASSES))
    patches, regions = (hits / total.clamp(min=1)).mean(1).tolist()
    return dict(patches=patches, regions=regions)
