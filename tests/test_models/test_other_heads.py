# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text on every stock head that can take it, and the refusal of the rest."""
import copy
from pathlib import Path

import pytest
import torch
from each_case import each_case
from heads import ALIGN, backward, without_gradient
from mmengine.config import Config
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from mmseg.models import decode_heads
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from network_tester import samples
from tiny import CONTROL
from torch import nn

from mmseg_textkd import stock_config
from mmseg_textkd.deploy import fold_state_dict
from mmseg_textkd.deploy.words import set_words
from mmseg_textkd.models import TextFCNHead, TextHeadMixin, TextLightHamHead

K = 4
ONE = dict(in_channels=8, channels=8, num_classes=K, dropout_ratio=0.)
TWO = dict(ONE, in_channels=[8, 8], in_index=[0, 1])
PYRAMID = dict(ONE, in_channels=[8] * 4, in_index=[0, 1, 2, 3])
BN = dict(type='BN')
GN = dict(type='GN', num_groups=4)
SELECT = dict(input_transform='multiple_select')
# Two lines of code are all that these need; see the guide `mixing in`.
TAKE = dict(
    # It calls its dropout even where there is none.
    ANNHead=dict(TWO, project_channels=4, dropout_ratio=0.1),
    APCHead=dict(ONE, pool_scales=(1, 2)),
    ASPPHead=ONE,
    DAHead=dict(ONE, pam_channels=4),
    DepthwiseSeparableASPPHead=dict(ONE, c1_in_channels=8, c1_channels=4),
    DMHead=dict(ONE, filter_sizes=(1, 3)),
    DNLHead=ONE,
    DPTHead=dict(
        PYRAMID, embed_dims=8, post_process_channels=[8] * 4, **SELECT),
    EMAHead=dict(ONE, ema_channels=8, num_bases=4, num_stages=2),
    EncHead=dict(TWO, num_codes=4),
    FPNHead=dict(PYRAMID, feature_strides=[4, 8, 16, 32]),
    GCHead=ONE,
    ISAHead=dict(ONE, isa_channels=4, down_factor=(4, 4)),
    LRASPPHead=dict(
        ONE,
        in_channels=[8] * 3,
        in_index=[0, 1, 2],
        branch_channels=(4, 4),
        **SELECT),
    NLHead=ONE,
    OCRHead=dict(ONE, ocr_channels=4),
    PSPHead=ONE,
    SETRMLAHead=dict(TWO, mla_channels=4),
    SETRUPHead=dict(ONE, norm_cfg=BN),
    UPerHead=PYRAMID)
GENERATE = dict(ONE, type='FCNHead', num_convs=1)
SIDE = Config.fromfile(stock_config('_base_/models/san_vit-b16.py'))
SIDE = dict(SIDE.model.decode_head, deep_supervision_idxs=[], train_cfg=None)
SIDE.pop('type')
REFUSED = dict(
    IterativeDecodeHead=dict(
        num_stages=0, kernel_generate_head=GENERATE, kernel_update_head=[]),
    KernelUpdateHead=dict(),
    KernelUpdator=dict(),
    MaskFormerHead=dict(),
    Mask2FormerHead=dict(),
    PointHead=dict(ONE, in_channels=[8], in_index=[0]),
    SegmenterMaskTransformerHead=dict(
        ONE, num_layers=1, num_heads=2, embed_dims=8),
    SideAdapterCLIPHead=SIDE,
    VPDDepthHead=dict(
        in_channels=[16] * 4,
        embed_dim=2,
        feature_dim=16,
        num_deconv_layers=1,
        num_deconv_filters=(4, )))
NEED_OPS = {'CCHead', 'PSAHead'}
# Classes of the package; STDC's is a boundary head.
OURS = {
    'DDRHead', 'DepthwiseSeparableFCNHead', 'FCNHead', 'LightHamHead',
    'PIDHead', 'SegformerHead', 'STDCHead'
}


def text_class(name):
    return type(f'Text{name}', (TextHeadMixin, getattr(decode_heads, name)),
                {})


def build(name, **text):
    """The stock head, or with arguments for text the text head."""
    torch.manual_seed(0)
    cls = text_class(name) if text else getattr(decode_heads, name)
    head = cls(**copy.deepcopy(TAKE[name]), **text)
    head.init_weights()
    return head


def features(name):
    torch.manual_seed(1)
    if name == 'DPTHead':  # patches and the token of the class
        return [[torch.randn(2, 8, 8, 8), torch.randn(2, 8)] for _ in range(4)]
    sizes = dict(
        FPNHead=[16, 8, 4, 2], UPerHead=[16, 8, 4, 2], LRASPPHead=[64] * 3)
    sizes = sizes.get(name, [16] * 2)
    return [torch.randn(2, 8, size, size) for size in sizes]


def previous(name):
    """What a head of a cascade is handed besides."""
    torch.manual_seed(2)
    return [torch.randn(2, K, 16, 16)] if name == 'OCRHead' else []


def losses(name, head):
    torch.manual_seed(4)
    return head.loss(features(name), *previous(name), samples((32, 32), K), {})


def logits(name, head):
    with torch.no_grad():
        out = head(features(name), *previous(name))
    return out[0] if isinstance(out, tuple) else out


def test_every_stock_head_has_been_tried():
    assert set(decode_heads.__all__) == {*TAKE, *REFUSED, *NEED_OPS, *OURS}
    page = Path(__file__).parents[2] / 'docs/en/user_guides/mixing_in.md'
    listed = page.read_text()
    for name in {*TAKE, *REFUSED, *NEED_OPS} - {'KernelUpdator'}:
        assert f'`{name}`' in listed


@each_case('name', TAKE)
def test_classifier_learns_and_folds(name):
    head = build(name, text=CONTROL, text_losses=[ALIGN])
    found = losses(name, head)
    assert found['loss_text_align'] > 0
    backward(found)
    frozen = {n for n, p in head.named_parameters() if not p.requires_grad}
    assert set(without_gradient(head)) <= frozen
    expected = logits(name, head.eval())
    head.conv_seg, head.text_losses = head.conv_seg.as_conv(), nn.ModuleList()
    stock = build(name)
    stock.load_state_dict(head.state_dict(), strict=True)
    torch.testing.assert_close(
        logits(name, stock.eval()), expected, rtol=1e-4, atol=1e-5)


@each_case('name', TAKE)
def test_auxiliary_role_leaves_the_stock_head_alone(name):
    stock, head = build(name), build(name, text=CONTROL, role='auxiliary')
    head.load_state_dict(stock.state_dict(), strict=False)
    expected, found = losses(name, stock), losses(name, head)
    found.pop('loss_text_align').backward()
    assert head.text_branch.projection.conv.weight.grad.abs().max() > 0
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        logits(name, head.eval()), logits(name, stock.eval()))


@each_case('name', TAKE)
def test_other_words_fit_the_stock_head(name, monkeypatch):
    """Also where the head has further classifiers: DAHead and EncHead."""
    cfg = dict(TAKE[name], type=f'Text{name}')
    monkeypatch.setitem(MODELS.module_dict, cfg['type'], text_class(name))
    model = nn.Module()
    model.decode_head = head = build(name, text=CONTROL).eval()
    model.out_channels, model.with_auxiliary_head = K, False
    trained = [2, None, 0, 3, 1]
    set_words(model, Config(dict(model=dict(decode_head=cfg))),
              nn.functional.normalize(torch.randn(5, 16), dim=1), trained)
    stock = getattr(decode_heads, name)(**dict(TAKE[name], num_classes=5))
    stock.load_state_dict(fold_state_dict(head), strict=True)
    torch.testing.assert_close(
        logits(name, stock.eval()), logits(name, head), rtol=1e-4, atol=1e-5)


@each_case('name', REFUSED)
def test_others_are_refused(name):
    with pytest.raises(TypeError, match=f'Text{name} cannot take text.*conv_'):
        text_class(name)(text=CONTROL, **copy.deepcopy(REFUSED[name]))


class CallsNone(FCNHead):

    def forward(self, inputs):
        return self._forward_feature(inputs)[:, :K]


class CallsTwice(FCNHead):

    def forward(self, inputs):
        return super().forward(inputs) + super().forward(inputs)


def of(head, **kwargs):
    """A text head by inheritance from another."""
    kind = type('TextOwn', (TextHeadMixin, head), {})
    return kind(text=CONTROL, **ONE, **kwargs)


@each_case('kernel, message', [(3, r'kernel_size=\(3, 3\)'),
                               (None, 'found None')])
def test_another_classifier_is_refused(kernel, message):

    class Own(FCNHead):

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv_seg = kernel and nn.Conv2d(8, K, kernel)

    with pytest.raises(TypeError, match=f'TextOwn cannot.*1x1.*{message}'):
        of(Own)


@each_case('head, options, match', [
    (CallsNone, dict(role='classifier'), 'TextOwn cannot.*not call.*conv_s'),
    (CallsNone, dict(role='auxiliary'), 'TextOwn cannot.*not call.*conv_s'),
    (CallsTwice, dict(text_losses=[ALIGN]), '2 times in one forward'),
])
def test_a_classifier_is_called_once(head, options, match):
    with pytest.raises(RuntimeError, match=match):
        losses('ASPPHead', of(head, **options))
    # Without text losses it may be called twice.
    assert losses('ASPPHead', of(CallsTwice))['loss_ce'] > 0


@each_case('norm_cfg, kind, eps', [
    (GN, nn.BatchNorm2d, 1e-5),
    (dict(type='SyncBN', eps=1e-3), SyncBatchNorm, 1e-3),
    (dict(type='BN', eps=1e-3), nn.BatchNorm2d, 1e-3),
    (None, nn.BatchNorm2d, 1e-5),
])
@each_case('role', ['classifier', 'auxiliary'])
def test_norm_is_the_heads_own_where_it_folds(role, norm_cfg, kind, eps):
    args = dict(ONE, norm_cfg=norm_cfg)
    bn = TextFCNHead(text=CONTROL, role=role, **args).text_branch.projection.bn
    assert type(bn) is kind and bn.eps == eps


def test_a_norm_that_does_not_fold_is_refused_where_it_is_asked_for():
    args = dict(TWO, ham_channels=8, ham_kwargs=dict(MD_R=4), norm_cfg=GN)
    head = TextLightHamHead(text=CONTROL, **args)
    assert isinstance(head.squeeze.norm, nn.GroupNorm)
    assert type(head.text_branch.projection.bn) is nn.BatchNorm2d
    branch = dict(norm_cfg=GN)
    with pytest.raises(ValueError, match='needs BN or SyncBN.*GN'):
        TextLightHamHead(text=CONTROL, text_branch=branch, **args)
