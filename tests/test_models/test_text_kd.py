# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The score map in the network, as its authors built it."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from graphs import run_graph
from heads import SIX
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import HOOKS, MODELS
from mmseg.structures import SegDataSample
from network_tester import CONFIGS

from mmseg_textkd.deploy import fold, to_stock_cfg
from mmseg_textkd.deploy.export import to_onnx
from mmseg_textkd.deploy.exportable import ExportableSegmentor

K, C = 3, 32
BN = dict(type='BN')
DECODER = dict(convs=['decode_head.convs.0.conv'])
LINEAR = dict(norm='rms', projection=True, width=16)


def control(width):
    return dict(type='ControlEmbeddings', kind='random', dim=width)


def stdc(width=C, **score_map):
    """Config of a narrow STDC1 with a score map."""
    stdc1 = dict(
        type='STDCNet',
        stdc_type='STDCNet1',
        in_channels=3,
        channels=(4, 4, 8, 16, C),
        bottleneck_type='cat',
        norm_cfg=BN,
        act_cfg=dict(type='ReLU'))
    backbone = dict(
        type='STDCContextPathNet',
        backbone_cfg=stdc1,
        last_in_channels=(C, 16),
        out_channels=8,
        ffm_cfg=dict(in_channels=16, out_channels=8, scale_factor=4))
    sampler = dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)
    head = dict(SIX, type='FCNHead', num_classes=K, in_index=3)
    return dict(
        type='TextKD',
        score_map=dict(dict(in_channels=C, text=control(width)), **score_map),
        backbone=backbone,
        decode_head=dict(head, align_corners=True, sampler=sampler),
        test_cfg=dict(mode='whole'))


def noise(shape, phase):
    """Numbers in [-1, 1] that are the same with every version."""
    x = torch.arange(math.prod(shape), dtype=torch.float64)
    x = torch.sin(x * 12.9898 + phase * 78.233) * 437.585453
    return (2 * (x - x.floor()) - 1).view(shape)


def test_alignment_at_the_largest_scale_that_reads():
    """Whatever the order in which convolutions run."""
    cfg = stdc()
    cfg.update(
        backbone=dict(
            type='MixVisionTransformer',
            embed_dims=4,
            num_layers=[1] * 4,
            num_heads=[1] * 4,
            sr_ratios=[4, 2, 1, 1],
            mlp_ratio=1),
        decode_head=dict(
            type='SegformerHead',
            in_channels=[4] * 4,
            in_index=[0, 1, 2, 3],
            channels=8,
            num_classes=K,
            norm_cfg=BN,
            align_corners=False,
            dropout_ratio=0.,
            loss_decode=dict(type='CrossEntropyLoss')),
        auxiliary_head=None)
    image, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 1, 64, 64).long()
    seen = []
    for convs in ['decode_head.convs.0.conv'], ['decode_head.convs.*.conv']:
        cfg['score_map'] = dict(in_channels=4, text=control(4), convs=convs)
        torch.manual_seed(0)
        model = MODELS.build(cfg)
        losses = losses_of(model, image, labels)
        seen.append(losses['align.loss_ce'].item())
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def losses_of(model, image, labels):
    samples = [SegDataSample(gt_sem_seg=PixelData(data=d)) for d in labels]
    return model(image, samples, mode='loss')


def randomized(**options):
    """A network whose weights on the scores have other values than 0."""
    model = MODELS.build(stdc(**options))
    for conv in model.score_map.convs.values():
        torch.nn.init.normal_(conv.weight, std=0.5)
    return model


# What the authors' modules (github.com/ChiaYi-LIN/mmsegmentation, d89be68)
# gave for the weights and the input below, in float64: scores of the first
# pixel, logits of the first two, both losses with OHEM, and the sum of
# |gradient| of four convolutions, two of which read the scores.
GOLDEN = {
    'EN': (dict(), [
        0.4052283805466724, -0.29660562098888504, 0.4007678887735204,
        0.09583951544343611, 0.5523750649888168, 0.5344222066151031
    ], 1.070996262989304, 1.9388899553523082, [
        0.8607523144438919, 2.3572126912849667, 2.2300049924305387,
        0.0674883383744428
    ]),
    'DE': (DECODER, [
        0.12627755960216872, -0.02010414841316069, 0.11777048217982551,
        -0.06708280711230968, 0.2392930010386597, 0.10743736506022308
    ], 1.0645979085568706, 1.987633807992701, [
        1.542995636818359, 9.660866555072337, 3.254749188808482,
        0.04871893411580199
    ])
}
SCORES = [-0.0778273618136172, 0.08025290830101675, -0.17591074855038327]
READERS = ('backbone.conv_avg.conv', 'backbone.arms.0.conv_layer.conv',
           'decode_head.convs.0.conv', 'backbone.backbone.stages.0.conv')


def numbered(model):
    """Weights of the authors' checkpoint, as those of ours.

    Theirs has wider convolutions, and the text beside the trunk.
    """
    own = {n.replace('/', '.') + '.weight': n for n in model.score_map.convs}
    theirs = {
        name: value.shape
        for name, value in model.state_dict().items()
        if not name.startswith('score_map')
    }
    for name in own:
        out, wide, *kernel = theirs[name]
        theirs[name] = (out, wide + K, *kernel)
    theirs['backbone.text_embeddings'] = (K, C)
    text = F.normalize(noise((K, C), 1), dim=1)
    state = {'score_map.text.class_embeddings': text}
    for i, (name, shape) in enumerate(sorted(theirs.items())):
        one = name.endswith(('running_var', 'bn.weight'))
        value = noise(shape, i) * 0.4 + float(one)
        if name.endswith('num_batches_tracked'):
            state[name] = torch.tensor(0)
        elif name in own:
            state[name], extra = value[:, :-K], value[:, -K:]
            state[f'score_map.convs.{own[name]}.weight'] = extra
        elif name != 'backbone.text_embeddings':
            state[name] = value
    return state


@each_case('kind', GOLDEN)
def test_the_authors_network(kind):
    options, logits, loss, alignment, gradients = GOLDEN[kind]
    model = MODELS.build(stdc(**options)).double().eval()
    model.load_state_dict(numbered(model), strict=True)
    image = noise((2, 3, 64, 96), 2)
    labels = (torch.arange(2 * 64 * 96).view(2, 1, 64, 96) // 7) % K
    labels[:, :, :5] = 255

    taken = []
    model.score_map.register_forward_hook(
        lambda module, args, output: taken.append(output))
    out = model(image, mode='tensor')
    for found, expected in ((taken[0][0, :, 0, 0], SCORES),
                            (out[0, :, 0, :2].flatten(), logits)):
        assert found.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    losses = losses_of(model, image, labels)
    assert losses['decode.loss_ce'].item() == pytest.approx(loss, rel=1e-8)
    assert losses['align.loss_ce'].item() == pytest.approx(alignment, rel=1e-8)
    (losses['decode.loss_ce'] + losses['align.loss_ce']).backward()
    convs = model.score_map.convs
    for name, expected in zip(READERS, gradients):
        parts = [model.get_submodule(name)]
        if name.replace('.', '/') in convs:
            parts.append(convs[name.replace('.', '/')])
        found = sum(part.weight.grad.abs().sum().item() for part in parts)
        assert found == pytest.approx(expected, rel=1e-7)


@each_case('network, channels', [
    ('stdc1_in1k-pre', 1024),
    ('bisenetv1_r18-d32-in1k-pre', 512),
    ('bisenetv2_fcn', 128),
    ('ddrnet_23-slim_in1k-pre', 512),
    ('pidnet-s', 512),
    ('fast_scnn', 128),
    ('icnet_r18-d8-in1k-pre', 512),
    ('segformer_mit-b0', 256),
])
def test_step_0_is_the_stock_network(network, channels):
    """Predictions and names are stock's, until the scores get weights."""
    cfg = Config.fromfile(CONFIGS / 'stock' /
                          f'{network}_1xb8-10k_camvid-360x480.py').model
    for part in (cfg.backbone, cfg.backbone.get('backbone_cfg') or {}):
        part.pop('init_cfg', None)
    torch.manual_seed(0)
    stock = MODELS.build(copy.deepcopy(cfg)).eval()
    torch.manual_seed(0)
    score_map = dict(
        in_channels=channels, projection=channels != 512, text=control(512))
    model = MODELS.build(dict(cfg, type='TextKD', score_map=score_map)).eval()
    state = model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(state.pop(name), value), name
    assert all(name.startswith('score_map.') for name in state)
    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        expected = stock(image, mode='tensor')
        assert torch.equal(model(image, mode='tensor'), expected)
        for conv in model.score_map.convs.values():
            conv.weight.normal_(std=.5)
        assert not torch.allclose(model(image, mode='tensor'), expected)
    assert model._scores is model._largest is None


def test_a_linear_score_map_folds_into_stock():
    model, image = randomized(**LINEAR), torch.randn(2, 3, 64, 96)
    for _ in range(3):
        model(image, mode='tensor')
    # The root mean square of the lengths, and its running average.
    assert model.score_map.length.item() != 1
    stock = fold(model.eval(), Config(dict(model=stdc(**LINEAR))))
    assert type(stock) is EncoderDecoder
    found, expected = (m(image, mode='tensor') for m in (stock, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='evaluation'):
        model.train().fold()
    for options, match in (
        (dict(), 'does not fold into a convolution'),
        (dict(norm='rms', **DECODER), 'decode_head.convs.0.conv'),
    ):
        with pytest.raises(ValueError, match=match):
            MODELS.build(stdc(**options)).eval().fold()
    with pytest.raises(ValueError, match='model: a score map'):
        to_stock_cfg(Config(dict(model=stdc())))


@each_case('text_loss', [dict(type='TextToTextContrastiveLoss'), None])
def test_losses_of_text_are_not_in_the_stock_config(text_loss):
    text = dict(type='ResidualPromptLearner', embeddings=control(16))
    cfg = dict(stdc(**dict(LINEAR, text=text)), text_loss=text_loss)
    stock = fold(MODELS.build(cfg).eval(), Config(dict(model=cfg)))
    assert type(stock) is EncoderDecoder


def test_the_length_rests_where_all_but_the_prompts_does():
    """As batch norms do, unless they are to move on or the network learns."""
    moved = {}
    for name, options in dict(
            default={},
            moving=dict(freeze_norm=False),
            network=dict(learn=[r'\.text\.', 'decode_head'])).items():
        prompts = dict(type='ResidualPromptLearner', embeddings=control(16))
        model = MODELS.build(stdc(**LINEAR, text=prompts))
        hook = HOOKS.build(
            dict(type='PromptLearnerHook', switch_at=1, **options))
        wrapper = build_optim_wrapper(
            model,
            dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=.1, weight_decay=.1),
                paramwise_cfg=dict(custom_keys={'.text.': dict(
                    decay_mult=0.)})))
        runner = SimpleNamespace(
            cfg={},
            model=model,
            optim_wrapper=wrapper,
            hooks=[],
            iter=0,
            max_iters=9,
            train_dataloader=(),
            train_loop=None,
            val_loop=None,
            message_hub=MessageHub.get_current_instance(),
            _resume=False)
        hook.before_train(runner)
        lengths = []
        for runner.iter in range(3):
            model.train()
            hook.before_train_iter(runner, 0)
            model.score_map(noise((2, C, 2, 4), runner.iter))
            hook.after_train_iter(runner, 0)
            lengths.append(model.score_map.length.item())
        assert lengths[0] != 1.
        moved[name] = lengths[1] != lengths[0]
    assert moved == dict(default=False, moving=True, network=True)


def test_a_graph_without_the_plugin():
    model = randomized()
    model.data_preprocessor = MODELS.build(dict(type='SegDataPreProcessor'))
    network = ExportableSegmentor(model.eval())
    image = network.example((64, 96))
    with torch.no_grad():
        expected = network.reference(image)
    logits = run_graph(
        to_onnx(network, (64, 96), dynamic=False, meta=''), image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_has_its_own_score_map():
    """As EMAHook makes one."""
    model, image = randomized().eval(), torch.randn(1, 3, 64, 64)
    before = model(image, mode='tensor')
    twin = copy.deepcopy(model)
    assert torch.equal(twin(image, mode='tensor'), before)
    for conv in twin.score_map.convs.values():
        torch.nn.init.zeros_(conv.weight)
    assert torch.equal(model(image, mode='tensor'), before)
    assert not torch.equal(twin(image, mode='tensor'), before)


def test_init_as_published():
    convs = MODELS.build(stdc(init='kaiming')).score_map.convs
    weight = convs['backbone/arms/0/conv_layer/conv'].weight
    # He et al., fan out: 8 channels x 3 x 3.
    assert weight.std().item() == pytest.approx((2 / 72)**0.5, rel=0.2)


def test_step_0_outlives_an_init_of_all_layers():
    everything = dict(type='Kaiming', layer='Conv2d')
    model = MODELS.build(dict(stdc(), init_cfg=everything))
    model.init_weights()
    assert not any(c.weight.any() for c in model.score_map.convs.values())


@each_case('scope', ['', 'mmseg.'])
def test_the_loss_of_the_head_is_that_of_the_scores(scope):
    cfg = stdc()
    cfg['decode_head'].update(
        sampler=None,
        loss_decode=dict(
            type=f'{scope}OhemCrossEntropy',
            thres=.9,
            min_kept=100,
            loss_weight=.4,
            class_weight=[1.] * K))
    loss = MODELS.build(cfg).alignment_head.loss_decode
    assert type(loss).__name__ == 'OhemCrossEntropy'
    assert (loss.thresh, loss.loss_weight) == (.9, 1.)


def test_all_weights_in_half_precision():
    model = MODELS.build(stdc(16, projection=True)).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = model(image, mode='tensor')
    found = model.bfloat16()(image.bfloat16(), mode='tensor')
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < .05 * expected.abs().max()


@each_case('options, words', [
    (dict(width=16), 'width 16, but the feature has 32 channels'),
    (dict(in_channels=16, width=16), 'has 32 channels, but in_channels=16'),
    (dict(feature='backbone.trunk'), "has no 'trunk'; it has"),
    (dict(convs=['backbone.spp.*']), 'no convolution of the network'),
    (dict(norm='l1'), "must be one of .*'l2'"),
    (dict(init='one'), "must be one of .*'zero'"),
    (dict(feature='decode_head'), 'before it has been computed'),
    (dict(text=dict(type=torch.nn.Identity)), 'config of a text provider'),
])
def test_what_does_not_fit_is_refused(options, words):
    error = TypeError if 'text' in options else (ValueError, RuntimeError)
    with pytest.raises(error, match=words):
        model = MODELS.build(stdc(**options))
        model(torch.randn(1, 3, 64, 64), mode='tensor')


@each_case('changes, words', [
    (dict(backbone=dict(type='ERFNet')), 'has no sites for ERFNet'),
    (dict(alignment_head=dict(temperature=0.)), 'temperature'),
    (dict(num_classes=1), 'the text of both classes'),
])
def test_what_the_network_must_have(changes, words):
    cfg = dict(stdc(), **changes)
    number = cfg.pop('num_classes', K)
    cfg['decode_head'].update(in_channels=16, in_index=0, num_classes=number)
    with pytest.raises(ValueError, match=words):
        MODELS.build(cfg)


def poly_with_warmup(base, step, total, warmup, eta_min=1e-6):
    """MMCV 1.x: a linear warm-up in front of what the policy gives."""
    rate = (base - eta_min) * (1 - step / total)**0.9 + eta_min
    if step < warmup:
        rate *= 1 - (1 - step / warmup) * (1 - 1e-5)
    return rate


def test_the_published_schedule():
    """The learning rates of the authors' runs, of trunk and all else."""
    path = 'textkd_stdc1_in1k-pre_rn50-score-map_1xb16-10k_camvid-720x960.py'
    cfg = Config.fromfile(CONFIGS / 'textkd' / path)
    wrapper = build_optim_wrapper(MODELS.build(stdc()), cfg.optim_wrapper)
    # One group for each rate, and not one for each parameter.
    groups = {g['lr']: g for g in wrapper.param_groups}
    bases = sorted(groups)
    assert bases == pytest.approx([0.01, 0.1])
    wrapper.optimizer.param_groups[:] = [groups[base] for base in bases]
    assert max(s.end for s in cfg.param_scheduler) == 10000
    # A tenth of the steps says the same; MMEngine's rate is lowest in the last
    # step, not after it.
    schedulers = [
        PARAM_SCHEDULERS.build(
            dict(cfg, end=min(cfg.end, 1001)),
            default_args=dict(optimizer=wrapper))
        for cfg in cfg.param_scheduler
    ]
    for step in range(1000):
        if step in (0, 1, 50, 199, 200, 201, 500, 900):
            rates = sorted({g['lr'] for g in wrapper.param_groups})
            expected = [poly_with_warmup(b, step, 1000, 200) for b in bases]
            assert rates == pytest.approx(expected, rel=2e-3, abs=2e-6), step
        for scheduler in schedulers:
            scheduler.step()
