# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The score map in the network, as its authors built it."""
import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_textkd.deploy import fold, to_stock_cfg
from mmseg_textkd.deploy.export import to_onnx
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.models import TextAlignmentLoss

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
K, C = 3, 32
SAMPLER = dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)


def stdc(sampler=SAMPLER, width=C, **score_map):
    """Config of a narrow STDC1 with a score map."""
    norm_cfg = dict(type='BN')
    return dict(
        type='TextKD',
        score_map=dict(
            dict(
                in_channels=C,
                text=dict(type='ControlEmbeddings', kind='random', dim=width)),
            **score_map),
        backbone=dict(
            type='STDCContextPathNet',
            backbone_cfg=dict(
                type='STDCNet',
                stdc_type='STDCNet1',
                in_channels=3,
                channels=(4, 4, 8, 16, C),
                bottleneck_type='cat',
                norm_cfg=norm_cfg,
                act_cfg=dict(type='ReLU')),
            last_in_channels=(C, 16),
            out_channels=8,
            ffm_cfg=dict(in_channels=16, out_channels=8, scale_factor=4)),
        decode_head=dict(
            type='FCNHead',
            in_channels=8,
            channels=8,
            num_convs=1,
            num_classes=K,
            in_index=3,
            concat_input=False,
            dropout_ratio=0.,
            norm_cfg=norm_cfg,
            align_corners=True,
            sampler=sampler,
            loss_decode=dict(type='CrossEntropyLoss')),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'))


DECODER = dict(convs=['decode_head.convs.0.conv'])


def noise(shape, phase):
    """Numbers in [-1, 1] that are the same with every version."""
    x = torch.arange(math.prod(shape), dtype=torch.float64)
    x = torch.sin(x * 12.9898 + phase * 78.233) * 437.585453
    return (2 * (x - x.floor()) - 1).view(shape)


def labels_of(data):
    return [SegDataSample(gt_sem_seg=PixelData(data=d)) for d in data]


def randomize(model):
    """Give the weights on the scores other values than 0."""
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


@each_case('kind', GOLDEN)
def test_the_authors_network(kind):
    options, logits, loss, alignment, gradients = GOLDEN[kind]
    model = MODELS.build(stdc(**options)).double().eval()
    own = {n.replace('/', '.') for n in model.score_map.convs}
    # Their checkpoint: wider convolutions, and the text beside the trunk.
    theirs = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith('score_map')
    }
    for name in own:
        wide = f'{name}.weight'
        shape = list(theirs[wide].shape)
        shape[1] += K
        theirs[wide] = torch.empty(shape)
    theirs['backbone.text_embeddings'] = torch.empty(K, C)
    state = {}
    for i, (name, value) in enumerate(sorted(theirs.items())):
        if name.endswith('num_batches_tracked'):
            state[name] = value
            continue
        one = name.endswith(('running_var', 'bn.weight'))
        value = noise(value.shape, i) * 0.4 + float(one)
        base = name[:-len('.weight')]
        if name == 'backbone.text_embeddings':
            text = noise((K, C), 1)
            state['score_map.text.class_embeddings'] = F.normalize(text, dim=1)
        elif base in own:
            state[name], extra = value[:, :-K], value[:, -K:]
            state[f'score_map.convs.{base.replace(".", "/")}.weight'] = extra
        else:
            state[name] = value
    model.load_state_dict(state, strict=True)
    image = noise((2, 3, 64, 96), 2)
    labels = (torch.arange(2 * 64 * 96).view(2, 1, 64, 96) // 7) % K
    labels[:, :, :5] = 255

    taken = []
    handle = model.score_map.register_forward_hook(
        lambda module, args, output: taken.append(output))
    out = model(image, mode='tensor')
    handle.remove()
    close = dict(rtol=1e-7, atol=1e-9)
    tensor = torch.tensor
    torch.testing.assert_close(
        taken[0][0, :, 0, 0], tensor(SCORES).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[0, :, 0, :2].flatten(),
                               tensor(logits, dtype=torch.float64), **close)
    losses = model(image, labels_of(labels), mode='loss')
    assert losses['decode.loss_ce'].item() == pytest.approx(loss, rel=1e-8)
    assert losses['align.loss_ce'].item() == pytest.approx(alignment, rel=1e-8)
    (losses['decode.loss_ce'] + losses['align.loss_ce']).backward()
    convs = model.score_map.convs
    for name, expected in zip(READERS, gradients):
        found = model.get_submodule(name).weight.grad.abs().sum()
        if name in own:
            found = found + convs[name.replace('.',
                                               '/')].weight.grad.abs().sum()
        assert found.item() == pytest.approx(expected, rel=1e-7)


def test_reading_is_concatenation():
    """Against the stock class, built wider, on concatenated features."""
    torch.manual_seed(0)
    model = randomize(MODELS.build(stdc())).train()
    cfg = stdc()['backbone']
    cfg['last_in_channels'] = (C + K, 16)
    wide = MODELS.build(cfg).train()
    state = model.backbone.state_dict()
    for name, conv in model.score_map.convs.items():
        key = name.replace('/', '.')[len('backbone.'):] + '.weight'
        state[key] = torch.cat([state[key], conv.weight], dim=1)
    wide.load_state_dict(state, strict=True)
    text = model.score_map.text.class_embeddings

    def concatenate(module, args, output):
        scores = torch.einsum('nchw,kc->nkhw', F.normalize(output[-1]), text)
        return (*output[:-1], torch.cat([output[-1], scores], dim=1))

    wide.backbone.register_forward_hook(concatenate)
    image = torch.randn(2, 3, 64, 96)
    for ours, theirs in zip(model.extract_feat(image), wide(image)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
    model = MODELS.build(
        dict(
            cfg,
            type='TextKD',
            score_map=dict(
                in_channels=channels,
                projection=channels != 512,
                text=dict(type='ControlEmbeddings', kind='random',
                          dim=512)))).eval()
    state = model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(state.pop(name), value), name
    assert all(name.startswith('score_map.') for name in state)
    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        expected = stock(image, mode='tensor')
        assert torch.equal(model(image, mode='tensor'), expected)
        randomize(model)
        assert not torch.allclose(model(image, mode='tensor'), expected)
    assert model._scores is model._largest is None
    # Weights of the stock network lack nothing but what is new.
    missing = model.load_state_dict(stock.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(k.startswith('score_map.') for k in missing.missing_keys)


def test_alignment_is_that_of_the_text_alignment_loss():
    torch.manual_seed(0)
    model = MODELS.build(stdc(sampler=None))
    image, labels = torch.randn(2, 3, 64,
                                96), torch.randint(0, K, (2, 1, 64, 96))
    features = []
    model.score_map.register_forward_pre_hook(
        lambda module, args: features.append(args[0]))
    found = model(image, labels_of(labels), mode='loss')['align.loss_ce']
    loss = TextAlignmentLoss(
        scale=dict(init=1 / 0.07, learnable=False), upsample=True)
    expected = loss(features[0], model.score_map.text.class_embeddings,
                    labels.squeeze(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_linear_score_map_folds_into_stock():
    torch.manual_seed(0)
    model = MODELS.build(stdc(norm='rms', projection=True, width=16))
    image = torch.randn(2, 3, 64, 96)
    randomize(model)
    for _ in range(3):
        model(image, mode='tensor')
    # The root mean square of the lengths, and its running average.
    assert model.score_map.length.item() != 1
    model.eval()
    cfg = Config(dict(model=stdc(norm='rms', projection=True, width=16)))
    stock = fold(model, cfg)
    assert type(stock) is EncoderDecoder
    with torch.no_grad():
        expected = model(image, mode='tensor')
        torch.testing.assert_close(
            stock(image, mode='tensor'), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='evaluation'):
        model.train().fold()
    with pytest.raises(ValueError, match='does not fold into a convolution'):
        MODELS.build(stdc()).eval().fold()
    with pytest.raises(ValueError, match='decode_head.convs.0.conv'):
        MODELS.build(stdc(norm='rms', **DECODER)).eval().fold()
    with pytest.raises(ValueError, match='model: a score map'):
        to_stock_cfg(Config(dict(model=stdc())))


def test_a_graph_without_the_plugin():
    torch.manual_seed(0)
    cfg = dict(stdc(), data_preprocessor=dict(type='SegDataPreProcessor'))
    network = ExportableSegmentor(randomize(MODELS.build(cfg)).eval())
    image = network.example((64, 96))
    with torch.no_grad():
        expected = network.reference(image)
    logits = to_onnx(network, (64, 96), dynamic=False, meta='').run(image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_has_its_own_score_map():
    """As EMAHook makes one."""
    torch.manual_seed(0)
    model = randomize(MODELS.build(stdc())).eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image, mode='tensor')
    twin = copy.deepcopy(model)
    assert torch.equal(twin(image, mode='tensor'), before)
    for conv in twin.score_map.convs.values():
        torch.nn.init.zeros_(conv.weight)
    assert torch.equal(model(image, mode='tensor'), before)
    assert not torch.equal(twin(image, mode='tensor'), before)


def test_init_as_published():
    torch.manual_seed(0)
    model = MODELS.build(stdc(init='kaiming'))
    weight = model.score_map.convs['backbone/arms/0/conv_layer/conv'].weight
    # He et al., fan out: 8 channels x 3 x 3.
    assert weight.std().item() == pytest.approx((2 / 72)**0.5, rel=0.2)


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


def test_an_unknown_backbone_needs_the_names():
    cfg = stdc()
    cfg.update(backbone=dict(type='ERFNet'))
    cfg['decode_head'].update(in_channels=16, in_index=0)
    with pytest.raises(ValueError, match='has no sites for ERFNet'):
        MODELS.build(cfg)
    with pytest.raises(ValueError, match='temperature'):
        MODELS.build(dict(stdc(), alignment_head=dict(temperature=0.)))


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
    bases = sorted({g['lr'] for g in wrapper.param_groups})
    assert bases == pytest.approx([0.01, 0.1])
    wrapper.param_groups[:] = [
        next(g for g in wrapper.param_groups if g['lr'] == base)
        for base in bases
    ]
    assert max(s.end for s in cfg.param_scheduler) == 10000
    schedulers = [
        PARAM_SCHEDULERS.build(
            # A tenth of the steps says the same; MMEngine's rate is lowest
            # in the last step, not after it.
            dict(scheduler, end=min(scheduler.end, 1001)),
            default_args=dict(optimizer=wrapper))
        for scheduler in cfg.param_scheduler
    ]
    for step in range(1000):
        if step in (0, 1, 50, 199, 200, 201, 500, 900):
            rates = sorted({g['lr'] for g in wrapper.param_groups})
            expected = [
                poly_with_warmup(base, step, 1000, 200) for base in bases
            ]
            assert rates == pytest.approx(expected, rel=2e-3, abs=2e-6), step
        for scheduler in schedulers:
            scheduler.step()
