# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Rows and columns of classes in a checkpoint follow their names."""
import pytest
import tiny
import torch
from mmseg.registry import MODELS
from tiny import CLASSES, RESIDUAL
from torch.testing import assert_close

from mmseg_textkd.engine.hooks.class_rows import match_classes
from mmseg_textkd.models.text_parameters import text_providers


@pytest.mark.parametrize('kind, number, prefix', [('PID', 4, ''),
                                                  ('DDR', 2, 'module.')])
def test_rows_of_further_outputs(kind, number, prefix):
    head = MODELS.build(
        dict(
            type=f'Text{kind}Head',
            in_channels=8,
            channels=8,
            num_classes=8,
            norm_cfg=tiny.NORM,
            text=RESIDUAL,
            loss_decode=[dict(type='CrossEntropyLoss')] * number))
    biases = [
        name for name, value in head.state_dict().items()
        if name.endswith(('seg.bias', 'logit_bias')) and len(value) == 8
    ]
    assert len(biases) == 2
    # A prefix that MMEngine takes away.
    state = {f'{prefix}head.{name}': torch.arange(8.) for name in biases}
    meta = dict(dataset_meta=dict(classes=CLASSES))
    match_classes(
        torch.nn.ModuleDict(dict(head=head)),
        dict(state_dict=state, meta=meta), CLASSES[::-1])
    for value in state.values():
        assert value.tolist() == list(range(7, -1, -1))
    # Without a name in common all begin anew.
    net = torch.nn.ModuleDict(dict(head=head))
    own = {name: head.state_dict()[name] for name in biases}
    said = match_classes(net, dict(state_dict=state, meta=meta), 'abcdefgh')
    assert '0 classes were found' in said
    for name, value in own.items():
        assert torch.equal(state[f'head.{name}'], value)


def test_remembered_prototypes_follow_their_names():
    loss = dict(type='SemanticStructureLoss', momentum=.9, shape=(8, 16))
    head = MODELS.build(
        dict(tiny.HEAD, type='TextFCNHead', text=RESIDUAL, text_losses=[loss]))
    net, key = torch.nn.ModuleDict(dict(head=head)), 'text_losses.0.memory'
    memory = torch.arange(8.)[:, None].repeat(1, 16) + 1
    state = {f'head.{key}': memory}
    meta = dict(dataset_meta=dict(classes=CLASSES))
    match_classes(net, dict(state_dict=state, meta=meta),
                  ('tram', *CLASSES[:0:-1]))
    # Of a class that is new nothing has been seen.
    assert state[f'head.{key}'][:, 0].tolist() == [0, 8, 7, 6, 5, 4, 3, 2]


def mapped(kind):
    """A network with a score map, or with context that has scores."""
    cfg = dict(
        type='EncoderDecoder',
        backbone=tiny.BACKBONE,
        decode_head=dict(tiny.HEAD, num_classes=3),
        test_cfg=dict(mode='whole'))
    if kind == 'score_map':
        text = dict(tiny.CONTROL, dim=8)
        site = dict(feature='backbone', convs=['decode_head.convs.0.conv'])
        cfg.update(
            type='TextKD', score_map=dict(in_channels=8, text=text, **site))
    else:
        fusion = dict(
            type='ContextAwareText', use='inference', width=8, num_heads=2)
        cfg['decode_head'].update(
            type='TextFCNHead', text=tiny.CONTROL, fusion=fusion)
    return tiny.stir(MODELS.build(cfg)).eval()


@pytest.mark.parametrize('kind', ['score_map', 'context'])
def test_columns_of_classes_follow_their_names(kind):
    torch.manual_seed(0)
    old, new = mapped(kind), mapped(kind)
    order = [2, 0, 1]
    for name, provider in text_providers(new).items():
        provider.fill(old.get_submodule(name).class_embeddings[order])
    # A blank, as that of 'bed ', makes no other class.
    meta = dict(dataset_meta=dict(classes=('a', 'b ', 'c')))
    state = dict(old.state_dict())
    said = match_classes(new, dict(state_dict=state, meta=meta),
                         ('c', 'a', 'b'))
    assert '3 classes were found' in said
    new.load_state_dict(state)
    image = torch.randn(1, 3, 64, 64)
    found, expected = (m(image, mode='tensor') for m in (new, old))
    assert_close(found, expected[:, order], rtol=1e-4, atol=1e-4)
