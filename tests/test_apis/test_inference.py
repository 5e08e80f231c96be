# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""MMSegmentation's Python interface with our configs and weights."""
import os.path as osp
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.runner import save_checkpoint
from mmseg.apis import (MMSegInferencer, inference_model, init_model,
                        show_result_pyplot)
from mmseg.registry import MODELS
from processes import ROOT, load, start
from tiny import CLASSES

from mmseg_textkd.datasets import ToyScenesDataset
from mmseg_textkd.models.text_parameters import text_providers

pytestmark = pytest.mark.stacks

TOY = 'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py'


@pytest.fixture(scope='module')
def model(trained):
    return init_model(trained.config, trained.weights, device='cpu')


def by_hand(weights, model, picture):
    """Logits (K, H, W) from the image and the tensors in the file."""
    state = load(weights)['state_dict']
    image = torch.tensor(picture).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        feats = model.backbone((image - 128) / 64)
        pixels = model.decode_head.convs(feats[0])
        # The convolution and its batch norm, as they stand in the file.
        prefix = 'decode_head.conv_seg.'
        norm = {
            k[len(prefix + 'projection.bn.'):]: v
            for k, v in state.items() if '.projection.bn.' in k
        }
        pixels = F.conv2d(pixels, state[f'{prefix}projection.conv.weight'])
        pixels = F.batch_norm(pixels, norm['running_mean'],
                              norm['running_var'], norm['weight'],
                              norm['bias'])
        scale = state[f'{prefix}scale.log_scale'].exp()
        logits = torch.einsum('ndhw,kd->nkhw', pixels,
                              scale * state[f'{prefix}text.class_embeddings'])
        logits += state[f'{prefix}logit_bias'][:, None, None]
        return F.interpolate(
            logits, image.shape[2:], mode='bilinear', align_corners=False)[0]


def test_prediction_equals_that_by_hand(trained, model):
    assert model.dataset_meta['classes'] == CLASSES
    picture = cv2.imread(trained.images[0])
    expected = by_hand(trained.weights, model, picture)
    assert len(expected.argmax(0).unique()) > 1
    # MMSegmentation makes a model that has seen an array forget files.
    other = init_model(trained.config, trained.weights, device='cpu')
    for network, image in ((model, trained.images[0]), (other, picture)):
        result = inference_model(network, image)
        torch.testing.assert_close(
            result.seg_logits.data, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(result.pred_sem_seg.data[0], expected.argmax(0))


def test_several_pictures(trained, model):
    results = inference_model(model, trained.images)
    assert len(results) == len(trained.images) == 6
    for path, result in zip(trained.images, results):
        assert osp.samefile(result.img_path, path)
        assert torch.equal(result.pred_sem_seg.data,
                           inference_model(model, path).pred_sem_seg.data)


def test_shown_result_blends_picture_and_palette(trained, model, tmp_path):
    path, out = trained.images[1], str(tmp_path / 'out.png')
    result = inference_model(model, path)
    shown = show_result_pyplot(
        model,
        path,
        result,
        opacity=.25,
        with_labels=False,
        draw_gt=False,
        show=False,
        out_file=out)
    palette = np.array(model.dataset_meta['palette'])
    picture = cv2.imread(path)[..., ::-1]
    blend = .75 * picture + .25 * palette[result.pred_sem_seg.data[0].numpy()]
    assert np.array_equal(shown, blend.astype(np.uint8))
    assert np.array_equal(cv2.imread(out)[..., ::-1], shown)


@each_case('config', ['file', 'in the weights'])
def test_inferencer_predicts_the_same(trained, model, tmp_path, config):
    inferencer = MMSegInferencer(
        model=trained.config if config == 'file' else None,
        weights=trained.weights,
        device='cpu')
    expected = [
        inference_model(model, path).pred_sem_seg.data[0].numpy()
        for path in trained.images
    ]
    found = inferencer(trained.images[0])['predictions']
    assert np.array_equal(found, expected[0])
    folder = osp.dirname(trained.images[0])
    for inputs in (trained.images, folder):
        out = tmp_path / type(inputs).__name__
        found = inferencer(
            inputs, batch_size=4, out_dir=str(out), pred_out_dir='labels')
        names = sorted(path.name for path in out.glob('vis/*'))
        assert names == [osp.basename(path) for path in trained.images]
        order = trained.images
        if inputs is folder:
            # In the order in which the system lists it, as the inferencer.
            order = [
                osp.join(folder, name)
                for name in list_dir_or_file(folder, list_dir=False)
            ]
        written = sorted((out / 'labels').iterdir())
        assert len(found['predictions']) == len(written) == 6
        for path, labels, file in zip(order, found['predictions'], written):
            assert np.array_equal(labels, expected[trained.images.index(path)])
            assert np.array_equal(cv2.imread(str(file), -1), labels)


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
    meta = dict(dataset_meta=ToyScenesDataset.METAINFO)
    (tmp_path / 'work_dirs/toy').mkdir(parents=True)
    save_checkpoint(
        dict(state_dict=model.state_dict(), meta=meta),
        str(tmp_path / 'work_dirs/toy/iter_200.pth'))
    images = tmp_path / 'data/toy_scenes/img_dir/val'
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ('0000.png', '0001.png'):
        cv2.imwrite(
            str(images / name),
            rng.integers(0, 256, (128, 256, 3)).astype(np.uint8))
    code += ("\nimport sys\nprint('open_clip' in sys.modules, labels.shape, "
             'labels.sum().item())')
    done = start('python', '-c', code, cwd=str(tmp_path), fork=True)
    assert done.status == 0, done.output
    loaded, shape, total = re.search(r'(\w+) (torch.*?) (\d+)$',
                                     done.output.strip()).groups()
    assert loaded == 'False' and shape == 'torch.Size([128, 256])'
    mine = cv2.imread(str(tmp_path / 'results/pred/00000000_pred.png'), -1)
    assert mine.shape == (128, 256) and mine.max() < 8
    assert int(total) in (int(cv2.imread(str(path), -1).sum())
                          for path in tmp_path.glob('results/pred/*'))
    assert sorted(path.name for path in tmp_path.glob('results/vis/*')) == [
        '0000.png', '0001.png'
    ]
    assert cv2.imread(str(tmp_path / 'result.png')).shape == (128, 256, 3)
