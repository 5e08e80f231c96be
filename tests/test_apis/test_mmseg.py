# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""MMSegmentation's Python interface and tools with our configs and weights."""
import glob
import json
import os.path as osp
import re
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS
from processes import ROOT, TOOLS, start
from text_runs import logits_by_hand
from tiny import CLASSES, SIZE, predict_logits, save_weights
from tool_modules import call, load_tool

from mmseg_textkd.datasets import ToyScenesDataset
from mmseg_textkd.models.text_parameters import text_providers

pytestmark = pytest.mark.stacks

TOY = 'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py'


@pytest.fixture(scope='module')
def model(trained):
    return init_model(trained.config, trained.weights, device='cpu')


def test_prediction_equals_that_by_hand(trained, model):
    assert model.dataset_meta['classes'] == CLASSES
    expected = logits_by_hand(trained, trained.images[0])[0].float()
    assert len(expected.argmax(0).unique()) > 1
    # MMSegmentation makes a model that has seen an array forget files.
    other = init_model(trained.config, trained.weights, device='cpu')
    for network, image in ((model, trained.images[0]),
                           (other, cv2.imread(trained.images[0]))):
        result = inference_model(network, image)
        torch.testing.assert_close(
            result.seg_logits.data, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(result.pred_sem_seg.data[0], expected.argmax(0))


@each_case('config', ['file', 'in the weights'])
def test_inferencer_predicts_the_same(trained, model, tmp_path, config):
    config = trained.config if config == 'file' else None
    inferencer = MMSegInferencer(config, trained.weights, device='cpu')
    expected = [
        inference_model(model, path).pred_sem_seg.data[0].numpy()
        for path in trained.images
    ]
    options = dict(return_vis=True, opacity=.25, with_labels=False)
    options.update(out_dir=str(tmp_path), pred_out_dir='labels')
    found = inferencer(trained.images, batch_size=4, **options)
    assert np.array_equal(found['predictions'], expected)
    written = sorted((tmp_path / 'labels').iterdir())
    assert np.array_equal([cv2.imread(str(f), -1) for f in written], expected)
    # Blended with the palette of the weights.
    palette = np.array(model.dataset_meta['palette'])
    blend = .75 * cv2.imread(trained.images[1])[..., ::-1]
    blend += .25 * palette[expected[1]]
    assert np.array_equal(found['visualization'][1], blend.astype(np.uint8))
    assert len(list(tmp_path.glob('vis/*'))) == 6


def test_label_checks_do_not_ask_for_labels():
    """A test pipeline with ``CheckLabels``, but an image of one's own."""
    path = osp.join(ROOT, 'configs/text_classifier',
                    'textkd_bisenetv2_fcn_random_1xb8-10k_camvid-360x480.py')
    picture = np.zeros((36, 48, 3), np.uint8)
    result = inference_model(init_model(path, device='cpu'), picture)
    assert result.pred_sem_seg.shape == (36, 48)
    found = MMSegInferencer(path, device='cpu')(picture)
    assert found['predictions'].shape == (36, 48)


def test_guide_needs_neither_vectors_nor_open_clip(tmp_path):
    """The guide's Python, to the letter, in a process of its own."""
    page = Path(ROOT, 'docs/en/user_guides/inference.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    # Other classes do need a tower; see test_text_seg_inferencer.py.
    code = ''.join(block for block in blocks if 'set_classes' not in block)
    assert code.count('init_model(') == code.count('MMSegInferencer(') == 1
    shutil.copytree(f'{ROOT}/configs', tmp_path / 'configs')
    cfg = Config.fromfile(f'{ROOT}/configs/text_classifier/{TOY}')
    model = MODELS.build(cfg.model)
    for provider in text_providers(model).values():
        provider.fill(torch.randn(provider.num_classes, provider.dim))
    weights = tmp_path / 'work_dirs/toy/iter_200.pth'
    images = tmp_path / 'data/toy_scenes/img_dir/val'
    for folder in (weights.parent, images):
        folder.mkdir(parents=True)
    save_weights(weights, model, ToyScenesDataset.METAINFO['classes'])
    names = ['0000.png', '0001.png']
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 256, 3))
    for name, picture in zip(names, pixels.astype(np.uint8)):
        cv2.imwrite(str(images / name), picture)
    code += ("\nimport sys\nprint('open_clip' in sys.modules, labels.shape, "
             'labels.sum().item())')
    done = start('python', '-c', code, cwd=str(tmp_path), fork=True)
    assert done.status == 0, done.output
    total = re.search(r'False torch.Size\(\[128, 256\]\) (\d+)$',
                      done.output.strip())[1]
    written = [cv2.imread(str(p), -1) for p in tmp_path.glob('results/pred/*')]
    assert int(total) in [labels.sum() for labels in written]
    assert all(w.shape == (128, 256) and w.max() < 8 for w in written)
    assert sorted(p.name for p in tmp_path.glob('results/vis/*')) == names
    assert cv2.imread(str(tmp_path / 'result.png')).shape == (128, 256, 3)


DATASETS = [
    path for path in sorted(glob.glob(f'{ROOT}/configs/_base_/datasets/*.py'))
    if 'episodes' not in path
]
SCENES = f'{ROOT}/configs/_base_/datasets/toy_scenes-128x256.py'


def test_tool_averages_over_the_flips(trained, tmp_path, monkeypatch):
    """Through ``tools/test.py --tta``, with ToyScenes' own pipeline."""
    cfg = Config.fromfile(trained.config)
    cfg.tta_pipeline = Config.fromfile(SCENES).tta_pipeline
    cfg.tta_model = dict(type='SegTTAModel')
    cfg.dump(tmp_path / 'config.py')
    words = ('test.py', tmp_path / 'config.py', trained.weights, '--tta',
             '--work-dir', tmp_path, '--out', tmp_path / 'labels')
    monkeypatch.setattr(sys, 'argv', list(map(str, words)))
    runpy.run_path(osp.join(TOOLS, 'test.py'), run_name='__main__')

    model = init_model(trained.config, trained.weights, device='cpu')
    truth, predicted, moved = [], [], 0
    for path in trained.images:
        image = torch.tensor(cv2.imread(path)).permute(2, 0, 1)[None].float()
        image = (image - 128) / 64
        plain = predict_logits(model, image)
        mirrored = predict_logits(model, image.flip(-1)).flip(-1)
        expected = (plain.softmax(1) + mirrored.softmax(1)).argmax(1)[0]
        found = cv2.imread(str(tmp_path / 'labels' / osp.basename(path)), -1)
        assert np.array_equal(found, expected)
        truth.append(cv2.imread(path.replace('/img/', '/ann/'), -1))
        predicted.append(found)
        moved += (plain.argmax(1)[0] != expected).sum()
    # The mirror image has a say.
    assert moved > 0
    file, = tmp_path.glob('*/*.json')
    labels = np.ravel(truth), np.ravel(predicted)
    table = np.histogram2d(*labels, bins=np.arange(9))[0]
    hits = table.diagonal()
    miou = np.nanmean(hits / (table.sum(0) + table.sum(1) - hits))
    # The metric is rounded to two digits.
    found = json.loads(file.read_text())['mIoU']
    assert found == pytest.approx(100 * miou, abs=.006)


@each_case('path', DATASETS)
def test_every_data_set_has_a_pipeline_for_it(path):
    loading, augmenting = Config.fromfile(path).tta_pipeline
    assert loading.type == 'LoadImageFromFile'
    kinds = [{t.type for t in options} for options in augmenting.transforms]
    assert {'RandomFlip'} in kinds and kinds[-1] == {'PackSegInputs'}


GET_FLOPS = osp.join(TOOLS, 'analysis_tools', 'get_flops.py')
# Of the tiny head: channels, width of the text; pixels at 1/4.
CHANNELS, DIM, PIXELS = 16, 16, SIZE[0] * SIZE[1] // 16


def get_flops(path, monkeypatch, capsys):
    """Run the tool; the two figures that it prints."""
    monkeypatch.setattr(sys, 'argv',
                        ['get_flops.py', path, '--size', *map(str, SIZE)])
    runpy.run_path(GET_FLOPS, run_name='__main__')
    out = capsys.readouterr().out
    return re.search(r'^Flops: ([\d.]+)M\nParams: (\S+)$', out, re.M).groups()


def test_get_flops_counts_as_torch_does(trained, tmp_path, monkeypatch,
                                        capsys):
    cfg = Config.fromfile(trained.config)
    flops, params = get_flops(trained.config, monkeypatch, capsys)
    number = sum(p.numel() for p in MODELS.build(cfg.model).parameters())
    assert params == _format_size(number)

    cfg.model.decode_head.pop('text')
    cfg.model.decode_head.type = 'FCNHead'
    cfg.dump(tmp_path / 'stock.py')
    stock, fewer = get_flops(str(tmp_path / 'stock.py'), monkeypatch, capsys)
    # Projection, its batch norm, scale, biases and learned offsets come in
    # the place of the last layer.
    more = DIM * (CHANNELS + 2) + 1 + len(CLASSES) + len(CLASSES) * DIM
    assert fewer == _format_size(number - more + len(CLASSES) * (CHANNELS + 1))
    # MMEngine counts two for each value of a batch norm.
    more = DIM * (CHANNELS + 2) + DIM * len(CLASSES) - CHANNELS * len(CLASSES)
    # Both are rounded to thousands.
    assert float(flops) - float(stock) == pytest.approx(
        PIXELS * more / 1e6, abs=1.01e-3)


def test_benchmark_measures_our_weights(trained, tmp_path, monkeypatch,
                                        capsys):
    """It takes 200 images, also from a data set of six; no random weights."""
    monkeypatch.setattr(sys, 'argv', ['stock_tool.py'])
    tool = load_tool('stock_tool.py')
    with pytest.raises(SystemExit, match='no checkpoint none.pth'):
        tool.main(['benchmark', trained.config, 'none.pth'])
    call(tool, 'benchmark', trained.config, trained.weights, '--work-dir',
         tmp_path)
    out = capsys.readouterr().out
    assert f'from path: {trained.weights}' in out
    assert 'unexpected' not in out and 'missing' not in out
    file, = tmp_path.glob('fps_*.json')
    found = json.loads(file.read_text())
    fps = float(re.search(r'Overall fps: (\S+) img', out)[1])
    assert fps > 1 and found['average_fps'] == fps
    assert f'Average fps of 1 evaluations: {fps}' in out
