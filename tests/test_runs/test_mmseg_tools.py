# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The shipped configs through the tools, MMSegmentation's own and ours."""
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import (ROOT, STOCK_TRAIN, TOOLS, loaders, options,
                       side_by_side, start, states, train)
from tiny import assert_equal

from mmseg_textkd.datasets import CamVidDataset
from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes

pytestmark = pytest.mark.stacks

FOLDER = f'{ROOT}/configs/text_classifier/textkd_bisenetv2_fcn'
TOY = f'{FOLDER}_toyclip_1xb8-200i_toy-scenes-128x256.py'
CAMVID = f'{FOLDER}_vit-b16_1xb8-10k_camvid-360x480.py'
TOY_FILE = 'data/text_embeddings/toy_scenes_toyclip.safetensors'
CAMVID_FILE = 'data/text_embeddings/camvid_vit-b16-openai.safetensors'


def short(size):
    """Three iterations, stage 2 in the last, of small images."""
    return dict(
        loaders('train', 'val'),
        train_cfg__max_iters=3,
        train_cfg__val_interval=3,
        custom_hooks__0__switch_at=2,
        default_hooks__checkpoint__interval=3,
        # Saves seconds: MMEngine formats the config for each checkpoint.
        default_hooks__checkpoint__save_best=None,
        randomness__seed=0,
        default_hooks__logger__interval=1,
        model__data_preprocessor__size=size)


def write_camvid(root):
    """Six images in the layout of the SegNet tutorial."""
    rng = np.random.default_rng(0)
    for split, number in (('train', 4), ('val', 2)):
        (root / split).mkdir(parents=True)
        (root / f'{split}annot').mkdir()
        for i in range(number):
            labels = np.kron(
                rng.integers(0, 12, (3, 4)), np.ones((24, 24), int))
            image = labels[..., None] * 20 + rng.integers(0, 20, (72, 96, 3))
            for folder, pixels in ((split, image), (f'{split}annot', labels)):
                cv2.imwrite(
                    str(root / folder / f'{i}.png'), pixels.astype(np.uint8))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Run all tools, two at a time; folders and outcomes by name."""
    root = tmp_path_factory.mktemp('tools')
    for name in ('stock', 'ours', 'camvid', 'elsewhere'):
        (root / name).mkdir()
    scenes = root / 'stock' / 'data' / 'toy_scenes'
    generate_toy_scenes(scenes, num_train=4, num_val=2, height=64, width=128)
    # Ours finds the data where the config says, the others are told.
    shutil.copytree(scenes, root / 'ours' / 'data' / 'toy_scenes')
    splits = 'train', 'val', 'test'
    told = {f'{s}_dataloader__dataset__data_root': scenes for s in splits}
    vectors = encode_classes('toy_scenes', 'toyclip', 'photo')
    toy = short('(64,128)')

    def ours_then_test():
        ours = train(root / 'ours', TOY, 'work', *options(**toy))
        made = TextEmbeddings.load(root / 'ours' / TOY_FILE)
        # As if on another machine: no vectors, no text tower's file.
        (root / 'ours' / TOY_FILE).unlink()
        checkpoint = root / 'ours' / 'work' / 'iter_3.pth'
        size = dict(model__data_preprocessor__size='(64,128)')
        words = checkpoint, *options(**loaders('test'), **told, **size)
        tool = dict(tool=f'{TOOLS}/test.py')
        test = train(root / 'elsewhere', TOY, 'work', *words, **tool)
        return ours, made, test

    def stock():
        changes = options(**toy, **told)
        return train(root / 'stock', TOY, 'work', *changes, tool=STOCK_TRAIN)

    def camvid():
        write_camvid(root / 'camvid' / 'data' / 'camvid')
        # In another order and spelling, as vectors from elsewhere come.
        classes = [n.title() for n in CamVidDataset.METAINFO['classes']][::-1]
        rows = np.random.default_rng(0).normal(size=(11, 512))
        np.save(root / 'camvid' / 'v.npy', rows.astype(np.float32))
        (root / 'camvid' / 'n.json').write_text(json.dumps(classes))
        words = 'python', f'{TOOLS}/encode_text.py', 'camvid', '--import'
        words += 'v.npy', '--names-file', 'n.json', '--out', CAMVID_FILE
        imported = start(*words, cwd=root / 'camvid')
        changes = options(
            **short('(72,96)'),
            train_dataloader__dataset__pipeline__3__scale='(96,72)',
            train_dataloader__dataset__pipeline__4__crop_size='(72,96)',
            val_dataloader__dataset__pipeline__1__scale='(96,72)')
        done = train(
            root / 'camvid', CAMVID, 'work', *changes, tool=STOCK_TRAIN)
        return imported, rows[::-1], done

    done = side_by_side(dict(ours=ours_then_test, stock=stock, camvid=camvid))
    return root, vectors, done


def scalars(work):
    """What the run has logged, all its lines as one dict of lists."""
    files = list(work.glob('*/vis_data/scalars.json'))
    assert len(files) == 1
    found = {}
    for line in files[0].read_text().splitlines():
        for key, value in json.loads(line).items():
            found.setdefault(key, []).append(value)
    return found


def check_run(done, work, learned):
    """Three iterations with losses, and text that was learned in the last."""
    assert done.status == 0, done.output[-3000:]
    log = scalars(work)
    assert log['step'][:3] == [1, 2, 3]
    assert len(log['loss']) == 3 and np.isfinite(log['loss']).all()
    assert log['mIoU'] and log['text_stage'][-1] == 2
    state, = states(work, 3)
    text = {k.split('.text.')[1]: v for k, v in state.items() if '.text.' in k}
    assert set(text) == {'class_embeddings', 'started', learned}
    assert text['started']
    return text['class_embeddings'], text[learned], log


def test_toy_config_through_the_stock_tool(runs):
    """Which makes the vectors."""
    root, vectors, done = runs
    work = root / 'stock' / 'work'
    embeddings, context, _ = check_run(done['stock'], work, 'context')
    made = TextEmbeddings.load(root / 'stock' / TOY_FILE)
    assert made.sha256 == vectors.sha256
    assert context.shape == (4, 64)
    # Prompts of the tower's own words, one small step on: near, not equal.
    cosine = (embeddings * vectors.vectors).sum(1)
    assert (cosine > 0.8).all() and (cosine < 1).any()
    assert 'ToyCLIP' in done['stock'].output


def test_our_tool_makes_the_embeddings(runs):
    root, vectors, done = runs
    ours, made, _ = done['ours']
    check_run(ours, root / 'ours' / 'work', 'context')
    assert made.sha256 == vectors.sha256
    assert f'Made {TOY_FILE}' in ours.output
    # Nothing of the libraries, no config, no list of hooks.
    before = ours.output.split('Stage 1 of')[0]
    assert 'arning' not in before and before.count('\n') < 25


def test_both_tools_train_the_same(runs):
    ours, stock = (
        states(runs[0] / name / 'work', 3) for name in ('ours', 'stock'))
    assert_equal(ours, stock)


def test_a_checkpoint_is_tested_without_vectors(runs):
    """With the result that validation had at the end of training."""
    root, _, done = runs
    test = done['ours'][2]
    assert test.status == 0, test.output[-3000:]
    assert not (root / 'ours' / TOY_FILE).exists()
    assert not (root / 'elsewhere' / 'data').exists()
    found = re.findall(r'mIoU: ([\d.]+)', test.output)
    assert found
    expected = scalars(root / 'ours' / 'work')['mIoU'][-1]
    assert float(found[-1]) == pytest.approx(expected, abs=0.02)


def test_camvid_config_through_the_stock_tool(runs):
    root, _, done = runs
    imported, rows, trained = done['camvid']
    assert imported.status == 0, imported.output
    made = TextEmbeddings.load(root / 'camvid' / CAMVID_FILE)
    assert made.names == CamVidDataset.METAINFO['classes']
    expected = F.normalize(torch.tensor(rows.copy()).float(), dim=1)
    torch.testing.assert_close(made.vectors, expected)
    work = root / 'camvid' / 'work'
    embeddings, offset, _ = check_run(trained, work, 'offset')
    assert offset.shape == (11, 512) and offset.abs().max() > 0
    expected = F.normalize(made.vectors + 0.5 * offset, dim=1)
    torch.testing.assert_close(embeddings, expected)
