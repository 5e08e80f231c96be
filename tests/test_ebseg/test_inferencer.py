# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""EBSeg, asked for classes by words through ``TextSegInferencer``."""
import copy
import os.path as osp
import runpy
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmseg.apis import inference_model
from processes import ROOT
from tiny import CLASSES, assert_equal, run, tiny_config

from mmseg_textkd.apis import TextSegInferencer, predict_labels
from mmseg_textkd.text.encode_classes import encode_classes

NEW = ('tree', 'sky', 'bus stop', 'Straße', '道路', 'Truck')


@pytest.fixture(scope='module')
def files(tmp_path_factory, model_cfg):
    """Config and weights of a short training."""
    folder = tmp_path_factory.mktemp('ebseg')
    cfg = tiny_config(folder, max_iters=12)
    # Most of the say to the embedding that has learned something by then.
    cfg.model = model_cfg(balance=dict(alpha=.1, beta=.2, gamma=.1))
    head = cfg.model.decode_head
    head.decoder.num_queries = 6
    cfg.optim_wrapper = dict(type='OptimWrapper', clip_grad=dict(max_norm=1.))
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=5e-3)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = run(cfg).model.eval()
    model.cfg = cfg.copy()
    # Classes of a test configuration, whose file is not there.
    head.test_text = dict(
        type='ClassEmbeddings', file='none', num_classes=3, dim=64)
    cfg.dump(folder / 'config.py')
    return SimpleNamespace(
        model=model,
        config=str(folder / 'config.py'),
        weights=str(folder / 'work/iter_12.pth'),
        images=[str(folder / 'data/img' / f'{i}.png') for i in range(6)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the tests' own."""
    monkeypatch.setenv('MMSEG_TEXTKD_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def inferencer(files):
    """Get a function that loads them."""

    def get(config=files.config):
        made = TextSegInferencer(config, files.weights, device='cpu')
        made.show_progress = False
        return made

    return get


@pytest.fixture
def by_hand(files):
    """The network itself, with its own interface."""
    files.model.set_classes(None)
    return files.model


def label_maps(model, paths):
    found = [inference_model(model, path).pred_sem_seg for path in paths]
    return [result.data[0].numpy() for result in found]


def features(model, path):
    """Masks with their embeddings, CLIP's factor, scores of the image."""
    image = torch.tensor(cv2.imread(path)).permute(2, 0, 1)
    data = model.data_preprocessor(
        dict(inputs=[image], data_samples=[]), False)
    with torch.no_grad():
        inputs = model.extract_feat(data['inputs'])
        found = model.decode_head.embed_masks(inputs)
        scores = model(data['inputs'])
    return found, inputs.clip.logit_scale, F.interpolate(
        scores, image.shape[1:], mode='bilinear')[0]


def between(values):
    """A threshold where rounding does not decide: in the largest gap."""
    values = values.flatten().sort().values
    values = values[len(values) // 5:-len(values) // 5]
    gap = values.diff().argmax()
    return values[gap:gap + 2].mean().item()


def test_new_words_equal_those_by_hand(files, inferencer, by_hand):
    mine = inferencer()
    assert mine.classes == CLASSES and mine.model.out_channels == 8
    own = label_maps(by_hand, files.images)
    assert all(map(np.array_equal, mine(files.images)['predictions'], own))
    before = copy.deepcopy(mine.model.state_dict())
    mine.set_classes(list(NEW))
    assert mine.classes == NEW and mine.model.out_channels == 6
    assert mine.source == '5 new class(es) in 1 template(s); 1 as trained'
    by_hand.set_classes(list(NEW), templates='photo')
    expected = label_maps(by_hand, files.images)
    found = mine(files.images, batch_size=4)['predictions']
    assert all(map(np.array_equal, found, expected))
    assert len(np.unique(found)) > 1
    vectors = encode_classes(list(NEW), 'toyclip', 'photo').vectors
    torch.testing.assert_close(mine.vectors, vectors)
    # Seen is what has the name of a trained class, whatever its spelling.
    for model in (mine.model, by_hand):
        _, seen = model.decode_head.text.vocabulary()
        assert seen.tolist() == [False, True, False, False, False, True]
    assert_equal(mine.model.state_dict(), before)
    mine.set_classes()
    assert mine.classes == CLASSES and mine.source == 'as trained'
    assert all(map(np.array_equal, mine(files.images)['predictions'], own))


def test_similarities_by_hand(files, inferencer, by_hand):
    mine, path = inferencer(), files.images[1]
    mine.set_classes(list(NEW), threshold=.5)
    maps = mine(path, similarity=['道路', 'tree'])['similarity']
    found, _, _ = features(by_hand, path)
    text = encode_classes(['道路', 'tree'], 'toyclip', 'photo').vectors
    pixels = torch.einsum('nqhw,nqd->ndhw', found.masks.sigmoid(),
                          found.attention)
    expected = torch.einsum('kd,ndhw->nkhw', text, F.normalize(pixels, dim=1))
    expected = F.interpolate(expected, (32, 64), mode='bilinear')[0]
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 32, 64) and maps[0].std() > 1e-4
    # One class alone, and a label that has no text.
    one = mine(path, similarity=['tree'])['similarity']
    np.testing.assert_allclose(one[0], maps[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no similarity with \['other'\]"):
        mine(path, similarity=['other'])


def test_threshold_is_on_the_score(files, inferencer, by_hand):
    mine = inferencer()
    by_hand.set_classes(list(NEW), templates='photo')
    scores = features(by_hand, files.images[0])[2]
    top, expected = scores.max(0)
    threshold = between(top)
    mine.set_classes(list(NEW), threshold=threshold)
    assert mine.classes == (*NEW, 'other')
    found = mine(files.images[0])['predictions']
    want = expected.masked_fill(top < threshold, 6)
    assert .1 < (want == 6).float().mean() < .9
    assert np.array_equal(found, want.numpy())
    # The word `other` is a class, and takes what is unsure besides.
    mine.set_classes(list(NEW), other='other', threshold=threshold)
    assert len(mine.vectors) == 7 and mine.classes == (*NEW, 'other')


def test_one_class(files, inferencer, by_hand):
    """Everywhere, or where its score says so."""
    mine = inferencer()
    mine.set_classes(['tree'])
    assert mine(files.images[0])['predictions'].max() == 0
    found, scale, _ = features(by_hand, files.images[0])
    tree = encode_classes(['tree'], 'toyclip', 'photo').vectors[0]
    nothing = F.normalize(by_hand.decode_head.no_object, dim=0)
    masks = F.interpolate(found.masks, (32, 64), mode='bilinear')[0].sigmoid()
    # A softmax over one class is 1; A says whether there is an object.
    things = (scale * found.supervised[0] @ (tree - nothing)).sigmoid()
    score = torch.einsum('q,qhw->hw', things, masks)
    threshold = between(score[score < 1])
    mine.set_classes(['tree'], threshold=threshold)
    want = (score < threshold).long().numpy()
    assert 0 < want.sum() < want.size
    assert np.array_equal(mine(files.images[0])['predictions'], want)


@each_case('test_cfg, number', [
    (dict(mode='whole'), 1),
    (dict(mode='slide', crop_size=(32, 32), stride=(16, 16)), 3 * 11),
])
def test_many_classes_in_parts(files, inferencer, by_hand, test_cfg, number):
    mine, names = inferencer(), [f'thing {i}' for i in range(21)]
    mine.set_classes(names)
    by_hand.set_classes(names, templates='photo')
    mine.model.test_cfg = by_hand.test_cfg = Config(test_cfg)
    expected = inference_model(by_hand, files.images[2]).pred_sem_seg.data
    by_hand.test_cfg = Config(dict(mode='whole'))
    runs = []
    mine.model.backbone.register_forward_hook(lambda *args: runs.append(1))
    data = mine.model.data_preprocessor(
        mine.collate_fn([mine.pipeline(files.images[2])]), False)
    # Two at a time, of which the last has no partner.
    out, = predict_labels(
        mine.adapter, data['inputs'], data['data_samples'], budget=1)
    assert torch.equal(out.pred_sem_seg.data, expected)
    assert len(runs) == number
    assert mine.model.out_channels == 21


@each_case('how, message', [
    (dict(classes=[]), 'names no class'),
    (dict(classes=['sky', 'tree', 'sky']), "'sky' occurs twice"),
    (dict(classes=['sky', ' ']), 'empty'),
    (dict(classes=['tree', ' '.join(['very'] * 40)]), 'than the 32 tokens'),
    (dict(classes=['tree'], new_bias=1.), 'EBSeg balances seen and new'),
    (dict(classes=['tree'], threshold=2.), 'a probability between'),
    (dict(classes=['tree', 'other'], threshold=.5), "'other' already"),
    (dict(classes=['tree'], embeddings='none.st'), 'none.st'),
])
def test_what_does_not_apply_changes_nothing(inferencer, how, message):
    mine = inferencer()
    mine.set_classes(['sky', 'tree'])
    vectors = mine.vectors.clone()
    with pytest.raises((OSError, ValueError), match=message):
        mine.set_classes(**how)
    assert mine.classes == ('sky', 'tree') and mine.threshold is None
    assert mine.model.out_channels == 2
    assert torch.equal(mine.vectors, vectors)
    assert torch.equal(mine.model.decode_head.text.vocabulary()[0], vectors)


def test_the_checkpoint_is_enough_for_its_own_classes(files, inferencer,
                                                      monkeypatch):
    """Neither the file of its text nor the text tower is needed for them."""
    cfg = Config.fromfile(files.config)
    cfg.model.decode_head.text.file = 'none.safetensors'
    cfg.model.decode_head.text.dim = 64
    mine = inferencer(cfg)
    with monkeypatch.context() as patch:
        patch.setattr('mmseg_textkd.apis.class_encoder.load_tower', None)
        expected = mine(files.images[0])['predictions']
        mine.set_classes(['car', 'sky'])
        assert mine.source == 'as trained'
        assert mine.model.decode_head.text.vocabulary()[1].all()
    # The image tower says which text tower it is.
    mine.set_classes([*CLASSES, 'tree'])
    assert mine.source.startswith('1 new class(es) in 14 template(s)')
    _, seen = mine.model.decode_head.text.vocabulary()
    assert seen.tolist() == [True] * 8 + [False]
    mine.set_classes()
    assert np.array_equal(mine(files.images[0])['predictions'], expected)


def test_demo_and_page(files, inferencer, tmp_path, capsys):
    demo, page = (
        runpy.run_path(osp.join(ROOT, 'demo', name))
        for name in ('image_demo.py', 'gradio_app.py'))
    common = [files.images[0], files.config, files.weights, '--device', 'cpu']
    common += ['--out', str(tmp_path), '--classes']
    words = [', '.join(NEW), '--other', '--similarity', 'tree']
    demo['main']([*common, *words])
    assert '7 labels: 6 new class(es)' in capsys.readouterr().out
    mine = inferencer()
    mine.set_classes(list(NEW), other='other')
    expected = mine(files.images[0])['predictions']
    label_map = cv2.imread(str(tmp_path / 'pred/00000000_pred.png'), -1)
    assert np.array_equal(label_map, expected)
    assert (tmp_path / 'vis/0.png_tree.png').is_file()
    with pytest.raises(SystemExit, match='EBSeg balances'):
        demo['main']([*common, 'tree', '--new-bias', '1'])
    picture = cv2.imread(files.images[0])[..., ::-1]
    found = page['segment'](mine, picture, ', '.join(NEW), True)
    assert np.array_equal(found.labels, expected)
    assert found.classes == (*NEW, 'other')
