# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""EBSeg whole: training, checkpoints, other classes, MMSegmentation's APIs."""
import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from network_tester import samples
from processes import load
from tiny import CLASSES, SIZE, assert_equal, run, tiny_config

from mmseg_textkd.deploy.stock_cfg import to_stock_cfg
from mmseg_textkd.models.ebseg.attention_layers import (DeformableAttention,
                                                        sine_position)
from mmseg_textkd.models.ebseg.mask_decoder import MaskDecoder
from mmseg_textkd.models.ebseg.mask_embedder import pool_by_masks
from mmseg_textkd.text import TextEmbeddings

pytestmark = pytest.mark.stacks


def towers(model):
    return {'clip': model.image_encoder, 'sam': model.backbone}


@pytest.fixture(scope='module')
def trained(tmp_path_factory, model_cfg):
    """A run of 20 iterations and its config."""
    cfg = tiny_config(tmp_path_factory.mktemp('ebseg'), max_iters=20)
    cfg.model = model_cfg()
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
        clip_grad=dict(max_norm=1., norm_type=2))
    cfg.custom_hooks = [
        dict(type='PromptLearnerHook'),
        dict(type='EMAHook', momentum=0.5)
    ]
    cfg.default_hooks.checkpoint.interval = 10
    return cfg, run(cfg)


@pytest.fixture(scope='module')
def model(model_cfg):
    """A model that was not trained, in evaluation mode."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(model_cfg()).eval()


def logged(runner, name='loss'):
    history = runner.message_hub.get_scalar(f'train/{name}')
    return list(history.data[0])


def test_it_learns(trained):
    _, runner = trained
    assert len(logged(runner)) == 20
    # Colors say the classes: masks and both classifiers learn it.
    # More than the worst of seeds 0 to 3 upstream, and of seed 0 on OneDL.
    for name, factor in (('loss', .75), ('decode.loss_mask',
                                         .7), ('decode.loss_cls', .65),
                         ('decode.loss_cls_attention', .92)):
        values = logged(runner, name)
        assert sum(values[-3:]) < factor * sum(values[:3]), name
    # By embedding A alone; one class everywhere would have 1/8 of 12.5 %.
    runner.model.decode_head.balance = dict(alpha=0., beta=0., gamma=0.)
    miou = runner.val_loop.run()['mIoU']
    assert miou > 8


def test_the_towers_are_untouched(trained, model):
    cfg, runner = trained
    for name, tower in towers(runner.model).items():
        assert tower.checksum() == towers(model)[name].checksum()
        frozen = {id(p) for p in tower.network.parameters()}
        assert frozen and not any(p.requires_grad or p.grad is not None
                                  for p in tower.network.parameters())
        known = {
            id(p)
            for g in runner.optim_wrapper.param_groups
            for p in g['params']
        }
        assert not frozen & known
        assert not frozen & {id(p) for p in runner.model.parameters()}


def test_only_positional_embeddings_of_the_towers_are_trained(trained):
    cfg, runner = trained
    checkpoint = load(f'{cfg.work_dir}/iter_20.pth')
    state = checkpoint['state_dict']
    assert sorted(
        k for k in state if k.startswith(('image_encoder', 'backbone'))) == [
            'backbone.positional_embedding',
            'image_encoder.positional_embedding'
        ]
    known = {
        id(p)
        for g in runner.optim_wrapper.param_groups
        for p in g['params']
    }
    for tower in towers(runner.model).values():
        learned = tower.positional_embedding
        assert id(learned) in known
        start = getattr(tower.network, tower.position_name)
        assert learned.shape == start.shape
        assert not torch.equal(learned, start)
    half = load(f'{cfg.work_dir}/iter_10.pth')
    for name, _ in runner.model.named_parameters():
        assert not torch.equal(state[name], half['state_dict'][name]), name


def test_a_checkpoint_brings_everything_back(trained, model_cfg):
    cfg, runner = trained
    checkpoint = load(f'{cfg.work_dir}/iter_20.pth')
    fresh = MODELS.build(model_cfg())
    fresh.load_state_dict(checkpoint['state_dict'], strict=True)
    twin = MODELS.build(model_cfg())
    twin.load_state_dict(fresh.state_dict(), strict=True)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        found = [m.eval()(images) for m in (fresh, twin)]
    assert torch.equal(*found)


def test_a_resumed_run_goes_on_as_the_whole_one(trained, tmp_path):
    cfg, runner = trained
    resumed = cfg.copy()
    resumed.work_dir = str(tmp_path)
    resumed.load_from = f'{cfg.work_dir}/iter_10.pth'
    resumed.resume = True
    again = run(resumed)
    assert_equal(
        dict(again.model.state_dict()), dict(runner.model.state_dict()))


def test_scores_are_the_balanced_sum_over_masks(model, toy_text):
    images = torch.randn(1, 3, *SIZE)
    head = model.decode_head
    with torch.no_grad():
        scores = model(images)
        features = model.extract_feat(images)
        found = head.embed_masks(features)
    scale, text = features.clip.logit_scale, toy_text.vectors
    nothing = F.normalize(head.no_object, dim=0)
    expected = torch.zeros_like(scores)
    for q in range(found.masks.shape[1]):
        a, b, d = (
            scale * text @ e[0, q]
            for e in (found.supervised, found.attention, found.frozen))
        none = scale * nothing @ found.supervised[0, q]
        thing = a.exp().sum() / (a.exp().sum() + none.exp())
        p = a.softmax(0)**.21 * d.softmax(0)**.09 * b.softmax(0)**.7 + 1e-8
        p = thing * p / p.sum()
        mask = F.interpolate(
            found.masks[:, q:q + 1], SIZE, mode='bilinear')[0, 0].sigmoid()
        expected[0] += p[:, None, None] * mask
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_mask_logits_are_resized_once_to_the_size_of_the_file(model):
    images, data = torch.randn(1, 3, *SIZE), samples(SIZE, 8, 1)
    data[0].set_metainfo(dict(ori_shape=(45, 77), img_shape=SIZE))
    found = model.decode_head.embed_masks(model.extract_feat(images))
    scale = model.image_encoder.network.clip_scale
    masks = F.interpolate(found.masks, SIZE, mode='bilinear')
    masks = F.interpolate(masks, (45, 77), mode='bilinear').sigmoid()
    expected = torch.einsum('nqk,nqhw->nkhw',
                            model.decode_head.balanced(found, scale), masks)
    result, = model.predict(images, data)
    torch.testing.assert_close(result.seg_logits.data, expected[0])


def test_odd_sizes_are_padded_as_the_towers_see_it(model):
    images = torch.randn(1, 3, 50, 70)
    preprocessor = model.data_preprocessor
    pixels = images * preprocessor.std + preprocessor.mean
    inputs = []
    for tower in (model.backbone, model.image_encoder):
        padded = tower.mean.expand(1, 3, 64, 96).clone()
        padded[..., :50, :70] = pixels
        assert not tower.normalize(padded)[..., 50:, :].any()
        inputs.append(tower(padded))
    features = model.neck(*inputs, (50, 70))
    found = model.decode_head.embed_masks(features)
    assert found.masks.shape[2:] == (32, 48)
    masks = F.interpolate(found.masks, (64, 96), mode='bilinear')
    expected = torch.einsum(
        'nqk,nqhw->nkhw',
        model.decode_head.balanced(found, features.clip.logit_scale),
        masks[..., :50, :70].sigmoid())
    torch.testing.assert_close(model(images), expected)
    # Pixels' embeddings are those of the image alone, at half its size here.
    assert model.pixel_embeddings(images).shape[2:] == (25, 35)
    # In training what was padded is ignored.
    losses = model.loss(images, samples((50, 70), 8, 1))
    assert all(value.isfinite() for value in losses.values())


def test_embeddings_have_the_lengths_that_they_should(model):
    head = model.decode_head
    features = model.extract_feat(torch.randn(1, 3, *SIZE))
    decoded = head.decoder(features.levels, features.pixels)[-1]
    masks = decoded.masks.clone()
    masks[:, 0] = -1
    with torch.no_grad():
        head.embedder.length.fill_(30.)
        found = head.embedder(
            decoded._replace(masks=masks), features.pixels, features.clip,
            SIZE, SIZE)
        head.embedder.length.fill_(1.)
    # The learned length is at most 10.
    for name, length in (('supervised', 10.), ('attention', 1.)):
        norms = getattr(found, name).norm(dim=2)
        torch.testing.assert_close(norms, torch.full_like(norms, length))
    # A mean of vectors of unit length; over nothing it is 0.
    norms = found.frozen.norm(dim=2)
    assert norms[0, 0] == 0 and norms.max() <= 1 + 1e-5


def test_classes_may_change_and_come_back(model, model_cfg):
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        before = model(images)
        model.set_classes(['zebra', 'sky', 'truck, truck'])
        _, seen = model.decode_head.text.vocabulary()
        assert seen.tolist() == [False, True, True]
        other = model(images)
        assert other.shape == (1, 3, *before.shape[2:])
        assert model.out_channels == 3
        saved = model.state_dict()
        # Order of the classes does not matter.
        model.set_classes(['truck, truck', 'zebra', 'sky'])
        torch.testing.assert_close(model(images), other[:, [2, 0, 1]])
        model.set_classes(None)
        assert torch.equal(model(images), before)
    # The other classes are no part of a checkpoint.
    twin = MODELS.build(model_cfg()).eval()
    twin.load_state_dict(saved, strict=True)
    with torch.no_grad():
        assert torch.equal(twin(images), before)


def test_the_balance_knows_which_classes_are_new(model):
    """The same words, said to be new or seen, are balanced otherwise."""
    images = torch.randn(1, 3, *SIZE)
    vectors = model.decode_head.text()
    scores = {}
    for names in (CLASSES, [f'unheard of {i}' for i in range(8)]):
        model.set_classes(
            TextEmbeddings(vectors=vectors.clone(), names=tuple(names)))
        with torch.no_grad():
            scores[names[0]] = model(images)
    model.set_classes(None)
    with torch.no_grad():
        torch.testing.assert_close(scores['sky'], model(images))
    assert not torch.allclose(scores['unheard of 0'], scores['sky'])


@each_case('number', [1, 2, 1000])
def test_any_number_of_classes(model, number):
    vectors = F.normalize(torch.randn(number, 64), dim=1)
    model.set_classes(
        TextEmbeddings(
            vectors=vectors, names=tuple(f'n{i}' for i in range(number))))
    data = samples(SIZE, 8)
    with torch.no_grad():
        results = model.predict(torch.randn(2, 3, *SIZE), data)
    logits = results[0].seg_logits.data
    assert logits.shape == (number, *SIZE) and logits.isfinite().all()
    labels = results[0].pred_sem_seg.data
    if number == 1:
        # MMSegmentation: sigmoid of the logit against the threshold.
        assert torch.equal(labels[0] == 1, logits[0] > .5)
    else:
        assert torch.equal(labels[0], logits.argmax(dim=0))
    model.set_classes(None)


@each_case('number', [1, 300])
def test_training_with_few_and_many_classes(model_cfg, make_embeddings,
                                            number):
    text = dict(type='ClassEmbeddings', file=make_embeddings(number, 64))
    net = MODELS.build(model_cfg(num_classes=number, text=text))
    losses = net.loss(torch.randn(2, 3, *SIZE), samples(SIZE, number))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_batches_without_any_label(model_cfg):
    net = MODELS.build(model_cfg())
    data = samples(SIZE, 8)
    for sample in data:
        sample.gt_sem_seg.data.fill_(255)
    losses = net.loss(torch.randn(2, 3, *SIZE), data)
    assert losses['decode.loss_ssc'] == losses['decode.loss_mask'] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in net.parameters())


def test_sliding_windows_and_odd_sizes(model):
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        whole = model.predict(images)[0].seg_logits.data
        model.test_cfg = Config(
            dict(mode='slide', crop_size=SIZE, stride=(16, 32)))
        slid = model.predict(images)[0].seg_logits.data
        model.test_cfg = Config(dict(mode='whole'))
    assert whole.shape == slid.shape == (8, 50, 70)
    assert not torch.equal(whole, slid)


def test_images_reach_the_towers_as_pixels(model):
    """Normalized by the preprocessor, and back; RGB in [0, 255]."""
    taken = []
    handles = [
        t.register_forward_pre_hook(lambda m, args: taken.append(args[0]))
        for t in towers(model).values()
    ]
    bgr = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    data = model.data_preprocessor(
        dict(inputs=[bgr], data_samples=samples(SIZE, 8, 1)), False)
    with torch.no_grad():
        model(data['inputs'])
    for handle in handles:
        handle.remove()
    assert len(taken) == 2
    for pixels in taken:
        torch.testing.assert_close(
            pixels[0], bgr.flip(0).float(), atol=1e-3, rtol=0)


def test_it_can_teach(model):
    images = torch.randn(2, 3, *SIZE)
    cosines = model.pixel_text_similarity(images)
    assert cosines.shape[:2] == (2, 8) and not cosines.requires_grad
    pixels = model.pixel_embeddings(images)
    torch.testing.assert_close(
        pixels.norm(dim=1), torch.ones_like(pixels[:, 0]))
    with torch.no_grad():
        found = model.decode_head.embed_masks(model.extract_feat(images))
    # A pixel that is in one mask alone has that mask's embedding.
    weights = found.masks[1, :, 3, 5].sigmoid()
    expected = F.normalize(weights @ found.attention[1], dim=0)
    torch.testing.assert_close(pixels[1, :, 3, 5], expected)
    torch.testing.assert_close(cosines[1, :, 3, 5],
                               model.decode_head.text() @ expected)


def test_its_cost_can_be_counted(model):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cost = get_model_complexity_info(
            model, (3, *SIZE), show_table=False, show_arch=False)
    assert cost['params'] == sum(p.numel() for p in model.parameters())
    # The frozen towers' convolutions are in: 32 channels of 8x8 patches, and
    # 64, on 32 patches each.
    assert cost['flops'] > 32 * 3 * 64 * (32 + 64)


def test_mixed_precision(model_cfg):
    net = MODELS.build(model_cfg())
    images, data = torch.randn(2, 3, *SIZE), samples(SIZE, 8)
    plain = net.loss(images, data)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = net.loss(images, data)
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.isfinite()
        assert value.item() == pytest.approx(plain[name].item(), rel=.2), name


def test_there_is_no_stock_form(model_cfg):
    cfg = Config(dict(model=model_cfg(), custom_imports=dict(imports=[])))
    with pytest.raises(ValueError, match="'EBSeg' is defined in"):
        to_stock_cfg(cfg)


def test_what_does_not_fit_is_refused(model, model_cfg, make_embeddings):
    wide = dict(type='ControlEmbeddings', kind='random', dim=32)
    with pytest.raises(ValueError, match='width 32, but the image tower 64'):
        MODELS.build(model_cfg(text=wide))
    with pytest.raises(ValueError, match='width 16'):
        model.set_classes(TextEmbeddings.load(make_embeddings(3, 16)))
    with pytest.raises(ValueError, match='width 32'):
        MODELS.build(model_cfg(test_text=dict(wide, num_classes=3)))
    with pytest.raises(TypeError, match='text provider'):
        MODELS.build(model_cfg(test_text=dict(type='MaskDecoder')))
    with pytest.raises(ValueError, match='exponents'):
        MODELS.build(model_cfg(balance=dict(alpha=.5, beta=.5, gamma=.7)))
    with pytest.raises(ValueError, match='occurs twice'):
        model.set_classes(['cat', 'cat'])
    with pytest.raises(ValueError, match='names no class'):
        model.set_classes([])
    assert model.out_channels == 8


def test_nameless_text_cannot_be_balanced_for_new_classes(model_cfg, toy_text):
    text = dict(type='ControlEmbeddings', kind='random', dim=64)
    net = MODELS.build(model_cfg(text=text)).eval()
    net.set_classes(toy_text)
    with pytest.raises(ValueError, match='train_classes'):
        net(torch.randn(1, 3, *SIZE))
    known = MODELS.build(
        model_cfg(text=text, train_classes=['sky', 'road'] + list('abcdef')))
    known.set_classes(toy_text)
    _, seen = known.decode_head.text.vocabulary()
    assert [n for n, s in zip(CLASSES, seen) if s] == ['sky', 'road']


def test_queries_look_inside_their_masks_only():
    decoder = MaskDecoder(8, 3, 2, 2, 16).eval()
    level, masks = torch.randn(1, 8, 4, 4), torch.full((1, 3, 8, 8), -9.)
    masks[:, 0, :, :4] = 9.
    masks[:, 1] = 9.
    outside = decoder._outside(masks, level)
    assert outside.shape == (2, 3, 16)
    grid = outside[0].view(3, 4, 4)
    assert grid[0, :, 2:].all() and not grid[0, :, :2].any()
    assert not grid[1].any()
    # An empty mask would leave nothing to attend to.
    assert not grid[2].any() and torch.equal(outside[0], outside[1])


def test_pooling_is_the_mean_over_the_mask():
    features = torch.randn(2, 5, 3, 4)
    masks = torch.randn(2, 6, 3, 4, requires_grad=True)
    pooled = pool_by_masks(features, masks)
    assert not pooled.requires_grad
    for n in range(2):
        for q in range(6):
            inside = features[n][:, masks[n, q] > 0]
            torch.testing.assert_close(pooled[n, q], inside.mean(dim=1))
    assert not pool_by_masks(features, masks - 1e4).any()


@torch.no_grad()
def test_attention_bias_is_a_mask_of_its_own_features_for_each_head(model):
    embedder = model.decode_head.embedder
    pixels, kernels = torch.randn(2, 32, 3, 5), torch.randn(2, 6, 32)
    tokens = pixels.flatten(2).mT
    own = embedder.bias(tokens).view(2, 15, 4, 32)  # of four heads
    expected = torch.einsum('nqc,nphc->nhqp', kernels, own)
    expected = embedder.bias_scale(expected[..., None])[..., 0]
    found = embedder._attention_bias(kernels, embedder.bias[:-1](tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_deformable_attention_against_a_naive_loop():
    layer = DeformableAttention(8, 2, 2, 3)
    sizes = [(2, 3), (4, 5)]
    x, position = torch.randn(2, 26, 8), torch.randn(1, 26, 8)
    # At the start, heads 0 and 1 look 1, 2, 3 pixels to the right and left.
    start = layer.offsets.bias.view(2, 2, 3, 2)
    rays = torch.tensor([[1., 0], [2, 0], [3, 0]]).expand(2, 3, 2)
    torch.testing.assert_close(start, torch.stack([rays, -rays]))
    with torch.no_grad():
        for part in (layer.offsets, layer.weights):
            part.weight.normal_(std=.5)
        found = layer(x, position, sizes)
        query, value = x + position, layer.value(x)
        offsets = layer.offsets(query).view(2, 26, 2, 2, 3, 2)
        weights = layer.weights(query).view(2, 26, 2, 6).softmax(3)
        places = [(level, (r + .5) / h, (c + .5) / w)
                  for level, (h, w) in enumerate(sizes) for r in range(h)
                  for c in range(w)]
        expected = torch.zeros(2, 26, 8)
        for n, q, head, level, point in itertools.product(
                range(2), range(26), range(2), range(2), range(3)):
            (h, w), first = sizes[level], (0, 6)[level]
            dx, dy = offsets[n, q, head, level, point].tolist()
            # In pixels of that level, whose centers are at whole numbers.
            u, v = places[q][2] * w + dx - .5, places[q][1] * h + dy - .5
            part = slice(4 * head, 4 * head + 4)
            for r, c in itertools.product(*((math.floor(t), math.floor(t) + 1)
                                            for t in (v, u))):
                if 0 <= r < h and 0 <= c < w:
                    share = (1 - abs(u - c)) * (1 - abs(v - r))
                    expected[n, q, part] += (
                        weights[n, q, head, 3 * level + point] * share *
                        value[n, first + r * w + c, part])
        expected = layer.norm(x + layer.out(expected))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_positions_are_interleaved_sines_and_cosines():
    found = sine_position((3, 5), 8, torch.zeros(1)).view(3, 5, 8)
    for row, column in ((0, 0), (2, 3)):
        y, x = (2 * math.pi * (i + 1) / n for i, n in ((row, 3), (column, 5)))
        expected = [
            f(angle / 100**i) for angle in (y, x) for i in range(2)
            for f in (math.sin, math.cos)
        ]
        torch.testing.assert_close(found[row, column], torch.tensor(expected))


def test_a_copy_is_independent_but_for_the_towers(model):
    twin = copy.deepcopy(model)
    twin.set_classes(['moon'])
    assert model.out_channels == 8
    for own, other in zip(towers(model).values(), towers(twin).values()):
        assert own.network is other.network


@pytest.mark.parametrize('rgb', [True, False])
def test_images_that_stay_bgr_are_told(model_cfg, monkeypatch, rgb):
    lines = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handle',
                        lambda record: lines.append(record.getMessage()))
    cfg = model_cfg()
    cfg.data_preprocessor.bgr_to_rgb = rgb
    MODELS.build(cfg)
    assert any('`bgr_to_rgb`' in line for line in lines) == (not rgb)
