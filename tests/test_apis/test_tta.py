# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Test-time augmentation of text networks."""
import glob
import json
import os.path as osp
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmseg.apis import init_model
from processes import ROOT, TOOLS
from tiny import CLASSES

pytestmark = pytest.mark.stacks

DATASETS = [
    path for path in sorted(glob.glob(f'{ROOT}/configs/_base_/datasets/*.py'))
    if 'episodes' not in path
]
TOY = f'{ROOT}/configs/_base_/datasets/toy_scenes-128x256.py'


def mean_over_flips(model, path):
    """Labels by the mean probability of an image and its mirror image."""
    image = torch.tensor(cv2.imread(path)).permute(2, 0, 1)[None].float()
    image = (image - 128) / 64
    with torch.no_grad():
        plain, mirrored = (
            model.decode_head(model.backbone(x))
            for x in (image, image.flip(-1)))
    probability = 0.
    for logits, mirror in ((plain, False), (mirrored, True)):
        logits = torch.nn.functional.interpolate(
            logits, image.shape[2:], mode='bilinear', align_corners=False)
        if mirror:
            logits = logits.flip(-1)
        probability = probability + logits.softmax(1) / 2
    return probability.argmax(1)[0].numpy(), plain


def mean_iou(pairs):
    """Mean IoU over the classes in per cent."""
    table = np.zeros((len(CLASSES), len(CLASSES)))
    for labels, predicted in pairs:
        np.add.at(table, (labels, predicted), 1)
    hits = table.diagonal()
    return 100 * np.nanmean(hits / (table.sum(0) + table.sum(1) - hits))


def test_tool_averages_over_the_flips(trained, tmp_path, monkeypatch):
    """Through ``tools/test.py --tta``, with ToyScenes' own pipeline."""
    cfg = Config.fromfile(trained.config)
    cfg.tta_pipeline = Config.fromfile(TOY).tta_pipeline
    cfg.tta_model = dict(type='SegTTAModel')
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setattr(sys, 'argv', [
        'test.py',
        str(tmp_path / 'config.py'), trained.weights, '--tta', '--work-dir',
        str(tmp_path), '--out',
        str(tmp_path / 'labels')
    ])
    runpy.run_path(osp.join(TOOLS, 'test.py'), run_name='__main__')

    model = init_model(trained.config, trained.weights, device='cpu')
    pairs, moved = [], 0
    for path in trained.images:
        expected, plain = mean_over_flips(model, path)
        found = cv2.imread(str(tmp_path / 'labels' / osp.basename(path)), -1)
        assert np.array_equal(found, expected)
        labels = cv2.imread(path.replace('/img/', '/ann/'), -1)
        pairs.append((labels, expected))
        plain = torch.nn.functional.interpolate(
            plain, labels.shape, mode='bilinear', align_corners=False)
        moved += (plain.argmax(1)[0].numpy() != expected).sum()
    # The mirror image has a say.
    assert moved > 0
    file, = tmp_path.glob('*/*.json')
    metrics = json.loads(file.read_text())
    # The metric is rounded to two digits.
    assert metrics['mIoU'] == pytest.approx(mean_iou(pairs), abs=.006)
    assert np.isfinite(metrics['mIoU'])


@each_case('path', DATASETS)
def test_every_data_set_has_a_pipeline_for_it(path):
    loading, augmenting = Config.fromfile(path).tta_pipeline
    assert loading.type == 'LoadImageFromFile'
    kinds = [{t.type for t in options} for options in augmenting.transforms]
    assert {'RandomFlip'} in kinds and kinds[-1] == {'PackSegInputs'}
