# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Classes that are named after the training."""
import copy
import functools
import os.path as osp
import re
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model, init_model
from mmseg.models import FCNHead
from mmseg.registry import MODELS
from processes import ROOT, load
from text_runs import CONTEXT, FIXED, RUNS, logits_by_hand, make
from tiny import CLASSES, CONTROL, save_weights, tiny_config, write_video
from tool_modules import call, fails, load_tool
from torch import nn

from mmseg_textkd.analysis.benchmark import peak_memory
from mmseg_textkd.apis import TextSegInferencer, predict_labels
from mmseg_textkd.apis.adapters import FoldedAdapter, build_adapter
from mmseg_textkd.apis.class_encoder import ClassEncoder, _versions
from mmseg_textkd.apis.drawing import draw_labels, draw_similarity, palette_for
from mmseg_textkd.apis.label_maps import select_classes
from mmseg_textkd.clip import TextTower
from mmseg_textkd.deploy import L2ConvSeg, fold_state_dict, to_stock_cfg
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes

NEW = ('tree', 'road', 'bus stop', 'Straße', '道路')
OWN = 'decode_head.conv_seg.text.class_embeddings'


@pytest.fixture(scope='module')
def worded(tmp_path_factory):
    """Get a function that gives one of the ``RUNS``, made when asked for."""

    def get(name):
        with DefaultScope.overwrite_default_scope('mmseg'):
            return make(tmp_path_factory.mktemp(name), *RUNS[name])

    get = functools.cache(get)
    return lambda name='residual': get(name)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the tests' own."""
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('MMSEG_TEXTKD_CACHE', str(folder))
    return folder


@pytest.fixture
def inferencer(worded):
    """Get a function that loads one of the ``RUNS``."""

    def get(name='residual'):
        run = worded(name)
        made = TextSegInferencer(run.config, run.weights, device='cpu')
        made.show_progress = False
        return made

    return get


def encoded(phrases, templates='photo'):
    return encode_classes(list(phrases), 'toyclip', templates).vectors


def by_hand(run, new=None, favor=0.):
    """Logits and cosines of ``NEW``, `road` (2) as trained."""
    state = load(run.weights)['state_dict']
    vectors = encoded(NEW) if new is None else new.clone()
    vectors[1] = state[OWN][2]
    bias = state['decode_head.conv_seg.logit_bias'].double()
    biases = (bias.mean() + favor).repeat(len(NEW))
    biases[1] = bias[2]
    return logits_by_hand(run, run.images[0], vectors, biases)


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def in_parts(mine, path, budget):
    """What `predict_labels` finds, without logits of all classes."""
    batch = mine.collate_fn([mine.pipeline(path)])
    data = mine.model.data_preprocessor(batch, False)
    out, = predict_labels(
        mine.adapter, data['inputs'], data['data_samples'], budget=budget)
    assert 'seg_logits' not in out
    return out.pred_sem_seg.data


@pytest.mark.stacks
@pytest.mark.parametrize('name', ['residual', 'l2', 'auxiliary'])
def test_trained_classes_as_ever(worded, inferencer, name):
    mine, run = inferencer(name), worded(name)
    model = init_model(run.config, run.weights, device='cpu')
    expected = inference_model(model, run.images)
    expected = np.stack([x.pred_sem_seg.data[0] for x in expected])
    found = mine(run.images, batch_size=4)['predictions']
    assert np.array_equal(found, expected) and len(np.unique(found)) > 2
    if name != 'auxiliary':
        # Other words and back again.
        mine.set_classes(list(NEW))
        mine.set_classes()
        assert mine.classes == CLASSES and mine.source == 'as trained'
        assert np.array_equal(mine(run.images)['predictions'], expected)


@pytest.mark.parametrize('name, favor', [('fixed', 1.5), ('residual', 0.),
                                         ('mixture', 0.), ('specific', 0.),
                                         ('l2', 0.)])
def test_new_classes_equal_those_by_hand(worded, inferencer, name, favor):
    run, mine = worded(name), inferencer(name)
    before = {k: v.clone() for k, v in mine.model.state_dict().items()}
    mine.set_classes(list(NEW), new_bias=favor, new_words='raw')
    expected, cosine = by_hand(run, favor=favor)
    found = mine(run.images[0], similarity=['道路', 'tree'])
    assert np.array_equal(found['predictions'], expected.argmax(0))
    np.testing.assert_allclose(
        found['similarity'], cosine[[4, 0]], rtol=1e-4, atol=1e-5)
    # The class list has changed, the network has not.
    after = mine.model.state_dict()
    changed = {k for k in before if not k.startswith('decode_head.conv_seg')}
    assert changed and all(torch.equal(before[k], after[k]) for k in changed)
    # MMSegmentation's own function sees the same network.
    result = inference_model(mine.model, run.images[0])
    near(result.seg_logits.data, expected.float())
    kind = L2ConvSeg if name == 'l2' else torch.nn.Conv2d
    assert type(mine.model.decode_head.conv_seg) is kind
    said = '4 new class(es) in 1 template(s)'
    if name in ('residual', 'mixture', 'specific'):
        learner = RUNS[name][0]['type']
        said += (f', as what {learner} has learned belongs to the trained '
                 'classes alone')
    assert mine.source == f'{said}; 1 as trained'


def test_lsegs_blocks_serve_new_classes(worded, inferencer):
    """They follow the cosines, whatever the number of labels."""
    run, mine = worded('lseg'), inferencer('lseg')
    model = init_model(run.config, run.weights, device='cpu')
    branch = model.decode_head.text_branch
    trained = inference_model(model, run.images[0]).pred_sem_seg.data[0]
    assert np.array_equal(mine(run.images[0])['predictions'], trained)
    mine.set_classes(list(NEW))
    vectors = encoded(NEW)
    vectors[1] = branch.text.class_embeddings[2]
    feat = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        cosine = F.conv2d(branch.projection(feat), vectors[..., None, None])
        near(
            mine.model.decode_head.conv_seg(feat),
            branch.regularization(branch.scale() * cosine))
    # In parts too, which the blocks do not see.
    labels = mine(run.images[0])['predictions']
    assert np.array_equal(in_parts(mine, run.images[0], 1)[0], labels)


def test_block_of_the_guide(worded):
    guide = osp.join(ROOT, 'docs/en/user_guides/inference.md')
    with open(guide, encoding='utf-8') as file:
        blocks = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
    code, = (block for block in blocks if 'set_classes' in block)
    run = worded()
    names = dict(config=run.config, weights=run.weights, image=run.images[0])
    exec(code, names)
    found = names['found']
    assert names['inferencer'].classes == ('road', 'tree', 'bus stop', 'other')
    assert found['predictions'].shape == (32, 64)
    assert found['visualization'].dtype == np.uint8
    assert found['similarity'].shape == (1, 32, 64)


def test_unified_context_serves_new_names(worded, inferencer):
    run, mine = worded('unified'), inferencer('unified')
    mine.set_classes(list(NEW), new_words='raw')
    said = '4 new class(es) in the learned context; 1 as trained'
    assert mine.source == said
    # The same by a learner of these names that has the learned vectors.
    names = dict(num_classes=len(NEW), vocabulary=list(NEW))
    learner = MODELS.build(
        dict(CONTEXT, embeddings=dict(FIXED, file='none'), **names))
    state = load(run.weights)['state_dict']
    context = state['decode_head.conv_seg.text.context']
    assert context.std() > 1e-3
    learner.context.data.copy_(context)
    learner.prepare()
    with torch.no_grad():
        new = learner.compute()
    expected = by_hand(run, new)[0].argmax(0)
    assert np.array_equal(mine(run.images[0])['predictions'], expected)
    assert (new - encoded(NEW)).abs().max() > 1e-3
    # Templates that are asked for are used.
    mine.set_classes(list(NEW), templates='none')
    assert '4 new class(es) in 1 template' in mine.source
    torch.testing.assert_close(mine.vectors[0], encoded(NEW, 'none')[0])


def test_centered_vectors_stay_centered(worded, inferencer):
    run, mine = worded('centered'), inferencer('centered')
    mine.set_classes(list(NEW))
    shift = TextEmbeddings.load(run.file).vectors.mean(dim=0)
    expected = F.normalize(encoded(NEW) - shift, dim=1)
    torch.testing.assert_close(mine.vectors[0], expected[0])
    assert (mine.vectors[0] - encoded(NEW)[0]).abs().max() > .05
    kept = run.file.rename(run.file.with_suffix('.away'))
    try:
        with pytest.raises(ValueError, match='trained with centered vectors'):
            inferencer('centered').set_classes(
                list(NEW), tower='toyclip', templates='photo')
    finally:
        kept.rename(run.file)


def test_auxiliary_role_classifies_by_its_branch(worded, inferencer):
    """Cosine and scale of the alignment loss, batch norm folded in."""
    run, mine = worded('auxiliary'), inferencer('auxiliary')
    mine.set_classes(list(NEW))
    head = init_model(run.config, run.weights, device='cpu').decode_head
    vectors = encoded(NEW)
    vectors[1] = head.text_branch.text.class_embeddings[2]
    feat = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        pixels = F.normalize(head.text_branch.projection(feat), dim=1)
        cosine = F.conv2d(pixels, vectors[..., None, None])
        got = mine.model.decode_head.conv_seg(feat)
        near(got, head.text_losses[0].scale() * cosine)


def test_auxiliary_role_takes_the_scale_of_the_alignment(tmp_path):
    """Whatever losses there are beside, and in which order."""
    structure = dict(type='SemanticStructureLoss')
    distilled = dict(type='TextSimilarityDistillationLoss')
    align = dict(type='TextAlignmentLoss', scale=dict(init=5.))
    for losses, scale in (([structure, align], 5.), ([distilled, align], 5.),
                          ([structure], 1 / .07)):
        cfg = tiny_config(tmp_path, CONTROL)
        cfg.model.decode_head.update(role='auxiliary', text_losses=losses)
        model = MODELS.build(cfg.model)
        model.cfg = cfg
        adapter = build_adapter(model, CLASSES)
        assert float(adapter.scale) == pytest.approx(scale)


def test_auxiliary_role_keeps_its_classifier(worded, inferencer):
    """For trained classes: all of them, or rows of it."""
    run, mine = worded('auxiliary'), inferencer('auxiliary')
    head = init_model(run.config, run.weights, device='cpu').decode_head
    feat = torch.randn(1, 16, 5, 6)
    image = cv2.imread(run.images[0])
    mine.set_classes(list(NEW))
    for classes, rows in ((None, range(len(CLASSES))),
                          ([CLASSES[5], CLASSES[0]], [5, 0])):
        mine.set_classes(classes)
        with torch.no_grad():
            near(
                mine.model.decode_head.conv_seg(feat),
                head.conv_seg(feat)[:, list(rows)])
        assert mine(image)['predictions'].max() < len(rows)
    # Cosines are those of the text branch.
    found = mine(image, similarity=[CLASSES[0]])['similarity']
    assert np.abs(found).max() <= 1


def test_vectors_of_a_file(worded, inferencer, tmp_path):
    mine, file = inferencer(), tmp_path / 'new.safetensors'
    record = encode_classes(list(NEW), 'toyclip', 'vild')
    record.save(file)
    mine.set_classes(['道路', 'tree'], embeddings=file)
    torch.testing.assert_close(mine.vectors, record.vectors[[4, 0]])
    mine.set_classes(embeddings=file)
    assert mine.classes == NEW
    own = load(worded().weights)['state_dict'][OWN][2]
    torch.testing.assert_close(mine.vectors[1], own)
    with pytest.raises(ValueError, match=r"no vectors for \['other'\]"):
        mine.set_classes(embeddings=file, other='other')
    with pytest.raises(ValueError, match=r"for \['lake'\].*_text.py FILE` l"):
        mine.set_classes(['lake'], embeddings=file)
    for change, message in ((dict(model='ViT-B-16'), 'not in the same'),
                            (dict(vectors=torch.eye(5, 512)), 'width 512')):
        fields = dict(vectors=record.vectors, names=NEW, model='toyclip')
        TextEmbeddings(**dict(fields, **change)).save(tmp_path / 'bad.st')
        with pytest.raises(ValueError, match=message):
            mine.set_classes(embeddings=tmp_path / 'bad.st')
    assert mine.classes == NEW


def test_everything_else(worded, inferencer):
    run, mine = worded(), inferencer()
    mine.set_classes(list(NEW), other='other')
    assert mine.classes == (*NEW, 'other')
    torch.testing.assert_close(mine.vectors[5], encoded(['other'])[0])
    top, expected = by_hand(run)[0].softmax(0).max(0)
    # Where rounding does not decide: in the largest gap.
    values = top.flatten().sort().values[400:-400]
    gap = values.diff().argmax()
    threshold = values[gap:gap + 2].mean().item()
    mine.set_classes(list(NEW), threshold=threshold, new_words='raw')
    assert mine.classes == (*NEW, 'other')
    want = expected.masked_fill(top < threshold, 5)
    assert .1 < (want == 5).float().mean() < .9
    assert np.array_equal(mine(run.images[0])['predictions'], want)
    # A word, and what is unsure besides.
    mine.set_classes(list(NEW), other='thing', threshold=.99)
    assert mine.classes == (*NEW, 'thing') and len(mine.vectors) == 6
    assert mine(run.images[0])['predictions'].max() == 5
    for bad in (0, 1, 1.5):
        with pytest.raises(ValueError, match='a probability between'):
            mine.set_classes(list(NEW), threshold=bad)
    with pytest.raises(ValueError, match="called 'other' already"):
        mine.set_classes(['a', 'other'], threshold=.5)


@each_case('classes, message', [
    ([], 'names no class'),
    (['road', 'tree', 'road'], "'road' occurs twice"),
    (['road', ' '], 'empty'),
    (['tree', 'very ' * 40], 'the tower takes 32|longer than the 32 tokens'),
    ('nonsense', 'Unknown vocabulary'),
])
@pytest.mark.parametrize('name', ['residual', 'unified'])
def test_bad_classes_change_nothing(worded, inferencer, name, classes,
                                    message):
    mine, image = inferencer(name), worded(name).images[0]
    mine.set_classes(['road', 'tree'])
    before = mine(image)['predictions']
    with pytest.raises(ValueError, match=message):
        mine.set_classes(classes)
    assert mine.classes == ('road', 'tree')
    assert np.array_equal(mine(image)['predictions'], before)


def test_ten_thousand_classes_in_bounded_memory(worded, inferencer, tmp_path):
    image, mine = worded().images[0], inferencer()
    vectors = F.normalize(torch.randn(10_000, 64), dim=1)
    names = tuple(f'thing {i}' for i in range(10_000))
    TextEmbeddings(vectors, names).save(tmp_path / 'many.safetensors')
    mine.set_classes(embeddings=tmp_path / 'many.safetensors')
    calls = []
    handle = mine.model.backbone.register_forward_hook(
        lambda *args: calls.append(1))
    # All at once are 80 MB; three times the budget and the network are not.
    budget, parts = 2**18, []
    assert 32 * 64 * 10_000 > 50 * budget
    peak = peak_memory(lambda: parts.append(in_parts(mine, image, budget)),
                       'cpu')
    assert peak < 8 * 4 * budget
    assert torch.equal(parts[0], in_parts(mine, image, 2**25))
    assert calls == [1, 1]
    assert parts[0].max() > 2000 and len(parts[0].unique()) > 4
    handle.remove()
    # Label maps are written whole.
    mine(image, out_dir=str(tmp_path))
    written = cv2.imread(str(tmp_path / 'pred/00000000_pred.png'), -1)
    assert written.dtype == np.uint16 and np.array_equal(written, parts[0][0])


def test_many_new_words_are_encoded_in_parts(inferencer, monkeypatch):
    mine = inferencer('fixed')
    monkeypatch.setattr('mmseg_textkd.apis.class_encoder.BLOCK', 7)
    names = [f'thing {i}' for i in range(20)]
    mine.set_classes(names)
    torch.testing.assert_close(mine.vectors, encoded(names))


@pytest.mark.parametrize('name', ['residual', 'l2'])
def test_sliding_windows_and_parts(worded, inferencer, name):
    image, mine = worded(name).images[0], inferencer(name)
    mine.set_classes(list(NEW))
    mine.model.test_cfg = Config(
        dict(mode='slide', crop_size=(32, 32), stride=(16, 16)))
    expected = inference_model(mine.model, image).pred_sem_seg.data
    # Two classes at a time, of which the last has no partner.
    assert torch.equal(in_parts(mine, image, 1), expected)
    assert mine.model.out_channels == len(NEW)


def test_folded_weights_serve_their_own_classes(worded, tmp_path):
    run, folded = worded(), tmp_path / 'folded.pth'
    cfg = Config.fromfile(run.config)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(load(run.weights)['state_dict'])
    save_weights(folded, fold_state_dict(model))
    to_stock_cfg(cfg).dump(tmp_path / 'folded.py')
    text = TextSegInferencer(run.config, run.weights, device='cpu')
    expected = text(run.images[0])['predictions']
    text.set_classes(['car', 'sky'])
    some = text(run.images[0])['predictions']
    # With the config of the training, and with its own.
    for config in (run.config, tmp_path / 'folded.py'):
        mine = TextSegInferencer(config, folded, device='cpu')
        assert np.array_equal(mine(run.images[0])['predictions'], expected)
        message = r"is folded, or stock.*cannot predict \['tree'\]"
        with pytest.raises(ValueError, match=message):
            mine.set_classes(['road', 'tree'])
        mine.set_classes(['car', 'sky'])
        assert np.array_equal(mine(run.images[0])['predictions'], some)
        with pytest.raises(ValueError, match='no pixel embeddings'):
            mine(run.images[0], similarity=['car'])


def test_checkpoint_of_mmsegmentation_0(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.dump(tmp_path / 'c.py')
    meta = dict(CLASSES=CLASSES, PALETTE=[[k, 0, 9] for k in range(8)])
    state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=state, meta=meta), tmp_path / 'w.pth')
    mine = TextSegInferencer(
        str(tmp_path / 'c.py'), tmp_path / 'w.pth', device='cpu')
    assert mine.classes == CLASSES
    assert list(map(list,
                    mine.model.dataset_meta['palette'])) == meta['PALETTE']


@each_case('text', [CONTROL, dict(type='LearnedEmbeddings')])
def test_what_is_no_language_has_no_words(worded, tmp_path, text):
    cfg = Config.fromfile(worded().config)
    cfg.model.decode_head.text = dict(text, dim=64)
    torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / 'w.pth')
    mine = TextSegInferencer(cfg, tmp_path / 'w.pth', device='cpu')
    assert mine.classes == tuple(f'class {i}' for i in range(8))
    encode_classes(['tree'], 'toyclip', 'photo').save(tmp_path / 'tree.st')
    for file in (None, tmp_path / 'tree.st'):
        with pytest.raises(ValueError, match='without language'):
            mine.set_classes(['tree'], embeddings=file)
    mine.set_classes(['class 3', 'class 1'])


@each_case('norm', ['bn', 'l2'])
def test_fusion_that_is_kept_takes_no_other_classes(worded, tmp_path, norm):
    """Its logits depend on the image, with an L2 norm too."""
    cfg = Config.fromfile(worded().config)
    head = cfg.model.decode_head
    head.text, head.text_branch = dict(CONTROL, dim=64), dict(norm=norm)
    head.fusion = dict(type='TwoWayBridge', use='inference')
    torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / 'w.pth')
    with pytest.raises(ValueError, match='TwoWayBridge .* on the image'):
        TextSegInferencer(cfg, tmp_path / 'w.pth', device='cpu')


def test_other_towers_are_noticed(worded, tmp_path, monkeypatch):
    """A file that is missing, a tower of another width or other vectors."""
    run = worded('fixed')
    cfg = Config.fromfile(run.config)
    cfg.model.decode_head.text.file = str(tmp_path / 'none.safetensors')
    mine = TextSegInferencer(copy.deepcopy(cfg), run.weights, device='cpu')
    with pytest.raises(ValueError, match='not known which text tower'):
        mine.set_classes(['tree'])
    said = []
    monkeypatch.setattr('mmseg_textkd.apis.class_encoder.print_log',
                        lambda text, *args: said.append(text))
    mine.set_classes(['tree'], tower='toyclip', templates='photo')
    torch.testing.assert_close(mine.vectors, encoded(['tree']))
    assert not said
    # The same width, but other vectors: here those of other weights.
    state = load(run.weights)
    state['state_dict'][OWN] = F.normalize(torch.randn(8, 64), dim=1)
    torch.save(state, tmp_path / 'w.pth')
    mine = TextSegInferencer(cfg, tmp_path / 'w.pth', device='cpu')
    mine.set_classes(['tree'], tower='toyclip', templates='photo')
    assert len(said) == 1 and 'it is another tower' in said[0]


def test_cache(inferencer, cache, monkeypatch):
    expected = encoded(NEW)[0]

    def ask():
        mine = inferencer()
        mine.set_classes(list(NEW))
        torch.testing.assert_close(mine.vectors[0], expected)
        return mine

    def never(*args):
        raise AssertionError('the tower was loaded')

    ask()
    files = set(cache.iterdir())
    assert len(files) == 2  # new classes and, to compare, the trained ones
    assert all(len(file.stem) == 64 for file in files)
    with monkeypatch.context() as patch:
        patch.setattr('mmseg_textkd.apis.class_encoder.load_tower', never)
        with pytest.raises(AssertionError, match='was loaded'):
            ask().set_classes([*NEW, 'lake'])
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    ask()
    assert set(cache.iterdir()) == files
    # Learned contexts have entries of their own.
    inferencer('unified').set_classes(list(NEW))
    assert len(set(cache.iterdir()) - files) == 1
    # One that cannot be written is done without.
    monkeypatch.setenv('MMSEG_TEXTKD_CACHE', osp.join(ROOT, 'README.md', 'x'))
    ask()


def test_overlay_and_legend():
    image = np.full((60, 40, 3), 100, np.uint8)
    labels = np.zeros((60, 40), int)
    labels[:10] = 2
    palette = palette_for([(200, 0, 0), None, (0, 0, 200)])
    assert palette[0] == [200, 0, 0] and palette[2] == [0, 0, 200]
    names = ('дерево', 'unseen', '道路')
    drawn = draw_labels(image, labels, names, palette, .25)
    assert drawn.shape == (60, 220, 3)
    assert drawn[30, 5].tolist() == [125, 75, 75]
    assert drawn[5, 5].tolist() == [75, 75, 125]
    # None that is not seen.
    assert (drawn[46:, 40:] == 255).all()
    plain = draw_labels(image, labels, names, palette, .25, legend=False)
    assert np.array_equal(plain, drawn[:, :40])
    # Letters of another script are drawn, and are not those of a third.
    other = draw_labels(image, labels, ('ерводе', *names[1:]), palette, .25)
    assert not np.array_equal(other[:22, 40:], drawn[:22, 40:])
    assert len(set(map(tuple, palette_for([None] * 100)))) == 100


def test_long_names_end_inside_the_legend():
    image, labels = np.zeros((22, 4, 3), np.uint8), np.zeros((22, 4), int)
    name = 'crt screen on a desk of the second floor'

    def legend(name):
        return draw_labels(image, labels, [name], [(9, 9, 9)])[:, 4:]

    assert (legend(name)[:, -5:] == 255).all()
    # It is cut at its end, and that shows.
    assert np.array_equal(legend(name)[:, :120], legend(name + '!')[:, :120])
    assert not np.array_equal(legend(name), legend(name[:18]))
    assert (legend('crt')[:, 80:] == 255).all()


@each_case('height', [400, 1080])
def test_legends_keep_their_order_and_grow_with_the_image(height):
    """In a video the shares of the classes change from frame to frame."""
    scale, image = max(1, height / 540), np.zeros((height, 8, 3), np.uint8)
    palette, legends = [(200, 0, 0), (0, 0, 200)], []
    for largest in (0, 1):
        labels = np.full((height, 8), largest)
        labels[:3] = 1 - largest
        drawn = draw_labels(image, labels, ('road', 'sky'), palette)
        legends.append(drawn[:, 8:])
    assert np.array_equal(*legends)
    assert legends[0].shape[1] == round(180 * scale)
    rows, column = (round(x * scale) for x in (11, 33)), round(15 * scale)
    assert np.array_equal(legends[0][list(rows), column], palette)


def test_similarity_maps_have_a_title_a_color_bar_and_the_image():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (200, 50, 3), dtype=np.uint8)
    cosines = np.tile(np.linspace(-.2, .6, 50), (200, 1))
    drawn = draw_similarity(cosines, image, 'tree', opacity=.6)
    assert drawn.shape == (200, 230, 3)
    viridis = colormaps['viridis']
    colors = 255 * viridis((cosines + .2) / .8)[..., :3]
    expected = .4 * image.mean(-1, keepdims=True) + .6 * colors
    np.testing.assert_allclose(drawn[:, :50], expected, atol=3)
    bar = drawn[22 + 4:200 - 4, 50 + 12]
    colors = 255 * viridis(np.linspace(1, 0, len(bar)))[:, :3]
    np.testing.assert_allclose(bar, colors, atol=4)
    other = draw_similarity(cosines, image, 'bus', opacity=.6)
    assert (other != drawn).any(-1).any(1).nonzero()[0].max() < 22
    # The numbers of its ends stand beside it.
    half = cosines * .5
    other = draw_similarity(half, image, 'tree', opacity=.6)
    assert (other[:, 80:] != drawn[:, 80:]).any()
    assert np.array_equal(draw_similarity(half), draw_similarity(cosines))


def test_select_classes_with_repeats():
    conv, feat = torch.nn.Conv2d(4, 3, 1), torch.randn(1, 4, 2, 2)
    got = select_classes(conv, torch.tensor([2, 2, 0]))(feat)
    torch.testing.assert_close(got, conv(feat)[:, [2, 2, 0]])


def test_arrays_are_images_or_errors(worded, inferencer):
    mine, image = inferencer(), cv2.imread(worded().images[0])
    gray = image[..., :1]
    expected = mine(gray.repeat(3, axis=2))['predictions']
    for same in (gray, gray[..., 0]):
        assert np.array_equal(mine(same)['predictions'], expected)
    for bad in (image / 255, image.astype(np.uint16) * 257,
                image.astype(np.float32), image[:0], image[None],
                np.dstack([image, gray])):
        with pytest.raises(ValueError, match='must be uint8'):
            mine(bad)


def test_names_with_blanks_around_are_trained_names():
    """As 'bed ' of ADE20K."""
    text = dict(CONTROL, num_classes=2)
    encoder = ClassEncoder(MODELS.build(text), text, ('bed ', 'street_sign'))
    model = SimpleNamespace(out_channels=2, decode_head=nn.Module())
    model.decode_head.conv_seg = nn.Conv2d(4, 2, 1)
    for mine in (encoder, FoldedAdapter(model, ('bed ', 'street_sign'))):
        for names in (['street_sign', 'bed'], ['street_sign', 'bed ']):
            assert mine.encode(names).trained == [1, 0]


def test_phrases_of_the_training_are_no_new_words(tmp_path):
    """Of its file, or of its config where the file is not here."""
    vocabulary = dict(road=['street', 'lane'], car='car', bus=['coach', 'bus'])
    file = str(tmp_path / 'own.safetensors')
    build = dict(model='toyclip', vocabulary=vocabulary, templates='none')
    text = dict(
        type='ResidualPromptLearner',
        num_classes=3,
        embeddings=dict(
            type='ClassEmbeddings', file=file, dim=64, build=build))
    encode_classes(vocabulary, TextTower('toyclip'), 'none').save(file)
    there = MODELS.build(text)
    Path(file).unlink()
    for provider in (there, MODELS.build(text)):
        encoder = ClassEncoder(provider, text, tuple(vocabulary))
        provider.fill(torch.randn(3, 64))
        assert encoder.encode(vocabulary).trained == [0, 1, 2]
        assert encoder.encode(['bus', 'road']).trained == [2, 0]
        other = dict(vocabulary, road='street', bus=['bus', 'coach'])
        assert encoder.encode(other).trained == [None, 1, None]
    # Vectors without language have no others, whatever the phrases are.
    control = dict(CONTROL, num_classes=3)
    encoder = ClassEncoder(MODELS.build(control), control, tuple(vocabulary))
    assert encoder.encode(vocabulary).trained == [0, 1, 2]


def test_weights_of_a_tower_in_the_home_folder(tmp_path, monkeypatch):
    """They are in the key of the cache, and where the provider says."""
    monkeypatch.setenv('HOME', str(tmp_path))
    weights = tmp_path / 'clip' / 'weights.safetensors'
    weights.parent.mkdir()
    weights.write_bytes(b'a')
    towers = ('local-dir:~/clip', None), ('ViT-B-16', f'~/clip/{weights.name}')
    before = [_versions(tower) for tower in towers]
    weights.write_bytes(b'other')
    assert all(_versions(t) != old for t, old in zip(towers, before))
    text = dict(
        type='ContextPromptLearner',
        embeddings=CONTROL,
        num_classes=2,
        model='toyclip',
        vocabulary=['road', 'car'],
        cache_dir=str(tmp_path))
    for own in (text,
                dict(
                    text,
                    cache_dir=None,
                    embeddings=dict(
                        CONTROL, build=dict(cache_dir=str(tmp_path))))):
        learner = MODELS.build(dict(text, cache_dir=own['cache_dir']))
        encoder = ClassEncoder(learner, own, ('road', 'car'))
        assert encoder.weights_dir == str(tmp_path)


def test_a_config_is_left_as_it_is(worded):
    run = worded('fixed')
    cfg = Config.fromfile(run.config)
    part = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[part, part])
    before = copy.deepcopy(cfg.to_dict())
    TextSegInferencer(
        cfg,
        run.weights,
        device='cpu',
        cfg_options={'model.decode_head.dropout_ratio': .5})
    assert cfg.to_dict() == before


def test_threads_do_not_disturb_each_other(worded, inferencer):
    mine, paths = inferencer(), worded('residual').images

    def segment(path):
        found = mine(path, similarity=['road', 'sky'])
        return found['predictions'], found['similarity']

    expected = [segment(path) for path in paths]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for a, b in zip(pool.map(segment, paths), expected):
                assert all(map(np.array_equal, a, b))


def test_a_call_has_one_list_of_classes(worded, inferencer):
    """Though another thread wants to change it meanwhile."""
    mine, image = inferencer(), worded('residual').images[0]
    expected = mine(image, return_vis=True)['visualization']
    drawn, changes = mine.visualize, []

    def visualize(*args, **kwargs):
        changes.append(pool.submit(mine.set_classes, ['car']))
        wait(changes, timeout=.5)
        return drawn(*args, **kwargs)

    mine.visualize = visualize
    with ThreadPoolExecutor(1) as pool:
        shown = mine(image, return_vis=True)['visualization']
    assert np.array_equal(shown, expected)
    changes[0].result()
    assert list(mine.classes) == ['car']


@MODELS.register_module()
class WithoutConvSeg(FCNHead):
    """A head that classifies by a layer of another name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.classifier = self.conv_seg
        del self.conv_seg


def test_a_head_without_the_layer_is_told(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg.model.decode_head.type = 'WithoutConvSeg'
    save_weights(tmp_path / 'w.pth', MODELS.build(cfg.model))
    with pytest.raises(ValueError, match='WithoutConvSeg has no `conv_seg`'):
        TextSegInferencer(cfg, tmp_path / 'w.pth', device='cpu')


def test_a_copy_has_classes_of_its_own(worded, inferencer):
    mine, image = inferencer(), worded('residual').images[0]
    expected = mine(image)['predictions']
    # One that shares the network waits for it, too.
    assert copy.copy(mine).lock is mine.lock
    other = copy.deepcopy(mine)
    assert other.lock is not mine.lock
    other.set_classes(['car'])
    assert not other(image)['predictions'].any()
    assert np.array_equal(mine(image)['predictions'], expected)


def test_each_similarity_has_a_picture_of_its_own(inferencer, tmp_path):
    """Of images that differ in their ending, and words in what is left out."""
    image = np.zeros((32, 64, 3), np.uint8)
    (tmp_path / 'in').mkdir()
    for name in ('a.jpg', 'a.png'):
        cv2.imwrite(str(tmp_path / 'in' / name), image)
    mine = inferencer()
    mine.set_classes(['car!', 'car?', 'sky'])
    mine(
        str(tmp_path / 'in'),
        out_dir=str(tmp_path),
        similarity=['car!', 'car?'])
    assert len(list((tmp_path / 'vis').iterdir())) == 2 + 4


def test_similarity_by_one_name_or_vocabulary(worded, inferencer, tmp_path):
    mine, image = inferencer(), worded().images[0]
    expected = mine(image, similarity=['road', 'sky'])['similarity']
    (tmp_path / 'some.txt').write_text('road\nsky')
    found = mine(image, similarity=str(tmp_path / 'some.txt'))['similarity']
    assert np.array_equal(found, expected)
    one = mine(image, similarity='road')['similarity']
    np.testing.assert_allclose(one[0], expected[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='no similarity with .*bicyclist'):
        mine(image, similarity='camvid')
    # A single class takes all.
    mine.set_classes(['tree'])
    found = mine(image, similarity=['tree'])
    assert found['predictions'].max() == 0
    assert found['similarity'].shape == (1, 32, 64)


@each_case('folder', ['vis', 'pred'])
def test_results_never_replace_inputs(worded, inferencer, tmp_path, folder):
    image, path = cv2.imread(worded().images[0]), tmp_path / folder / 'a.png'
    path.parent.mkdir()
    cv2.imwrite(str(path), image)
    with pytest.raises(ValueError, match='the folder of the input'):
        inferencer()([worded().images[1], path], out_dir=str(tmp_path))
    assert np.array_equal(cv2.imread(str(path)), image)
    assert len(list(tmp_path.rglob('*.*'))) == 1


def test_an_ending_that_cannot_be_written(worded, inferencer, tmp_path,
                                          monkeypatch):
    """As JPEG 2000 of most builds of OpenCV."""
    monkeypatch.setattr(cv2, 'imencode', lambda *args: (False, ()))
    with pytest.raises(OSError, match='cannot write .*vis/0.png'):
        inferencer()(worded().images[0], out_dir=str(tmp_path / 'out'))


@each_case('value, message', [(np.nan, 'NaN or infinite'), (0, 'all zero')])
def test_weights_that_are_no_numbers(worded, tmp_path, value, message):
    run = worded()
    saved = load(run.weights)
    saved['state_dict'][OWN][1] = value
    torch.save(saved, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match=message):
        TextSegInferencer(run.config, tmp_path / 'w.pth', device='cpu')


@pytest.fixture(scope='module')
def demo():
    return load_tool('../demo/image_demo.py')


def test_demo_on_images(worded, inferencer, demo, tmp_path, capsys):
    run, mine = worded(), inferencer()
    mine.set_classes(list(NEW), other='other')
    folder = osp.dirname(run.images[0])
    words = ('--classes', ', '.join(NEW), '--other', '--device', 'cpu',
             '--similarity', 'tree, other')
    for name, count in ((run.images[0], 1), (folder, 6)):
        out = tmp_path / str(count)
        call(demo, name, run.config, run.weights, *words, '--out', out)
        printed = capsys.readouterr().out
        assert f'{count} images' in printed and '6 labels: 5 new' in printed
        written = [cv2.imread(str(p), -1) for p in sorted(out.glob('pred/*'))]
        expected = [mine(path)['predictions'] for path in run.images[:count]]
        assert np.array_equal(written, expected)
        names = {path.name for path in (out / 'vis').iterdir()}
        assert {'0.png', '0.png_tree.png', '0.png_other.png'} <= names
        assert len(names) == 3 * count
    drawn = mine(run.images[0], return_vis=True)['visualization']
    shown = cv2.imread(str(tmp_path / '1/vis/0.png'))[..., ::-1]
    assert np.array_equal(shown, drawn)


def test_demo_on_a_video(worded, inferencer, demo, tmp_path, capsys):
    run = worded()
    video, out = str(tmp_path / 'in.avi'), str(tmp_path / 'out.avi')
    write_video(video, [cv2.imread(path) for path in run.images[:3]], 5)
    words = '--classes', 'road, tree', '--out', out, '--device', 'cpu'
    call(demo, video, run.config, run.weights, *words)
    assert '3 frames' in capsys.readouterr().out
    mine = inferencer()
    mine.set_classes(['road', 'tree'])
    captures = cv2.VideoCapture(video), cv2.VideoCapture(out)
    for _ in range(3):
        frame, shown = (capture.read()[1] for capture in captures)
        drawn = mine(frame, return_vis=True)['visualization'][..., ::-1]
        assert shown.shape == drawn.shape == (32, 64 + 180, 3)
        # But for what the codec loses.
        assert np.abs(shown.astype(int) - drawn).mean() < 12
    assert captures[1].get(cv2.CAP_PROP_FPS) == 5
    assert not captures[1].read()[0]


@each_case('words, message', [
    ('a.png --webcam --out x', 'one of them'),
    ('a.png', 'give --out'),
    ('a.avi --out x.gif', 'a video is written as'),
    ('a.png --out x --opacity 2', r'must be in \[0, 1\]'),
    ('none.avi --out x.avi', 'no video none.avi'),
    ('none.png --out x --classes road,road', 'occurs twice'),
    ('none.png --out x', 'No such file'),
    ('. --out x', 'no images in'),
    ('none.png --out x --threshold 0', 'between 0 and 1'),
    ('none.png --out x --text-model toyclip', 'belongs to --classes'),
    ('none.png --out x --new-bias 1', 'belongs to --classes'),
    ('none.png --out x --classes road --new-bias nan', 'must be finite'),
])
def test_demo_refuses(worded, demo, tmp_path, capsys, monkeypatch, words,
                      message):
    monkeypatch.chdir(tmp_path)
    path, *words = words.split()
    said = fails(demo, capsys, path, worded().config, worded().weights, *words)
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_demo_never_writes_over_its_input(worded, demo, tmp_path, capsys):
    run = worded()
    (tmp_path / 'vis').mkdir()
    image, video = tmp_path / 'vis/a.png', tmp_path / 'a.avi'
    image.write_bytes(b'image')
    video.write_bytes(b'video')
    link = tmp_path / 'link.avi'
    link.symlink_to(video)
    for source, out in ((image, tmp_path), (tmp_path / 'vis', tmp_path),
                        (video, video), (video, link)):
        said = fails(demo, capsys, source, run.config, run.weights, '--out',
                     out)
        assert 'would write over the input' in said
    assert image.read_bytes() == b'image' and video.read_bytes() == b'video'


def test_answers_of_the_page(worded, inferencer):
    app, mine = load_tool('../demo/gradio_app.py'), inferencer()
    picture = cv2.imread(worded().images[1])
    words = ' <car>,<grass>,<道路>'
    found = app.segment(mine, picture[..., ::-1], words, True)
    assert mine.classes == ('<car>', '<grass>', '<道路>', 'other')
    expected = mine(picture, return_vis=True, opacity=.3, legend=False)
    assert np.array_equal(app.draw(found, .3), expected['visualization'])
    entries = re.findall(
        r'rgb\((\d+),(\d+),(\d+)\)"></span>(\S+) <[^>]*>(below 0.1|[\d.]+) %',
        app.legend(found))
    names = ['&lt;car&gt;', '&lt;grass&gt;', '&lt;道路&gt;', 'other']
    palette, shares = mine.model.dataset_meta['palette'], []
    for *color, name, share in entries:
        number = names.index(name)
        assert palette[number] == list(map(int, color))
        shares.append(100 * (expected['predictions'] == number).mean())
        if share != 'below 0.1':
            assert abs(shares[-1] - float(share)) < .06
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100) and len(shares) >= 3
    app.segment(mine, picture, '', False)
    assert mine.classes == CLASSES
    assert app.draw(None, .5) is None
    for picture, words, message in ((None, 'road', 'Upload an image'),
                                    (picture, 'road,, sky', 'Class 2 has no'),
                                    (picture, ' , ', 'Class 1 has no')):
        with pytest.raises(ValueError, match=message):
            app.segment(mine, picture, words, False)
    assert mine.classes == CLASSES
