# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Tiny text networks of several kinds, with ToyCLIP, as files."""
import copy
from types import SimpleNamespace

import cv2
import torch
import torch.nn.functional as F
from mmseg.apis import init_model
from mmseg.registry import MODELS
from network_tester import each_head, load_model
from processes import load
from tiny import CLASSES, PROMPTS, save_weights, stir, tiny_config

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


def make(folder, text, head, network=None):
    """Weights as after stage 2: of no start, prompts have moved.

    Of a tiny network, or with the layers of a config in a file.
    """
    file = folder / 'text.safetensors'
    encode_classes(CLASSES, 'toyclip', 'photo', keep_bank=True).save(file)
    text = copy.deepcopy(text)
    source = text.get('embeddings', text)
    if source.get('file') == file.name:
        source['file'] = str(file)
    cfg = tiny_config(folder, text)
    if network:
        cfg.model = load_model(network)
        for part in each_head(cfg.model):
            part.num_classes = len(CLASSES)
        cfg.model.decode_head.text = text
    cfg.model.decode_head.update(head)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(folder / 'config.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    provider = model.decode_head.text_branch.text
    # Of many layers the values would grow beyond all bounds.
    stir(model.decode_head if network else model)
    with torch.no_grad():
        if provider.learnable():
            provider.start_learning()
            provider.refresh()
    return SimpleNamespace(
        file=file,
        config=str(folder / 'config.py'),
        weights=save_weights(folder / 'weights.pth', model),
        images=[str(folder / 'data/img' / f'{i}.png') for i in range(6)])


def logits_by_hand(run, picture, vectors=None, bias=None):
    """Logits and cosines (K, H, W) from the tensors in a run's file."""
    model = init_model(run.config, run.weights, device='cpu')
    state = {
        k.removeprefix('decode_head.conv_seg.'): v.double()
        for k, v in load(run.weights)['state_dict'].items()
    }
    image = torch.tensor(cv2.imread(picture)).permute(2, 0, 1)[None]
    with torch.no_grad():
        feat = model.extract_feat((image.float() - 128) / 64)[0]
        pixels = model.decode_head.convs(feat).double()
    pixels = F.conv2d(pixels, state['projection.conv.weight'],
                      state.get('projection.conv.bias'))
    if 'projection.bn.weight' in state:
        norm = 'running_mean', 'running_var', 'weight', 'bias'
        norm = (state[f'projection.bn.{key}'] for key in norm)
        pixels = F.batch_norm(pixels, *norm)
    else:
        pixels = F.normalize(pixels, dim=1)
    if vectors is None:
        vectors, bias = state['text.class_embeddings'], state['logit_bias']
    vectors = vectors.double()[..., None, None]
    logits = F.conv2d(pixels, state['scale.log_scale'].exp() * vectors, bias)
    cosine = F.conv2d(F.normalize(pixels, dim=1), vectors)
    size = image.shape[2:]
    return [
        F.interpolate(v, size, mode='bilinear', align_corners=False)[0]
        for v in (logits, cosine)
    ]
