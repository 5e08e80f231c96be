# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The snippets of the guides, as they stand there, in a user's project."""
import os.path as osp
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.datasets import CityscapesDataset
from mmseg.registry import MODELS
from processes import (ROOT, STOCK_TRAIN, TOOLS, load, options, side_by_side,
                       start)

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.text.encode_classes import encode_classes

GUIDE = 'docs/en/user_guides/mixing_in.md'
AUXILIARY = 'Text on auxiliary heads'
OWN_DATA = 'Own data set, own class names'
NAMES = ('sky', 'building', 'road', 'car', 'person')
TRAIN = osp.join(TOOLS, 'train.py')
TEST = osp.join(TOOLS, 'test.py')
CITYSCAPES = ('leftImg8bit', '_leftImg8bit.png', 'gtFine',
              '_gtFine_labelTrainIds.png')
OWN = ('img', '.jpg', 'ann', '.png')


def snippet(page, heading, number=0, language='python'):
    """A block of code below a heading of a page, to the letter."""
    text = (Path(ROOT) / page).read_text()
    section = text.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    return re.findall(rf'```{language}\n(.*?)```', section, re.DOTALL)[number]


def write_pictures(root, layout, num_classes):
    """Four images to train on and two to validate on."""
    rng = np.random.default_rng(0)
    images, image_end, labels, label_end = layout
    for split, number in (('train', 4), ('val', 2)):
        for folder in (images, labels):
            (root / folder / split).mkdir(parents=True)
        for i in range(number):
            ids = np.kron(
                rng.integers(0, num_classes, (2, 4)), np.ones((32, 32), int))
            image = ids[..., None] * 12 + rng.integers(0, 12, (64, 128, 3))
            cv2.imwrite(
                str(root / images / split / f'{i}{image_end}'),
                image.astype(np.uint8))
            cv2.imwrite(
                str(root / labels / split / f'{i}{label_end}'),
                ids.astype(np.uint8))


def small(*splits, **changes):
    """Small images in place of Cityscapes', loaded in the same process."""
    values = dict(model__data_preprocessor__size='(64,128)', **changes)
    for split in splits:
        values.update({
            f'{split}_dataloader__num_workers': 0,
            f'{split}_dataloader__persistent_workers': False
        })
        dataset = f'{split}_dataloader__dataset__pipeline'
        if split == 'train':
            values[f'{split}_dataloader__batch_size'] = 2
            values[f'{dataset}__2__scale'] = '(128,64)'
            values[f'{dataset}__3__crop_size'] = '(64,128)'
        else:
            values[f'{dataset}__1__scale'] = '(128,64)'
    return options(**values)


SHORT = dict(
    train_cfg__max_iters=3,
    train_cfg__val_interval=3,
    default_hooks__checkpoint__interval=3,
    randomness__seed=0)
STAGES = dict(SHORT, custom_hooks__0__switch_at=2)
# ToyCLIP in the place of a tower that would have to be fetched.
EMBEDDINGS = 'model__decode_head__text__embeddings__'
TOYCLIP = {
    f'{EMBEDDINGS}dim': 64,
    f'{EMBEDDINGS}build__model': 'toyclip',
    f'{EMBEDDINGS}build__pretrained': None
}


def learned_offset(path, num_classes, dim):
    """Check the text in a checkpoint of stage 2; returns the offset."""
    state = load(path)['state_dict']
    prefix = 'decode_head.conv_seg.text.'
    assert state[prefix + 'started']
    offset = state[prefix + 'offset']
    assert offset.shape == (num_classes, dim) and offset.abs().max() > 0
    return offset, state[prefix + 'class_embeddings']


def test_five_lines_of_the_readme(tmp_path):
    """With the tools of MMSegmentation, on data laid out as Cityscapes."""
    (tmp_path / 'my_config.py').write_text(snippet('README.md', 'Five lines'))
    write_pictures(tmp_path / 'data' / 'cityscapes', CITYSCAPES, 19)
    vectors = encode_classes('cityscapes', 'toyclip', 'photo')
    assert vectors.names == CityscapesDataset.METAINFO['classes']
    vectors.save(tmp_path / 'cityscapes.safetensors')
    done = start(
        'python',
        STOCK_TRAIN,
        'my_config.py',
        '--work-dir',
        'work',
        *small('train', 'val', **STAGES),
        cwd=tmp_path)
    assert done.status == 0, done.output[-3000:]
    assert 'Stage 2 of text-knowledge training from iteration 2' in done.output
    assert 'mIoU' in done.output
    offset, embeddings = learned_offset(tmp_path / 'work' / 'iter_3.pth', 19,
                                        64)
    torch.testing.assert_close(
        embeddings,
        torch.nn.functional.normalize(vectors.vectors + 0.5 * offset, dim=1))


STDC = """
model, _ = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 5, (64, 128))
model['decode_head'].update(type='TextFCNHead', text=dict(
    type='ControlEmbeddings', kind='random', dim=8))
"""


def test_text_on_the_auxiliary_heads_of_a_list(tmp_path):
    """STDC's boundary head is left out."""
    (tmp_path / 'base.py').write_text(STDC)
    (tmp_path / 'config.py').write_text("_base_ = 'base.py'\n" +
                                        snippet(GUIDE, AUXILIARY))
    model = Config.fromfile(tmp_path / 'config.py').model
    assert [(h.type, h.num_classes)
            for h in model.auxiliary_head] == [('TextFCNHead', 5),
                                               ('TextFCNHead', 5),
                                               ('STDCHead', 2)]
    providers = text_providers(MODELS.build(model))
    assert list(providers) == [
        'decode_head.conv_seg.text', 'auxiliary_head.0.conv_seg.text',
        'auxiliary_head.1.conv_seg.text'
    ]


def test_decode_heads_in_a_list(tmp_path, monkeypatch, make_embeddings):
    """OCRNet of MMSegmentation, by the recipe of the guide."""
    monkeypatch.chdir(tmp_path)
    names = CityscapesDataset.METAINFO['classes']
    make_embeddings(19, names=names, file='cityscapes')
    heads = snippet(GUIDE, 'Heads')
    (tmp_path / 'my_heads.py').write_text(heads.replace('ASPP', 'OCR'))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'config.py'
     ).write_text("_base_ = __import__('mmseg_textkd').stock_config("
                  "'ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py')\n" +
                  snippet(GUIDE, 'Decode heads in a list'))
    cfg = Config.fromfile(tmp_path / 'config.py')
    try:
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
        assert list(text_providers(model)) == ['decode_head.1.conv_seg.text']
        state = fold_state_dict(model)
        stock = revert_sync_batchnorm(MODELS.build(
            to_stock_cfg(cfg).model)).eval()
    finally:
        MODELS.module_dict.pop('TextOCRHead')
    stock.load_state_dict(state, strict=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            stock._forward(image), model._forward(image), rtol=1e-3, atol=1e-3)


@pytest.fixture
def project(tmp_path):
    """A folder with images, a names file and the configs of the guide."""
    for number, name in enumerate(('own.py', 'own_text.py')):
        text = snippet(GUIDE, OWN_DATA, number)
        assert text.startswith(f'# {name}\n')
        (tmp_path / name).write_text(text)
    write_pictures(tmp_path / 'data' / 'own', OWN, len(NAMES))
    names = tmp_path / 'data' / 'own' / 'classes.txt'
    names.write_text(snippet(GUIDE, OWN_DATA, language='none'))
    return tmp_path


@pytest.mark.stacks
def test_own_data_without_python(project):
    """Train stock and text, make the embeddings on the way, and test."""

    def tool(path, *words):
        return start('python', path, *words, cwd=project)

    def text():
        trained = tool(TRAIN, 'own_text.py', '--work-dir', 'text',
                       *small('train', 'val', **STAGES, **TOYCLIP))
        tested = tool(TEST, 'own_text.py', 'text/iter_3.pth', '--work-dir',
                      'test', *small('test', **TOYCLIP))
        return trained, tested

    done = side_by_side({
        'text':
        text,
        'stock':
        lambda: tool(TRAIN, 'own.py', '--work-dir', 'stock',
                     *small('train', 'val', **SHORT))
    })
    for each in (*done['text'], done['stock']):
        assert each.status == 0, each.output[-3000:]
        # The evaluation knows the names of the file.
        table = re.findall(r'^\|\s+(\w+)\s+\|.*\d', each.output, re.MULTILINE)
        assert table == list(NAMES)
    vectors = encode_classes(NAMES, 'toyclip')
    offset, embeddings = learned_offset(project / 'text' / 'iter_3.pth', 5, 64)
    torch.testing.assert_close(
        embeddings,
        torch.nn.functional.normalize(vectors.vectors + 0.5 * offset, dim=1))
    stock = load(project / 'stock' / 'iter_3.pth')
    assert stock['state_dict']['decode_head.conv_seg.weight'].shape[0] == 5
    # The network's own, not the schedule's 0.01.
    assert stock['optimizer']['param_groups'][0]['initial_lr'] == 0.05
    found = [
        re.findall(r'mIoU: ([\d.]+)', each.output)[-1] for each in done['text']
    ]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.02)
