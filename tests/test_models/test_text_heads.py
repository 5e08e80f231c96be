# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text heads on real stock networks, in both roles."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.models.decode_heads import ASPPHead, FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import mmseg_textkd
from mmseg_textkd.models import (TextBranch, TextClassifier, TextFCNHead,
                                 TextHeadMixin)

ROLES = ('classifier', 'auxiliary')
BUILT = {}


def samples(size, num_classes, batch=2, ignored_rows=3):
    """Labels with every class, some ignored pixels, and an edge map."""
    out = []
    for _ in range(batch):
        labels = torch.randint(0, num_classes, (1, *size))
        labels[:, :ignored_rows] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=(labels % 2))
        out.append(sample)
    return out


class BaseTextHeadTester:
    """What must hold for a text head on any network."""
    stock = ''  # path of the stock config
    head = ''  # registered text head
    size = (64, 128)
    ignored_rows = 3

    def config(self, role=None, **text):
        """The stock model, or with a role the text model."""
        cfg = Config.fromfile(mmseg_textkd.stock_config(self.stock)).model
        cfg = copy.deepcopy(cfg)
        cfg.backbone.init_cfg = cfg.pretrained = None
        cfg.backbone.pop('pretrained', None)
        if 'backbone_cfg' in cfg.backbone:  # STDC
            cfg.backbone.backbone_cfg.init_cfg = None
        for head in self.each_head(cfg):
            losses = head.loss_decode
            for loss in losses if isinstance(losses, list) else [losses]:
                if 'min_kept' in loss:
                    loss.min_kept = 100
            if head.get('sampler'):
                head.sampler.min_kept = 100
        if role is not None:
            text.setdefault(
                'text', dict(type='ControlEmbeddings', kind='random', dim=32))
            cfg.decode_head.update(type=self.head, role=role, **text)
        return cfg

    @staticmethod
    def each_head(cfg):
        auxiliary = cfg.get('auxiliary_head') or []
        if not isinstance(auxiliary, list):
            auxiliary = [auxiliary]
        return [cfg.decode_head, *auxiliary]

    def build(self, role=None, **text):
        """Build and initialise a model; each kind once, then as copies."""
        key = (type(self), role, repr(text))
        if key not in BUILT:
            torch.manual_seed(0)
            model = MODELS.build(self.config(role, **text))
            model.init_weights()
            BUILT[key] = revert_sync_batchnorm(model)
        return copy.deepcopy(BUILT[key])

    def losses(self, model):
        torch.manual_seed(1)
        inputs = torch.randn(2, 3, *self.size)
        return model.loss(
            inputs,
            samples(
                self.size,
                model.decode_head.num_classes,
                ignored_rows=self.ignored_rows))

    def without_gradient(self, model):
        sum(v for k, v in self.losses(model).items() if 'loss' in k).backward()
        return {n for n, p in model.named_parameters() if p.grad is None}

    def settle(self, model):
        """Give batch norms statistics and text non-neutral values."""
        with torch.no_grad():
            for param in model.decode_head.text.parameters():
                param.add_(torch.randn_like(param) * 0.1)
        model.train()
        for _ in range(2):
            self.losses(model)
        return model.eval()

    @pytest.mark.parametrize('role', ROLES)
    def test_stock_names_are_kept(self, role):
        stock = self.build().state_dict()
        text = self.build(role).state_dict()
        branch = 'conv_seg' if role == 'classifier' else 'text_branch'
        prefix = f'decode_head.{branch}.'
        losses = 'decode_head.text_losses.'
        extra = {k for k in text if k.startswith((prefix, losses))}
        missing = set(stock) - (set(text) - extra)
        if role == 'classifier':
            assert missing == {prefix + 'weight', prefix + 'bias'}
        else:
            assert missing == set()
        assert (set(text) - extra) <= set(stock)
        assert extra
        # Nothing of a stock checkpoint slips into the text branch.
        loaded = self.build(role).load_state_dict(stock, strict=False)
        assert set(loaded.unexpected_keys) == missing
        # torch itself is lenient about this counter of batch norms.
        assert set(loaded.missing_keys) == {
            k
            for k in extra if not k.endswith('num_batches_tracked')
        }

    @pytest.mark.parametrize('role', ROLES)
    def test_every_parameter_learns(self, role):
        """DDP allows no parameter without a gradient."""
        model = self.build(role, text_losses=[dict(type='TextAlignmentLoss')])
        assert self.losses(model)['decode.loss_text_align'] > 0
        # STDC's stock boundary head has a parameter of that kind itself.
        assert self.without_gradient(model) == self.without_gradient(
            self.build())

    def test_classifier_alone_has_only_the_stock_losses(self):
        stock, text = self.build(), self.build('classifier')
        assert self.losses(stock).keys() == self.losses(text).keys()

    def test_auxiliary_role_leaves_the_stock_part_alone(self):
        """Same weights, same losses, same prediction as the stock model."""
        stock, text = self.build(), self.build('auxiliary')
        text.load_state_dict(stock.state_dict(), strict=False)
        torch.manual_seed(2)
        expected = self.losses(stock)
        torch.manual_seed(2)
        got = self.losses(text)
        extra = got.pop('decode.loss_text_align')
        assert 0 < extra < 0.4 * 20
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
        feat = torch.randn(1, 3, *self.size)
        torch.testing.assert_close(text.eval()._forward(feat),
                                   stock.eval()._forward(feat))

    def test_folded_weights_load_into_the_stock_model(self):
        model = self.settle(self.build('classifier'))
        state = model.state_dict()
        conv = model.decode_head.conv_seg.as_conv()
        state = {
            k: v
            for k, v in state.items()
            if not k.startswith('decode_head.conv_seg.')
        }
        state['decode_head.conv_seg.weight'] = conv.weight
        state['decode_head.conv_seg.bias'] = conv.bias
        stock = self.build().eval()
        stock.load_state_dict(state, strict=True)
        for size in (self.size, (96, 160)):
            inputs = torch.randn(2, 3, *size)
            with torch.no_grad():
                expected = model.encode_decode(inputs, [dict(img_shape=size)])
                got = stock.encode_decode(inputs, [dict(img_shape=size)])
            bound = 1e-4 * max(1., expected.abs().max().item())
            assert (got - expected).abs().max() < bound
            same = got.argmax(1) == expected.argmax(1)
            assert same.float().mean() > 0.9999
        count = sum(p.numel() for p in stock.parameters())
        reference = sum(p.numel() for p in self.build().parameters())
        assert count == reference

    def test_nothing_is_left_on_the_modules(self):
        model = self.build(
            'classifier', text_losses=[dict(type='TextAlignmentLoss')])
        before = {n: set(vars(m)) for n, m in model.named_modules()}
        self.losses(model)
        assert before == {n: set(vars(m)) for n, m in model.named_modules()}
        assert not any(m._forward_hooks or m._forward_pre_hooks
                       for m in model.decode_head.modules())

    def test_init_of_the_text_branch_is_sound(self):
        head = self.build('classifier').decode_head
        assert torch.equal(head.conv_seg.projection.bn.weight, torch.ones(32))
        assert head.conv_seg.logit_bias.abs().max() == 0
        assert head.conv_seg.scale().item() == pytest.approx(1)


class TestBiSeNetV2(BaseTextHeadTester):
    stock = 'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'
    head = 'TextFCNHead'


class TestSTDC(BaseTextHeadTester):
    stock = 'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py'
    head = 'TextFCNHead'


class TestDDRNet(BaseTextHeadTester):
    stock = 'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py'
    head = 'TextDDRHead'


class TestPIDNet(BaseTextHeadTester):
    # MMSegmentation 1.2.2 cannot combine ignored pixels and the class
    # weights of PIDNet's first loss (its issue #3734).
    ignored_rows = 0
    stock = 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
    head = 'TextPIDHead'


class TestFastSCNN(BaseTextHeadTester):
    stock = 'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py'
    head = 'TextDepthwiseSeparableFCNHead'


CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)
ARGS = dict(in_channels=8, channels=8, num_classes=4, num_convs=1)


def test_roles_put_the_branch_in_its_place():
    head = TextFCNHead(text=CONTROL, **ARGS)
    assert isinstance(head.conv_seg, TextClassifier)
    assert head.text is head.conv_seg and len(head.text_losses) == 0
    head = TextFCNHead(text=CONTROL, role='auxiliary', **ARGS)
    assert isinstance(head.conv_seg, torch.nn.Conv2d)
    assert type(head.text) is TextBranch
    assert head.text_losses[0].loss_weight == 0.4


def test_text_losses_see_what_the_classifier_saw():
    """Embeddings are those of the forward, not computed a second time."""
    head = TextFCNHead(
        text=CONTROL, text_losses=[dict(type='TextAlignmentLoss')], **ARGS)
    calls = []
    head.conv_seg.projection.register_forward_hook(
        lambda *args: calls.append(args[2]))
    seen = []
    loss = head.text_losses[0]
    loss.register_forward_pre_hook(lambda m, args: seen.append(args))
    head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 4), {})
    assert len(calls) == 1 and seen[0][0] is calls[0]
    assert seen[0][1] is head.text.text.class_embeddings
    labels = seen[0][2]
    assert labels.shape == (2, 4, 8) and labels.dtype == torch.int64


def test_labels_are_those_of_the_nearest_pixel():
    head = TextFCNHead(
        text=CONTROL, text_losses=[dict(type='TextAlignmentLoss')], **ARGS)
    seen = []
    head.text_losses[0].register_forward_pre_hook(
        lambda m, args: seen.append(args[2]))
    data = samples((32, 64), 4)
    head.loss([torch.randn(2, 8, 4, 8)], data, {})
    full = torch.cat([s.gt_sem_seg.data for s in data])
    assert torch.equal(seen[0], full[:, ::8, ::8])


def test_losses_of_one_name_add_up():
    one = TextFCNHead(
        text=CONTROL, text_losses=[dict(type='TextAlignmentLoss')], **ARGS)
    two = TextFCNHead(
        text=CONTROL, text_losses=[dict(type='TextAlignmentLoss')] * 2, **ARGS)
    two.load_state_dict(one.state_dict(), strict=False)
    data, feat = samples((32, 64), 4), [torch.randn(2, 8, 4, 8)]
    torch.manual_seed(3)
    single = one.loss(feat, data, {})['loss_text_align']
    torch.manual_seed(3)
    double = two.loss(feat, data, {})['loss_text_align']
    torch.testing.assert_close(double, 2 * single)


def test_a_head_without_conv_seg_is_refused():

    class NoConvSeg(FCNHead):

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            del self.conv_seg

    class Bad(TextHeadMixin, NoConvSeg):
        pass

    with pytest.raises(TypeError, match='Bad cannot take text.*conv_seg'):
        Bad(text=CONTROL, **ARGS)


def test_other_stock_heads_need_no_code():

    class TextASPPHead(TextHeadMixin, ASPPHead):
        pass

    head = TextASPPHead(
        text=CONTROL, in_channels=8, channels=8, num_classes=4).eval()
    assert head([torch.randn(1, 8, 4, 4)]).shape == (1, 4, 4, 4)


@pytest.mark.parametrize('kwargs, message', [
    (dict(role='teacher'), "role.*must be one of.*'teacher'"),
    (dict(role='auxiliary', text_losses=[]), 'at least one loss'),
    (dict(num_classes=2, out_channels=1), 'one logit a class'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TextFCNHead(text=CONTROL, **{**ARGS, **kwargs})


def test_wrong_number_of_classes(make_embeddings):
    text = dict(type='ClassEmbeddings', file=make_embeddings(5))
    with pytest.raises(ValueError, match='5 classes.*num_classes=4'):
        TextFCNHead(text=text, **ARGS)


def test_a_classifier_called_twice_is_refused():

    class Twice(TextFCNHead):

        def forward(self, inputs):
            return super().forward(inputs) + super().forward(inputs)

    head = Twice(
        text=CONTROL, text_losses=[dict(type='TextAlignmentLoss')], **ARGS)
    with pytest.raises(RuntimeError, match='2 times in one forward'):
        head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 4), {})
