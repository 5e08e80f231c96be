# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What configs take over from MMSegmentation's own."""
import copy
from pathlib import Path

import pytest
from each_case import each_case
from mmengine.config import Config

from mmseg_textkd import insert_transform, stock_config, stock_network

STDC = 'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py'
PIDNET = 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
EDGES = dict(type='GenerateEdge', edge_width=4)


def class_weights(model):
    losses = model['decode_head']['loss_decode']
    return [loss.get('class_weight') for loss in losses]


def num_classes(name, classes):
    """Classes of the heads of a stock config that is changed."""
    model, _ = stock_network(name, classes, (64, 64))
    heads = model['decode_head'], model.get('auxiliary_head') or []
    heads = [h if isinstance(h, list) else [h] for h in heads]
    return [h['num_classes'] for some in heads for h in some]


@pytest.mark.parametrize('path', [
    'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',
    'knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py'
])
def test_heads_with_classes_in_their_parts_are_told(path):
    with pytest.raises(ValueError, match='the classes of .* are in parts'):
        stock_network(path, 5, (64, 64))


def test_all_heads_but_the_boundary_head_get_the_classes():
    model, optim_wrapper = stock_network(STDC, 11, (360, 480))
    # All else is the stock config's, and that is left as it was.
    stock = Config.fromfile(stock_config(STDC))
    assert stock.optim_wrapper.to_dict() == optim_wrapper
    expected = stock.model.to_dict()
    *heads, boundary = expected['decode_head'], *expected['auxiliary_head']
    assert (boundary['type'], boundary['num_classes']) == ('STDCHead', 2)
    for head in heads:
        assert head['num_classes'] == 19
        head['num_classes'] = 11
    expected['data_preprocessor']['size'] = (360, 480)
    assert expected == model


def test_class_weights_are_those_of_the_classes():
    stock = Config.fromfile(stock_config(PIDNET)).model
    assert [not w for w in class_weights(stock)] == [0, 0, 1, 0]
    same, _ = stock_network(PIDNET, 19, (1024, 1024))
    assert class_weights(same) == class_weights(stock)
    other, _ = stock_network(PIDNET, 11, (360, 480))
    assert class_weights(other) == [None] * 4
    assert other['decode_head']['num_classes'] == 11


@each_case(
    'name, classes, expected',
    [
        ('unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py', 5, [5, 5]),
        (STDC, 2, [2, 2, 2, 2]),
        # A cascade; heads without losses; no auxiliary head.
        ('ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py', 5, [5, 5]),
        ('bisenetv1/bisenetv1_r50-d32_4xb4-160k_cityscapes-1024x1024.py', 5,
         [5, 5, 5]),
        ('dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py', 5, [5]),
    ])
def test_heads_count_as_the_decode_head_does(name, classes, expected):
    """Not by how many classes they have."""
    assert num_classes(name, classes) == expected


def load(tmp_path: Path, dataset: str) -> dict:
    path = tmp_path / 'base.py'
    path.write_text(f'_base_ = {stock_config(f"_base_/datasets/{dataset}")!r}')
    return Config.fromfile(path).train_dataloader


def test_insert_into_a_pipeline(tmp_path):
    loader = load(tmp_path, 'cityscapes.py')
    before = copy.deepcopy(loader.to_dict())
    result = insert_transform(loader, EDGES, before='PackSegInputs')
    assert loader.to_dict() == before
    # But for the transform nothing has changed.
    before['dataset']['pipeline'].insert(-1, EDGES)
    assert Config(dict(a=result)).to_dict()['a'] == before


def test_insert_into_one_pipeline_of_two_datasets():
    pipeline = [dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    parts = [dict(pipeline=pipeline) for _ in range(2)]
    result = insert_transform(
        dict(dataset=dict(datasets=parts)), EDGES, before='PackSegInputs')
    for part in result['dataset']['datasets']:
        kinds = [transform['type'] for transform in part['pipeline']]
        assert kinds == ['LoadAnnotations', 'GenerateEdge', 'PackSegInputs']


def test_insert_into_wrapped_datasets(tmp_path):
    """The two of PASCAL VOC with its augmentation have one pipeline each."""
    loader = load(tmp_path, 'pascal_voc12_aug.py')
    assert loader.dataset.type == 'ConcatDataset'
    result = insert_transform(loader, EDGES, before='PackSegInputs')
    pipelines = [d['pipeline'] for d in result['dataset']['datasets']]
    assert len(pipelines) == 2
    for pipeline in pipelines:
        kinds = [transform['type'] for transform in pipeline]
        assert kinds.count('GenerateEdge') == 1
        assert kinds[-2:] == ['GenerateEdge', 'PackSegInputs']
    pipelines[0][-2]['edge_width'] = 8
    assert pipelines[1][-2]['edge_width'] == EDGES['edge_width'] == 4
    message = "no pipeline.*'PackInputs'.*'GenerateEdge'"
    with pytest.raises(ValueError, match=message):
        insert_transform(loader, EDGES, before='PackInputs')
