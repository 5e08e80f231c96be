# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Contexts as published, against figures of the authors' own encoder."""
import pytest
import tiny_clip
import torch
from each_case import each_case
from mmseg.registry import MODELS

from mmseg_textkd.clip.text_tower import TextTower, load_tower

WORDS = dict(Road='Road', Car_Sky='car sky')
# Learned vectors, in all 7 tokens of which 5 are for the names.
CONTEXT_LENGTH = 7
# Made by CLIPTextContextEncoder of ChiaYi-LIN/mmsegmentation @ d89be68 with
# these weights: embeddings (first three of each class, normalized), and the
# gradient of the sum of their first column (first two of each vector).
EMBEDDINGS = {
    False: [[-0.0451638, 0.03070668, 0.02217067],
            [0.0333751, 0.1682536, 0.2227283]],
    True: [[-0.0451638, 0.03070668, 0.02217067],
           [0.2767363, -0.2107835, -0.1227552]]
}
GRADIENT = {
    False: [[-0.07627299, -0.02605763], [0.04036246, -0.03093161]],
    True: [[[-0.03534788, -0.0037013], [0.02288766, -0.0190474]],
           [[-0.01625483, -0.007811991], [-0.005444258, -0.04252183]]]
}


def noise(shape, seed):
    """Uniform in [-1, 1), the same numbers whatever the version of torch."""
    number = torch.Size(shape).numel()
    wave = (torch.arange(number).double() * 12.9898 + seed * 78.233).sin()
    return ((wave * 43758.5453).remainder(1) * 2 - 1).view(shape)


@pytest.fixture(scope='module')
def tower(tmp_path_factory):
    """A small tower of OpenAI's kind."""
    folder = tmp_path_factory.mktemp('clip') / 'quick'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_clip.VARIANTS, 'quick', ({}, dict(quick_gelu=True)))
        tiny_clip.save_model(folder, 'quick')
    tower = load_tower(f'local-dir:{folder}')
    # Linear layers of a spread that lets every token be felt.
    for i, (name, value) in enumerate(sorted(tower.clip.state_dict().items())):
        if value.is_floating_point() and 'mask' not in name:
            norm = value.dim() == 1 and 'weight' in name
            value.copy_(norm + .5 * noise(value.shape, i))
    return tower


def build(tower, **options):
    text = dict(type='ControlEmbeddings', kind='random', dim=24)
    cfg = dict(type='ContextPromptLearner', embeddings=text, num_classes=2)
    cfg.update(model=tower.model, token_dim=32, vocabulary=WORDS, suffix='')
    cfg.update(context_length=CONTEXT_LENGTH, class_specific=True)
    return MODELS.build(cfg | options).train()


@each_case('specific', [True, False])
def test_published_context(tower, specific):
    provider = build(tower, class_specific=specific)
    shape = (2, 2, 32) if specific else (2, 32)
    assert provider.context.shape == shape
    provider.context.data.copy_(noise(shape, 1000))
    provider.start_learning()
    assert isinstance(provider.tower, TextTower) and provider.tower is tower
    text = provider()
    text[:, 0].sum().backward()
    gradient = provider.context.grad[..., :2]
    for found, figures in ((text[:, :3], EMBEDDINGS), (gradient, GRADIENT)):
        expected = torch.tensor(figures[specific])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@each_case('length, number', [(13, 8), (16, 11), (19, 14), (22, 17)])
def test_context_of_the_published_lengths(tower, length, number):
    assert build(tower, context_length=length).context.shape == (2, number, 32)


@each_case('options, words', [
    (dict(vocabulary=dict(Road='Road', Car='car car car car')),
     'car car car car.*6 tokens.*2 context.*room for 7'),
    (dict(context_length=80), '75 context.*room for 77'),
    (dict(context_length=5), '`n_ctx`.*0 of 5 tokens'),
])
def test_prompts_of_a_length_that_does_not_fit(tower, options, words):
    with pytest.raises(ValueError, match=f'(?s){words}'):
        build(tower, **options).start_learning()
    with pytest.warns(UserWarning, match='`position` is deprecated'):
        build(tower, position='end')
