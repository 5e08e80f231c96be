# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The snippets of the guides, as they stand there, in a user's project."""
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.datasets import CityscapesDataset
from mmseg.registry import MODELS
from processes import (ROOT, STOCK_TRAIN, load, loaders, options, side_by_side,
                       train)
from tiny import folded

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.utils.config import load_config

GUIDE = 'docs/en/user_guides/mixing_in.md'
AUXILIARY = 'Text on auxiliary heads'
OWN_DATA = 'Own data set, own class names'
NAMES = ('sky', 'building', 'road', 'car', 'person')
CITYSCAPES = ('leftImg8bit', '_leftImg8bit.png', 'gtFine',
              '_gtFine_labelTrainIds.png')
SPLITS = ('train', 'val')
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
            for folder, end, pixels in ((images, image_end, image),
                                        (labels, label_end, ids)):
                path = root / folder / split / f'{i}{end}'
                cv2.imwrite(str(path), pixels.astype(np.uint8))


def small(**changes):
    """Small images in place of Cityscapes', loaded in the same process."""
    train, val = (f'{s}_dataloader__dataset__pipeline' for s in SPLITS)
    scales = {f'{train}__2__scale': '(128,64)', f'{val}__1__scale': '(128,64)'}
    scales[f'{train}__3__crop_size'] = '(64,128)'
    size = dict(model__data_preprocessor__size='(64,128)')
    return options(**loaders(*SPLITS), **size, **scales, **changes)


SHORT = dict(
    train_cfg__max_iters=3,
    train_cfg__val_interval=3,
    default_hooks__checkpoint__interval=3,
    randomness__seed=0)
STAGES = dict(SHORT, custom_hooks__0__switch_at=2)
# ToyCLIP in the place of a tower that would have to be fetched.
EMBEDDINGS = 'model__decode_head__text__embeddings__'
TOYCLIP = dict(dim=64, build__model='toyclip', build__pretrained=None)
TOYCLIP = {f'{EMBEDDINGS}{key}': value for key, value in TOYCLIP.items()}


def check_learned(path, vectors):
    """Check the text in a checkpoint of stage 2."""
    state = load(path)['state_dict']
    prefix = 'decode_head.conv_seg.text.'
    assert state[prefix + 'started']
    offset = state[prefix + 'offset']
    assert offset.shape == vectors.shape and offset.abs().max() > 0
    expected = F.normalize(vectors + 0.5 * offset, dim=1)
    torch.testing.assert_close(state[prefix + 'class_embeddings'], expected)


def test_five_statements_of_the_readme(tmp_path):
    """With the tools of MMSegmentation, on data laid out as Cityscapes."""
    (tmp_path / 'my_config.py').write_text(
        snippet('README.md', 'Five statements'))
    write_pictures(tmp_path / 'data' / 'cityscapes', CITYSCAPES, 19)
    vectors = encode_classes('cityscapes', 'toyclip', 'photo')
    assert vectors.names == CityscapesDataset.METAINFO['classes']
    vectors.save(tmp_path / 'cityscapes.safetensors')
    words = small(**STAGES, **{f'{EMBEDDINGS}dim': 64})
    done = train(tmp_path, 'my_config.py', 'work', *words, tool=STOCK_TRAIN)
    assert done.status == 0, done.output[-3000:]
    assert 'Stage 2 of text-knowledge training from iteration 2' in done.output
    assert 'mIoU' in done.output
    assert vectors.vectors.shape == (19, 64)
    check_learned(tmp_path / 'work' / 'iter_3.pth', vectors.vectors)


STDC = """
model, _ = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 5, (64, 128))
model['decode_head'].update(type='TextFCNHead', text=dict(
    type='ControlEmbeddings', kind='random', dim=8))
"""


def test_a_teacher_for_a_text_config(tmp_path):
    """The snippet is `segkd` of the configs, and keeps the stages."""
    (tmp_path / 'my_text_config.py').write_text(
        snippet('README.md', 'Five statements'))
    (tmp_path / 'config.py').write_text(
        snippet('configs/distillation/README.md', 'Usage'))
    cfg = Config.fromfile(tmp_path / 'config.py')
    base = Config.fromfile(f'{ROOT}/configs/_base_/distillation/segmentor.py')
    assert cfg.model.decode_head.text_losses == base.text_from_segmentor
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ['PromptLearnerHook', 'TeacherHook']


def test_text_on_the_auxiliary_heads_of_a_list(tmp_path):
    """STDC's boundary head is left out."""
    (tmp_path / 'base.py').write_text(STDC)
    (tmp_path / 'config.py').write_text("_base_ = 'base.py'\n" +
                                        snippet(GUIDE, AUXILIARY))
    model = Config.fromfile(tmp_path / 'config.py').model
    heads = [(h.type, h.num_classes) for h in model.auxiliary_head]
    assert heads == [('TextFCNHead', 5), ('TextFCNHead', 5), ('STDCHead', 2)]
    heads = 'decode_head', 'auxiliary_head.0', 'auxiliary_head.1'
    providers = text_providers(MODELS.build(model))
    assert list(providers) == [f'{head}.conv_seg.text' for head in heads]


def test_decode_heads_in_a_list(tmp_path, monkeypatch, make_embeddings):
    """OCRNet of MMSegmentation, by the recipe of the guide."""
    monkeypatch.chdir(tmp_path)
    names = CityscapesDataset.METAINFO['classes']
    make_embeddings(19, 512, names=names, file='cityscapes')
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
        stock = folded(cfg, model)
    finally:
        MODELS.module_dict.pop('TextOCRHead')
    stock, image = revert_sync_batchnorm(stock).eval(), torch.randn(
        1, 3, 64, 64)
    with torch.no_grad():
        found, expected = stock._forward(image), model._forward(image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


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
def test_own_data_without_python(project, monkeypatch):
    """Train stock and text, and make the embeddings on the way."""

    def text():
        words = small(**STAGES, **TOYCLIP)
        return train(project, 'own_text.py', 'text', *words)

    def stock():
        return train(project, 'own.py', 'stock', *small(**SHORT))

    done = side_by_side(dict(text=text, stock=stock))
    for each in done.values():
        assert each.status == 0, each.output[-3000:]
        # The evaluation knows the names of the file.
        table = re.findall(r'^\|\s+(\w+)\s+\|.*\d', each.output, re.MULTILINE)
        assert table == list(NAMES)
    vectors = encode_classes(NAMES, 'toyclip')
    assert vectors.vectors.shape == (5, 64)
    check_learned(project / 'text' / 'iter_3.pth', vectors.vectors)
    # Where the file of names is not, the checkpoint has them.
    config = load_config(project / 'text' / 'own_text.py')
    for folder in (project, project / 'text'):
        monkeypatch.chdir(folder)
        _, network, meta = load_stock(
            str(project / 'text' / 'own_text.py'),
            project / 'text' / 'iter_3.pth')
        assert meta['classes'] == list(NAMES)
        assert network.num_classes == len(NAMES)
        found = to_stock_cfg(config).test_dataloader.dataset.metainfo.classes
        assert found == ('data/own/classes.txt'
                         if 'text' in folder.name else list(NAMES))
    stock = load(project / 'stock' / 'iter_3.pth')
    assert stock['state_dict']['decode_head.conv_seg.weight'].shape[0] == 5
    # The network's own, not the schedule's 0.01.
    assert stock['optimizer']['param_groups'][0]['initial_lr'] == 0.05
