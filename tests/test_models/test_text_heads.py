# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What text adds to a stock head; whole networks are in test_networks."""
import mmengine.registry
import pytest
import torch
from each_case import each_case
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope, Registry
from mmseg.models.decode_heads import FCNHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from network_tester import samples

from mmseg_textkd.models import (TextBranch, TextClassifier, TextFCNHead,
                                 TextHeadMixin)

CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)
ARGS = dict(in_channels=8, channels=8, num_classes=4, num_convs=1)


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
    assert seen[0][1] is head.text_branch.text.class_embeddings
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
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 4), {})
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
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 4), {})
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
            head = mmengine.registry.MODELS.build(
                dict(
                    ARGS,
                    type='mmseg.TextFCNHead',
                    role='auxiliary',
                    loss_decode=dict(type='mmseg.CrossEntropyLoss'),
                    text=dict(CONTROL, type='mmseg.ControlEmbeddings')))
    finally:
        for parent in (mmengine.registry.MODELS, mmengine.registry.HOOKS):
            del parent.children['project']
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 4), {})
    assert losses['loss_text_align'].item() > 0


@each_case('kwargs, message', [
    (dict(role='teacher'), "role.*must be one of.*'teacher'"),
    (dict(role='auxiliary', text_losses=[]), 'at least one loss'),
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


def test_init_of_the_text_branch_is_sound():
    """The stock init of `conv_seg` would make the gain 0.01."""
    head = TextFCNHead(text=CONTROL, **ARGS)
    head.init_weights()
    branch = head.conv_seg
    assert torch.equal(branch.projection.bn.weight, torch.ones(16))
    assert branch.logit_bias.abs().max() == 0
    assert branch.scale().item() == pytest.approx(1)
