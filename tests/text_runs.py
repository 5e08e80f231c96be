# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Tiny text networks of several kinds, with ToyCLIP, as files."""
import copy
from types import SimpleNamespace

import torch
from mmseg.registry import MODELS
from tiny import CLASSES, PROMPTS, stir, tiny_config

from mmseg_textkd.text.encode_classes import encode_classes

FIXED = dict(type='ClassEmbeddings', file='text.safetensors', dim=64)
CONTEXT = dict(PROMPTS, embeddings=FIXED)
# Text provider and changes of the head.
RUNS = dict(
    fixed=(FIXED, {}),
    residual=(dict(type='ResidualPromptLearner', embeddings=FIXED), {}),
    mixture=(dict(type='MixturePromptLearner', embeddings=FIXED), {}),
    unified=(CONTEXT, {}),
    specific=(dict(CONTEXT, class_specific=True), {}),
    l2=(FIXED, dict(text_branch=dict(norm='l2'))),
    lseg=(FIXED,
          dict(
              text_branch=dict(
                  norm='l2', bias=False, regularization=dict(depth=2)))),
    centered=(dict(FIXED, center=True), {}),
    auxiliary=(FIXED, dict(role='auxiliary')))


def make(folder, text, head):
    """Weights as after stage 2: of no start, prompts have moved."""
    file = folder / 'text.safetensors'
    encode_classes(CLASSES, 'toyclip', 'photo', keep_bank=True).save(file)
    text = copy.deepcopy(text)
    text.get('embeddings', text)['file'] = str(file)
    cfg = tiny_config(folder, text)
    cfg.model.decode_head.update(head)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(folder / 'config.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    provider = model.decode_head.text_branch.text
    stir(model)
    with torch.no_grad():
        if provider.learnable():
            provider.start_learning()
            provider.refresh()
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(
                dataset_meta=cfg.test_dataloader.dataset.metainfo.to_dict())),
        folder / 'weights.pth')
    return SimpleNamespace(
        file=file,
        config=str(folder / 'config.py'),
        weights=str(folder / 'weights.pth'),
        images=[str(folder / 'data/img' / f'{i}.png') for i in range(6)])
