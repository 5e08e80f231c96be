# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Structure loss and synonyms in real, tiny runs, to the deployed network."""
import pytest
import torch
from each_case import each_case
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from processes import states
from tiny import SIZE, assert_equal, folded, run, stop_and_resume, tiny_config

from mmseg_textkd.deploy import fold_state_dict
from mmseg_textkd.models.text_providers import TextProvider
from mmseg_textkd.text.encode_classes import encode_classes

pytestmark = pytest.mark.stacks

ITERS, SWITCH, DIM = 6, 3, 64


@HOOKS.register_module()
class TextSeen(Hook):
    """Note the text of each iteration, and the structure loss."""

    def __init__(self):
        self.train, self.val, self.losses = [], [], []

    def before_train(self, runner):

        def note(module, args, output):
            rows = self.train if module.training else self.val
            rows.append(output.detach())

        for module in runner.model.modules():
            if isinstance(module, TextProvider):
                module.register_forward_hook(note)

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(float(outputs['decode.loss_structure']))


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'toy.safetensors'
    encode_classes(
        'toy_scenes+synonyms', 'toyclip', 'photo', keep_bank=True).save(path)
    return str(path)


def config(tmp_path, file, text='ResidualPromptLearner', **options):
    embeddings = dict(
        type='SynonymSampler',
        file=file,
        mode=options.pop('mode', 'uniform'),
        classes='toy_scenes')
    role = options.pop('role', 'classifier')
    learn = {'.': .1}
    if text:
        embeddings = dict(type=text, embeddings=embeddings)
        learn = {r'\.text\.': 1., **learn}
    cfg = tiny_config(tmp_path, embeddings,
                      dict(switch_at=SWITCH, learn=learn), ITERS)
    losses = [dict(type='SemanticStructureLoss', min_pixels=1, **options)]
    if role == 'auxiliary':
        losses.append(dict(type='TextAlignmentLoss', loss_weight=.4))
    cfg.model.decode_head.update(role=role, text_losses=losses)
    return cfg


def train(cfg):
    cfg.custom_hooks.append(dict(type='TextSeen'))
    runner = run(cfg)
    seen, = (h for h in runner.hooks if isinstance(h, TextSeen))
    return runner, seen


@each_case('text, role', [
    ('ResidualPromptLearner', 'classifier'),
    (None, 'auxiliary'),
])
def test_through_both_stages_to_the_stock_network(tmp_path, file, text, role):
    cfg = config(tmp_path, file, text, role=role)
    runner, seen = train(cfg)
    provider = runner.model.decode_head.text_branch.text
    # Each of two images has text of its own, until the prompts begin.
    stage1, stage2 = seen.train[:SWITCH], seen.train[SWITCH:]
    assert {t.shape for t in stage1} == {(2, 8, DIM)}
    assert {t.shape for t in stage2} == {(8, DIM)}
    assert all(not torch.equal(t[0], t[1]) for t in stage1)
    assert not torch.equal(stage1[0], stage1[1])
    # The prompts begin where the plain names are.
    plain = TextProvider.expected(provider)
    if text:
        plain = provider.base
        assert not torch.equal(provider.class_embeddings, plain)
    torch.testing.assert_close(stage2[0], plain)
    if role == 'classifier':
        # What is evaluated is the text as it is then, not a draw.
        assert {t.shape for t in seen.val} == {(8, DIM)}
    assert len(seen.losses) == ITERS and min(seen.losses) > 0

    # The stock network takes what is left, and computes the same.
    stock = folded(cfg, runner.model)
    assert not [m for m in stock.modules() if 'mmseg_textkd' in str(type(m))]
    images = torch.randn(2, 3, *SIZE)
    found, expected = (m(images, mode='tensor') for m in (stock, runner.model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_killed_and_resumed_with_memory(tmp_path, file):
    """Draws are random, and MMEngine saves no random states; means are not."""
    options = dict(mode='mean', momentum=.9, shape=(8, DIM))
    cfg = config(tmp_path, file, **options)
    cfg.default_hooks.checkpoint.interval = 2
    model = run(cfg, work_dir=str(tmp_path / 'whole')).model.eval()
    stop_and_resume(cfg, 2, tmp_path / 'killed')
    first, resumed = states(tmp_path / 'killed', 2, ITERS)
    memory = 'decode_head.text_losses.0.memory'
    assert first[memory].any(dim=1).sum() > 2
    assert_equal(states(tmp_path / 'whole', ITERS), [resumed])
    assert not torch.equal(resumed[memory], first[memory])
    # It is no part of what is deployed.
    assert 'memory' not in ' '.join(fold_state_dict(model))


def test_max_with_amp_averages_and_context_prompts(tmp_path, file):
    cfg = config(tmp_path, file, 'ContextPromptLearner', mode='max')
    cfg.model.decode_head.text.update(
        model='toyclip', token_dim=64, n_ctx=4, init='a photo of a')
    cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    cfg.custom_hooks.append(
        dict(type='EMAHook', momentum=.3, update_buffers=True))
    runner, seen = train(cfg)
    phrases = seen.train[0].shape[1]
    assert {t.shape for t in seen.train[:SWITCH]} == {(1, phrases, 8, DIM)}
    assert {t.shape for t in seen.train[SWITCH:]} == {(8, DIM)}
    assert all(t.dtype == torch.float32 for t in seen.train)
    assert all(0 < loss < 10 for loss in seen.losses)
    # Copied for averaging, it still draws.
    provider = runner.model.decode_head.text_branch.text
    assert provider.phrase_bank is not None
