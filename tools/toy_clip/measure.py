# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""How well a ToyCLIP tells held-out crops and words apart."""
from typing import Dict, List

import numpy as np
import torch
import torch.nn.functional as F
from corpus import CLASSES, Crop, class_caption, make_caption

MEAN = (0.48145466, 0.4578275, 0.40821073)  # open_clip's own defaults
STD = (0.26862954, 0.26130258, 0.27577711)
# The first word must be closer to the second than to the third.
RELATIONS = tuple(
    line.split()
    for line in ('car automobile sky', 'car truck sky', 'truck lorry road',
                 'road street sky', 'road sidewalk person',
                 'sidewalk pavement building', 'person pedestrian building',
                 'pole post car', 'building tower car', 'car vehicle road'))


def to_tensor(crops: List[Crop]) -> torch.Tensor:
    """Normalized pixels of crops, N×3×32×32 float32."""
    pixels = np.stack([c.pixels for c in crops]).astype(np.float32) / 255
    pixels = (pixels - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@torch.no_grad()
def word_vectors(model, tokenizer, words) -> torch.Tensor:
    """L2-normalized vectors of 'a photo of a <word>.', N×64."""
    tokens = tokenizer([class_caption(word) for word in words])
    return model.encode_text(tokens, normalize=True)


@torch.no_grad()
def evaluate(model, tokenizer, crops: List[Crop], seed: int = 0) -> Dict:
    """Held-out figures.

    Args:
        model (nn.Module): The open_clip model.
        tokenizer (Callable): Its tokenizer.
        crops (list[Crop]): Crops of scenes not trained on.
        seed (int): Chooses captions and candidates. Defaults to 0.

    Returns:
        dict: ``accuracy`` (zero-shot, mean over the 8 classes; chance 1/8),
        ``recall_1`` and ``recall_5`` (crop to its caption among 100 different
        ones; chance 1/100 and 5/100), ``relations`` (share of ``RELATIONS``
        that hold) and ``closest`` (largest cosine of two class names).
    """
    model.eval()
    images = F.normalize(
        torch.cat([
            model.encode_image(to_tensor(crops[i:i + 256]))
            for i in range(0, len(crops), 256)
        ]),
        dim=-1)
    classes = word_vectors(model, tokenizer, CLASSES)
    labels = torch.tensor([c.label for c in crops])
    pred = (images @ classes.T).argmax(1)
    per_class = {
        name: (pred[labels == k] == k).float().mean().item()
        for k, name in enumerate(CLASSES)
    }
    rng, hits = np.random.default_rng([seed, 3]), []
    for _ in range(5):
        chosen, captions = [], []
        for i in rng.permutation(len(crops)):
            caption = make_caption(crops[i], rng)
            if caption not in captions:
                chosen.append(i)
                captions.append(caption)
            if len(chosen) == 100:
                break
        texts = model.encode_text(tokenizer(captions), normalize=True)
        score = images[chosen] @ texts.T
        hits.append((score > score.diag()[:, None]).sum(1))
    rank = torch.cat(hits)
    cosine = classes @ classes.T - 2 * torch.eye(len(CLASSES))
    words = sorted({word for triple in RELATIONS for word in triple})
    vectors = dict(zip(words, word_vectors(model, tokenizer, words)))
    held = [
        bool(vectors[a] @ vectors[b] > vectors[a] @ vectors[c])
        for a, b, c in RELATIONS
    ]
    return dict(
        accuracy=float(np.mean(list(per_class.values()))),
        per_class=per_class,
        recall_1=(rank < 1).float().mean().item(),
        recall_5=(rank < 5).float().mean().item(),
        relations=float(np.mean(held)),
        closest=cosine.max().item())
