# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What text adds to a stock head; whole networks are in test_networks."""
import mmengine.registry
import pytest
import torch
from each_case import each_case
from heads import ALIGN, ARGS, data
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope, Registry
from mmseg.models.decode_heads import FCNHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from tiny import CONTROL

from mmseg_textkd.models import (TextBranch, TextClassifier, TextFCNHead,
                                 TextHeadMixin)


def test_roles_put_the_branch_in_its_place():
    head = TextFCNHead(text=CONTROL, **ARGS)
    assert isinstance(head.conv_seg, TextClassifier)
    assert head.text_branch is head.conv_seg and len(head.text_losses) == 0
    head = TextFCNHead(text=CONTROL, role='auxiliary', **ARGS)
    assert isinstance(head.conv_seg, torch.nn.Conv2d)
    assert type(head.text_branch) is TextBranch
    # The names of parameters are those of the roles.
    keys = {k.split('.')[0] for k in head.state_dict() if '.text.' in k}
    assert keys == {'text_branch'}
    with pytest.warns(DeprecationWarning, match='head.text_branch'):
        assert head.text is head.text_branch
    assert head.text_losses[0].loss_weight == 0.4


def test_text_losses_see_what_the_classifier_saw():
    """Embeddings of the forward, and labels of the nearest pixels."""
    head = TextFCNHead(text=CONTROL, text_losses=[ALIGN], **ARGS)
    calls, seen = [], []
    head.conv_seg.projection.register_forward_hook(
        lambda *args: calls.append(args[2]))
    head.text_losses[0].register_forward_pre_hook(
        lambda module, args: seen.append(args))
    inputs, samples = data()
    head.loss(inputs, samples, {})
    (embeddings, ), ((found, text, labels), ) = calls, seen
    assert found is embeddings
    assert text is head.text_branch.text.class_embeddings
    full = torch.cat([s.gt_sem_seg.data for s in samples])
    assert labels.dtype == torch.int64
    assert torch.equal(labels, full[:, ::8, ::8])


def test_losses_of_one_name_add_up():
    one, two = (
        TextFCNHead(text=CONTROL, text_losses=[ALIGN] * number, **ARGS)
        for number in (1, 2))
    two.load_state_dict(one.state_dict(), strict=False)
    single, double = (
        h.loss(*data(), {})['loss_text_align'] for h in (one, two))
    torch.testing.assert_close(double, 2 * single)
    # With those of the stock head too.
    named = dict(ALIGN, loss_name='loss_ce')
    both = TextFCNHead(text=CONTROL, text_losses=[named], **ARGS)
    both.load_state_dict(one.state_dict(), strict=False)
    torch.testing.assert_close(
        both.loss(*data(), {})['loss_ce'],
        sum(v for k, v in one.loss(*data(), {}).items() if 'loss' in k))


def test_a_copy_of_the_base_head_is_as_good():
    """Projects have their own; what it inherits from does not count."""
    own = {
        name: value
        for kind in (BaseDecodeHead, FCNHead)
        for name, value in vars(kind).items()
        if name not in ('__dict__', '__weakref__', '__init__')
    }

    class OwnHead(BaseModule):

        def __init__(self, **kwargs):
            super().__init__()
            vars(self).update(vars(FCNHead(**kwargs)))

    OwnHead = type('OwnHead', (OwnHead, ), own)
    assert not issubclass(OwnHead, BaseDecodeHead)
    TextOwnHead = type('TextOwnHead', (TextHeadMixin, OwnHead), {})
    head = TextOwnHead(text=CONTROL, **ARGS)
    assert isinstance(head.conv_seg, TextClassifier)
    losses = head.loss(*data(), {})
    assert losses['loss_ce'].item() > 0


@each_case('role', ['classifier', 'auxiliary'])
def test_losses_of_ignored_pixels_have_a_graph(role):
    """As PIDNet's in stage 2, where nothing but the text learns."""

    class Plain(TextFCNHead):

        def loss_by_feat(self, logits, samples):
            return dict(loss_ce=torch.zeros(()), acc_seg=torch.zeros(1))

    learner = dict(type='ResidualPromptLearner', embeddings=CONTROL)
    head = Plain(text=learner, role=role, text_losses=None, **ARGS)
    head.requires_grad_(False)
    head.text_branch.text.start_learning()
    head.text_branch.text.offset.requires_grad_()
    if role == 'auxiliary':
        head.conv_seg.requires_grad_()
        head.text_losses = torch.nn.ModuleList()
    losses = head.loss(*data(), {})
    assert losses['loss_ce'].item() == 0
    losses['loss_ce'].backward()
    learned = [p for p in head.parameters() if p.grad is not None]
    assert learned and all(p.grad.abs().max() == 0 for p in learned)


def test_a_project_with_a_scope_of_its_own():
    """What its config names has `mmseg.` in front; the rest is found."""
    for parent in (mmengine.registry.MODELS, mmengine.registry.HOOKS):
        Registry(parent.name, parent=parent, scope='project')
    try:
        with DefaultScope.overwrite_default_scope('project'):
            with pytest.raises(KeyError, match='PromptLearnerHook is not in'):
                mmengine.registry.HOOKS.build(dict(type='PromptLearnerHook'))
            mmengine.registry.HOOKS.build(
                dict(type='mmseg.PromptLearnerHook', switch_at=3))
            text = dict(CONTROL, type='mmseg.ControlEmbeddings')
            loss = dict(type='mmseg.CrossEntropyLoss')
            kind = dict(type='mmseg.TextFCNHead', role='auxiliary')
            head = mmengine.registry.MODELS.build(
                dict(ARGS, **kind, loss_decode=loss, text=text))
    finally:
        for parent in (mmengine.registry.MODELS, mmengine.registry.HOOKS):
            del parent.children['project']
    losses = head.loss(*data(), {})
    assert losses['loss_text_align'].item() > 0


@each_case('kwargs, message', [
    (dict(role='teacher'), "role.*must be one of.*'teacher'"),
    (dict(role='auxiliary', text_losses=[]), 'at least one loss'),
    (dict(num_classes=5), '6 classes.*num_classes=5'),
])
def test_bad_arguments(kwargs, message, text):
    with pytest.raises(ValueError, match=message):
        TextFCNHead(text=text, **{**ARGS, 'num_classes': 6, **kwargs})


def test_init_of_the_text_branch_is_sound():
    """The stock init of `conv_seg` would make the gain 0.01."""
    head = TextFCNHead(text=CONTROL, **ARGS)
    head.init_weights()
    branch = head.conv_seg
    assert torch.equal(branch.projection.bn.weight, torch.ones(16))
    assert branch.logit_bias.abs().max() == 0
    assert branch.scale().item() == pytest.approx(1)


def of_ddr(**branch):
    """A head that initializes all its layers by a loop."""
    loss = dict(type='CrossEntropyLoss')
    return MODELS.build(
        dict(
            type='TextDDRHead',
            in_channels=8,
            channels=16,
            num_classes=4,
            norm_cfg=dict(type='BN'),
            loss_decode=[loss, loss],
            text=CONTROL,
            text_branch=branch))


@each_case('norm', [None, dict(type='Normal', layer='Conv2d', std=.01)])
def test_start_values_outlive_the_init_of_the_head(norm):
    identity = torch.eye(16)[..., None, None]
    balanced = dict(type='BalancedTextClassifier', bias=False)
    for build in (of_ddr, lambda **branch: TextFCNHead(
            text=CONTROL,
            text_branch=branch,
            init_cfg=norm,
            **dict(ARGS, channels=16))):
        head = build(project=False)
        head.init_weights()
        assert torch.equal(head.conv_seg.projection.conv.weight, identity)
        head = build(**balanced)
        head.init_weights()
        gain = head.conv_seg.image_projection.bn.weight
        assert torch.equal(gain, torch.full((16, ), .25))


def test_one_class_has_no_other_text():
    for options in (dict(text_losses=[ALIGN]), dict(role='auxiliary'),
                    dict(fusion=dict(type='TwoWayBridge', width=16))):
        with pytest.raises(ValueError, match='the text of both classes'):
            TextFCNHead(text=CONTROL, **dict(ARGS, num_classes=1, **options))
