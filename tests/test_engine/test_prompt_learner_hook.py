# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The hook in real, tiny runs."""
import ast
import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from mmseg.registry import HOOKS, METRICS, MODELS
from processes import load
from tiny import CLASSES, PROMPTS, RESIDUAL, assert_equal, run, tiny_config
from torch.testing import assert_close

from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.engine import PromptLearnerHook
from mmseg_textkd.text.encode_classes import encode_classes


@HOOKS.register_module()
class Recorder(Hook):
    """Note the state of the run in each iteration."""
    priority = 'LOWEST'

    def __init__(self):
        self.rows = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        params = dict(runner.model.named_parameters())
        groups = [g for g in runner.optim_wrapper.param_groups if g['params']]
        names = {param: name for name, param in params.items()}
        learns = {name for name, p in params.items() if p.requires_grad}
        rates = {names[g['params'][0]]: g['lr'] for g in groups}
        row = dict(iter=runner.iter, learns=learns, lr=rates)
        row.update(before=copy.deepcopy(runner.model.state_dict()))
        self.rows.append(row)

    def after_train_iter(self, runner, outputs, **kwargs):
        groups = runner.optim_wrapper.param_groups
        self.rows[-1].update(
            after=copy.deepcopy(runner.model.state_dict()),
            outer_lr=[g['lr'] for g in groups])

    def changed(self, i):
        """Names of what changed in iteration i."""
        before, after = self.rows[i]['before'], self.rows[i]['after']
        return {k for k, v in before.items() if not torch.equal(v, after[k])}


@HOOKS.register_module()
class StaleGradients(Hook):
    """Leave gradients of all before iteration ``at``, as a wrapper may."""
    priority = 'HIGHEST'

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for param in runner.model.parameters():
            if runner.iter == self.at:
                param.grad = torch.ones_like(param)


@pytest.fixture
def residual(make_embeddings):
    return tiny.residual(make_embeddings(8, names=list(CLASSES)))


def record(cfg, **changes):
    cfg = copy.deepcopy(cfg)
    cfg.custom_hooks.append(dict(type='Recorder'))
    runner = run(cfg, **changes)
    return runner, next(h for h in runner.hooks if isinstance(h, Recorder))


def logs(folder):
    return ''.join(path.read_text() for path in folder.rglob('*.log'))


def of_offset(provider, offset):
    """The class embeddings, by the formula of residual prompts."""
    return F.normalize(provider.base + 0.5 * offset, dim=1)


def evaluate(cfg, path, name):
    cfg = copy.deepcopy(cfg)
    cfg.update(load_from=str(path), experiment_name=name)
    return Runner.from_cfg(cfg).test()


TEXT = 'decode_head.conv_seg.text.'
OFFSET, EMBEDDINGS = f'{TEXT}offset', f'{TEXT}class_embeddings'
SCALE = 'decode_head.conv_seg.scale.log_scale'
BIAS = 'decode_head.conv_seg.logit_bias'


def test_what_learns_in_each_stage(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=4 / 6))
    cfg.custom_hooks.insert(0, dict(type='StaleGradients', at=4))
    runner, recorder = record(cfg)
    everything = {n for n, _ in runner.model.named_parameters()}
    assert [row['iter'] for row in recorder.rows] == list(range(6))
    for i, row in enumerate(recorder.rows):
        stage2 = {OFFSET, SCALE, BIAS}
        assert row['learns'] == (everything - {OFFSET} if i < 4 else stage2)
        changed = recorder.changed(i)
        assert any('running_mean' in k for k in changed) == (i < 4)
        if i < 4:
            assert changed & everything == row['learns']
        else:
            # The embeddings are brought up to date for the checkpoint.
            assert changed - {EMBEDDINGS} == stage2


def test_learned_embeddings_are_weights_of_the_network(tmp_path):
    """They learn in stage 1, without decay, and go through a resume."""
    vectors = f'{TEXT}vectors'
    text = dict(type='LearnedEmbeddings', dim=16)
    cfg = tiny_config(tmp_path, text, {}, save_every=3)
    runner, recorder = record(cfg)
    for i, row in enumerate(recorder.rows):
        assert vectors in row['learns'] and vectors in recorder.changed(i)
    weight = runner.model.get_parameter(vectors)
    decay = [
        group['weight_decay'] for group in runner.optim_wrapper.param_groups
        if any(p is weight for p in group['params'])
    ]
    assert decay == [0]
    saved = load(f'{cfg.work_dir}/iter_6.pth')['state_dict']
    assert_close(saved[EMBEDDINGS], F.normalize(weight, dim=1))
    # From the third iteration on again, with another seed of everything.
    again = run(cfg, resume=True, load_from=f'{cfg.work_dir}/iter_3.pth')
    assert_equal(again.model.state_dict(), runner.model.state_dict())


def test_stage_2_as_a_run_of_its_own(tmp_path, residual):
    """From a checkpoint of stage 1, in which the text was fixed."""
    run(tiny_config(tmp_path, residual['embeddings'], {}, max_iters=2))
    path = str(tmp_path / 'work' / 'iter_2.pth')
    cfg = tiny_config(tmp_path, residual, dict(switch_at=0), max_iters=2)
    cfg.log_level = 'WARNING'
    for name, load_from in (('warned', None), ('stage2', path)):
        work_dir = tmp_path / name
        _, recorder = record(cfg, work_dir=str(work_dir), load_from=load_from)
        assert all(row['learns'] == {OFFSET, SCALE, BIAS}
                   for row in recorder.rows)
        # By the schedule of the run, PolyLR from 0.05 to 1e-4.
        rates = [row['lr'][SCALE] for row in recorder.rows]
        assert rates == pytest.approx([.05, 1e-4])
        warned = "without stage 1's weights" in logs(work_dir)
        assert warned == (load_from is None)
    saved = load(path)['state_dict']
    assert SCALE in saved and OFFSET not in saved
    for key, value in saved.items():
        assert torch.equal(recorder.rows[0]['before'][key], value), key


ROOT = Path(__file__).parents[2]
STDC = dict(type='STDCNet', stdc_type='STDCNet1', in_channels=3)
STDC.update(channels=(8, 8, 16, 16, 16), bottleneck_type='cat', num_convs=4)
STDC.update(norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))
PATHS = dict(type='STDCContextPathNet', backbone_cfg=STDC, out_channels=8)
PATHS.update(last_in_channels=(16, 16))
PATHS.update(ffm_cfg=dict(in_channels=24, out_channels=8, scale_factor=4))


def test_stage_2_as_published(tmp_path):
    """What learns, and whose batch norm statistics move."""
    text = dict(PROMPTS, class_specific=True, vocabulary=list(CLASSES))
    text.update(embeddings=dict(RESIDUAL['embeddings'], dim=64))
    base = tiny_config(tmp_path, max_iters=2)
    base.model.update(
        type='TextKD',
        score_map=dict(in_channels=16, projection=True, text=text),
        auxiliary_head=dict(base.model.decode_head, in_index=2))
    base.model.backbone = PATHS
    base.model.decode_head.in_index = 3
    # `learn` of the published variants, as the guide has them.
    page = (ROOT / 'docs/en/user_guides/training.md').read_text()
    variants = dict(
        re.findall(r'^\| `(\w+)`[^|]*\| [^|]+ \| `([\[{].+[\]}])` \|$', page,
                   re.M))
    variants = {name: ast.literal_eval(v) for name, v in variants.items()}
    fragment = Config.fromfile(ROOT /
                               'configs/_base_/text/published_stage2.py')
    for hook in (fragment.text_stage2_hooks, fragment.text_two_stage_hooks):
        assert hook[0].learn == variants['fixbackbone']
        assert HOOKS.build(hook[0]).learn == hook[0].learn

    def place(name):
        """Tell trunk, neck, heads and prompts apart."""
        for part, start in (('trunk', 'backbone.backbone.'),
                            ('prompts', 'score_map.text'),
                            ('neck', ('backbone.', 'score_map.'))):
            if name.startswith(start):
                return part
        return 'heads'

    cases = [('fixbackbone', True, {'neck', 'heads'}),
             ('fixbackbone', False, {'neck', 'heads'}),
             ('fixall', True, set()), ('fixexcepthead', True, {'heads'}),
             ('trainall', True, {'trunk', 'neck', 'heads'})]
    assert {name for name, *_ in cases} == set(variants)
    for name, freeze_norm, parts in cases:
        cfg, learn = copy.deepcopy(base), variants[name]
        hook = dict(switch_at=1, learn=learn, freeze_norm=freeze_norm)
        cfg.custom_hooks = [dict(hook, type='PromptLearnerHook')]
        # As a run's folder has it: MMEngine sorts the keys.
        cfg.dump(tmp_path / 'written.py')
        runner, recorder = record(Config.fromfile(tmp_path / 'written.py'))
        params = {n for n, _ in runner.model.named_parameters()}
        learns, changed = recorder.rows[1]['learns'], recorder.changed(1)
        assert learns == {n for n in params if place(n) in {'prompts', *parts}}
        assert changed & params <= learns
        assert {place(n) for n in changed & params} == {'prompts', *parts}
        moving = {place(n) for n in changed if 'running_mean' in n}
        assert moving == parts | (set() if freeze_norm else {'trunk'})


def test_rates_of_stage_2(tmp_path, residual):
    """Base rate x factor x schedule; the run's schedule goes on below."""
    warmup = dict(type='LinearLR', start_factor=0.5, end=2)
    decay = dict(type='PolyLR', power=2., eta_min=1e-3, begin=1)
    factors = {r'\.text\.': 2.0, 'backbone': 0.1, 'log_scale': 1.0}
    hook = dict(switch_at=2, learn=factors, param_scheduler=[warmup, decay])
    _, recorder = record(tiny_config(tmp_path, residual, hook))
    backbone = 'backbone.conv1.weight'
    for name, factor in ((OFFSET, 2), (backbone, .1), (SCALE, 1)):
        lrs = [row['lr'][name] / factor for row in recorder.rows[2:]]
        # Half, full, (1 - 1 / 2)^2 of what is above eta_min, eta_min; the
        # factor is on all of it.
        assert lrs == pytest.approx([.025, .05, 1e-3 + .049 / 4, 1e-3])
    _, reference = record(tiny_config(tmp_path, residual, {}))
    for row, other in zip(recorder.rows, reference.rows):
        assert row['outer_lr'] == other['outer_lr']
        # Stage 1 is all that there is by default.
        assert OFFSET not in other['learns']
    # The backbone learns on, with its statistics; the head is frozen.
    changed = recorder.changed(5)
    assert backbone in changed and BIAS not in changed
    assert any('backbone' in k and 'running_mean' in k for k in changed)
    assert not any(k.startswith('decode_head.convs') for k in changed)


def test_one_cycle_of_stage_2(tmp_path, residual):
    """It changes the base rate that others multiply."""
    cycle = dict(type='OneCycleLR', eta_max=.1, total_steps=4)
    hook = dict(switch_at=2, param_scheduler=[cycle])
    _, recorder = record(tiny_config(tmp_path, residual, hook))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.05)
    own = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, .1, total_steps=4, cycle_momentum=False)
    for row in recorder.rows[2:]:
        assert row['lr'][OFFSET] == pytest.approx(own.get_last_lr()[0])
        optimizer.step()
        if row is not recorder.rows[-1]:
            own.step()


def test_the_example_of_the_guide(tmp_path, residual):
    """Prompts and scale at their rate, the rest of the head at a tenth."""
    guides = [(ROOT / f'docs/{language}/user_guides/training.md').read_text()
              for language in ('en', 'zh_cn')]
    found = [re.search(r'learn = (\{[^}]*\})', guide)[1] for guide in guides]
    assert found[0] == found[1]
    cfg = tiny_config(tmp_path, residual,
                      dict(learn=ast.literal_eval(found[0])))
    cfg.custom_hooks[0].switch_at = 0
    runner = run(cfg, **{'train_cfg.max_iters': 1})
    hook, = (h for h in runner.hooks if isinstance(h, PromptLearnerHook))
    factors = hook._lr_factors
    assert factors[OFFSET] == factors[SCALE] == 1
    assert factors['decode_head.convs.0.conv.weight'] == .1
    assert all(name.startswith('decode_head.') for name in factors)


def test_the_old_schedule_is_still_read(tmp_path, residual):
    """Its values, by hand: cosine from 1 to 0 and a rise over two steps."""
    with pytest.warns(UserWarning, match='`schedule`.*`param_scheduler`'):
        hook = dict(schedule=dict(type='cosine', warmup_iters=2), switch_at=2)
        _, recorder = record(tiny_config(tmp_path, residual, hook))
    lrs = [row['lr'][SCALE] / 0.05 for row in recorder.rows[2:]]
    half = 0.5 * (1 + 0.5**0.5)
    assert lrs == pytest.approx([0.5, half, 0.5, 1 - half])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'step'"):
        PromptLearnerHook(schedule=dict(type='step'))
    with pytest.warns(UserWarning):
        poly = PromptLearnerHook(schedule=dict(type='poly')).param_scheduler
    assert poly == [dict(type='PolyLR', power=0.9, eta_min=0.)]


def test_learned_text_is_in_the_checkpoint(tmp_path, residual):
    """Testing needs neither the vectors' file nor the hook."""
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    provider = run(cfg).model.decode_head.conv_seg.text
    path = tmp_path / 'work' / 'iter_6.pth'
    saved = load(path)['state_dict']
    expected = of_offset(provider, saved[OFFSET])
    assert_close(saved[EMBEDDINGS], expected)
    assert provider.distance_from_start() > 0
    text = {key for key in saved if key.startswith(TEXT)}
    assert text == {EMBEDDINGS, OFFSET, f'{TEXT}started'}
    expected = evaluate(cfg, path, 'whole')
    cfg.pop('custom_hooks')
    gone = dict(file=str(tmp_path / 'gone.safetensors'), dim=16)
    cfg.model.decode_head.text.embeddings.update(gone)
    assert evaluate(cfg, path, 'bare') == expected and 'mIoU' in expected


def kill_and_resume(cfg, whole, at, kind='StopHook'):
    """A run that was killed ends as the whole one, given by its folder."""
    cut = f'{whole}_{kind}{at}'
    resumed = tiny.stop_and_resume(cfg, at, cut, kind)
    a, b = (
        torch.load(f'{folder}/iter_8.pth', weights_only=True)
        for folder in (whole, cut))
    assert a.keys() == b.keys()
    for part in ('state_dict', 'ema_state_dict', 'optimizer',
                 'param_schedulers'):
        assert_equal(a.get(part), b.get(part), part)
    return resumed


AVERAGE = dict(
    type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3)
AMP = {'optim_wrapper.type': 'CPUAmpOptimWrapper'}


@each_case('options, stops', [({}, [2, 4, 6]), (AMP, [6])])
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, residual, options,
                                                   stops):
    """Stopped in stage 1, exactly at the switch, and in stage 2.

    More averages, and accumulation, are in test_training_options.py.
    """
    cfg = tiny_config(tmp_path, residual, dict(switch_at=4), 8, 2, **options)
    if options:
        cfg.custom_hooks.append(dict(AVERAGE, update_buffers=True))
    whole = run(cfg)
    for stop in stops:
        resumed = kill_and_resume(cfg, cfg.work_dir, stop)
        assert resumed.iter == whole.iter == 8
        learns = [[p.requires_grad for p in runner.model.parameters()]
                  for runner in (whole, resumed)]
        assert learns[0] == learns[1]


def test_a_validation_that_was_done_is_not_done_twice(tmp_path, residual):
    """It has been counted by a rate that falls where the score stays."""
    plateau = dict(
        type='ReduceOnPlateauLR',
        monitor='mIoU',
        rule='greater',
        factor=.5,
        patience=0)
    cfg = tiny_config(tmp_path, residual, {}, 8, 2)
    cfg.train_cfg.val_interval = 2
    cfg.train_dataloader.sampler.shuffle = False
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    cfg.param_scheduler = [plateau]
    run(cfg)
    for stop in (3, 5, 7):
        kill_and_resume(cfg, cfg.work_dir, stop)


@each_case('first, then, length, stage', [(.5, .5, 32, 2), (6, 4, 8, 1)])
def test_a_resumed_run_stays_in_its_stage(tmp_path, residual, first, then,
                                          length, stage):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=first), 8, 1)
    tiny.stop(cfg, 5)
    cfg.custom_hooks[0].switch_at = then
    message = f'was stopped in stage {stage}, after 5 iterations'
    with pytest.raises(ValueError, match=message):
        run(cfg, resume=True, **{'train_cfg.max_iters': length})


def test_resume_of_a_run_without_the_hook(tmp_path, residual):
    """Its prompts have not learned: all of it was stage 1."""
    cfg = tiny_config(tmp_path, residual, max_iters=4)
    run(cfg)
    cfg.custom_hooks = [dict(type='PromptLearnerHook', switch_at=2)]
    cfg.resume = True
    message = 'was stopped in stage 1, after 4 iterations'
    with pytest.raises(ValueError, match=message):
        run(cfg, **{'train_cfg.max_iters': 6})
    cfg.custom_hooks[0].switch_at = 5
    _, recorder = record(cfg, **{'train_cfg.max_iters': 6})
    assert [OFFSET in row['learns'] for row in recorder.rows] == [False, True]


def test_norms_without_weights_move_with_what_is_around(tmp_path, residual):
    hook = dict(switch_at=3, learn=['backbone', r'\.text\.'])
    cfg = tiny_config(tmp_path, residual, hook, 6, 1)
    for part in (cfg.model.backbone, cfg.model.decode_head):
        part.norm_cfg = dict(type='BN', affine=False)
    run(cfg)
    before, after = (
        load(tmp_path / f'work/iter_{i}.pth')['state_dict'] for i in (3, 6))
    moved = {
        key.split('.')[0]: not torch.equal(value, after[key])
        for key, value in before.items() if key.endswith('running_mean')
    }
    assert moved['backbone'] and not moved['decode_head']


def test_gradients_that_a_checkpoint_has_not_are_told(tmp_path, residual):
    counts = {'optim_wrapper.accumulative_counts': 2}
    cfg = tiny_config(tmp_path, residual, {}, 6, 3, **counts)
    cfg.log_level = 'WARNING'
    tiny.stop_and_resume(cfg, 5, tmp_path / 'cut')
    assert 'gradients of 1 iteration(s), accumulated over 2' in logs(tmp_path /
                                                                     'cut')


@METRICS.register_module()
class ScoreOfIteration(BaseMetric):
    """A score that depends on the iteration alone."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        # Of the last iteration or, just resumed, of the next one.
        done = MessageHub.get_current_instance().get_info('iter')
        return dict(score=self.scores[(done + 1) // 2 - 1])


def best_config(tmp_path, text, scores):
    """Validated after 2, 4, 6 and 8 iterations, stage 2 from 4 on."""
    cfg = tiny_config(tmp_path, text, dict(switch_at=4, load_best=True), 8, 2)
    cfg.train_cfg.val_interval = 2
    cfg.val_evaluator = dict(type='ScoreOfIteration', scores=scores)
    cfg.default_hooks.checkpoint.update(save_best='score', rule='greater')
    cfg.custom_hooks.append(AVERAGE)
    return cfg


@each_case('scores, best, stops', [
    ([.9, .5, .1, .2], 2, [(3, ), (4, ), (6, )]),
    ([.5, .9, .1, .2], 4, [(4, 'StopInValidation')]),
])
def test_stage_2_from_the_best_checkpoint(tmp_path, residual, scores, best,
                                          stops):
    """Reloaded at the switch and at no resume; stage 1's best is kept."""
    cfg = best_config(tmp_path, residual, scores)
    whole = tmp_path / 'work'
    _, recorder = record(cfg)
    start = load(whole / f'best_score_iter_{best}.pth')['state_dict']
    for key, value in start.items():
        if not key.endswith('started'):
            assert torch.equal(recorder.rows[4]['before'][key], value), key
    assert SCALE in start
    # In the state of the optimizer is what has learned since.
    assert len(load(whole / 'iter_8.pth')['optimizer']['state']) == 3
    # Stage 2 has a best checkpoint of its own.
    names = {f'best_score_iter_{number}.pth' for number in (best, 8)}
    assert {path.name for path in whole.glob('best*')} == names
    for stop in stops:
        kill_and_resume(cfg, whole, *stop)


@each_case('key, value, message', [
    ('default_hooks.checkpoint.save_best', None, 'one best checkpoint.*mIoU'),
    ('train_cfg.val_interval', 5, 'first is at iteration 5.*switch at 4'),
    ('val_evaluator.scores', [float('nan')] * 4, 'no best checkpoint'),
])
def test_no_best_checkpoint(tmp_path, residual, key, value, message):
    cfg = best_config(tmp_path, residual, [.1] * 4)
    cfg.merge_from_dict({key: value})
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(cfg)


def test_ema_is_evaluated_and_saved_with_its_own_text(tmp_path, residual):
    """The averaged parameters and the text must fit each other."""
    cfg = tiny_config(tmp_path, residual, dict(switch_at=2))
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    cfg.custom_hooks.append(dict(type='TextSeenByHook'))
    runner = run(cfg)
    provider = runner.model.decode_head.conv_seg.text
    saved = load(tmp_path / 'work' / 'iter_6.pth')
    averaged, raw = saved['state_dict'], saved['ema_state_dict']
    raw = {k.removeprefix('module.'): v for k, v in raw.items()}
    assert not torch.equal(averaged[OFFSET], raw[OFFSET])
    for state in (averaged, raw, runner.model.state_dict()):
        expected = of_offset(provider, state[OFFSET])
        assert_close(state[EMBEDDINGS], expected)
    hook, = (h for h in runner.hooks if isinstance(h, TextSeenByHook))
    assert_close(hook.seen['val'], averaged[EMBEDDINGS])
    # Tested by a hook in the middle of stage 2, and used by one.
    assert_close(hook.seen['test'], hook.expected['averaged'])
    assert_close(hook.seen['hook'], hook.expected['raw'])


@HOOKS.register_module()
class TextSeenByHook(Hook):
    """Note the text of evaluations, some of them in iteration 5."""

    def __init__(self):
        self.seen, self.expected = {}, {}

    def note(self, runner, name):
        provider = runner.model.decode_head.conv_seg.text
        assert not provider.training
        self.seen[name] = provider().clone()
        return of_offset(provider, provider.offset).detach()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.note(runner, 'val')

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        self.expected['averaged'] = self.note(runner, 'test')

    def after_train_iter(self, runner, **kwargs):
        if runner.iter == 4:
            runner.model.eval()
            self.expected['raw'] = self.note(runner, 'hook')
            runner.model.train()
            runner.test_loop.run()
            runner.model.train()


def test_log_of_the_text(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    hub = run(cfg).message_hub
    stage, drift, scale, mean, closest = (
        hub.get_scalar(f'train/text_{name}').data[0]
        for name in ('stage', 'distance', 'scale', 'cos_mean', 'cos_closest'))
    # At the start, after each iteration and at the switch.
    assert stage.tolist() == [1] * 4 + [2] * 4
    assert drift[:5] == pytest.approx(0, abs=1e-12)
    assert (drift[5:] > 1e-12).all() and drift[7] > drift[5]
    assert scale[-1] != 1 and -1 <= mean[-1] < closest[-1] < 1
    # What the loggers (TensorBoard too) are handed.
    file, = tmp_path.glob('work/*/vis_data/scalars.json')
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if 'loss' in row]
    assert [row['text_stage'] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[-1]['text_distance'] == pytest.approx(drift[-1])
    assert rows[-1]['text_scale'] == scale[-1]


def test_a_frozen_parameter_stays_frozen(tmp_path, residual):
    runner = Runner.from_cfg(
        tiny_config(tmp_path, residual, dict(switch_at=3)))
    recorder, frozen = Recorder(), 'backbone.conv1.weight'
    runner.register_hook(recorder)
    runner.model.get_parameter(frozen).requires_grad_(False)
    runner.train()
    assert len(recorder.rows) == 6
    for i in range(6):
        assert recorder.changed(i) and frozen not in recorder.changed(i)


ONE_RATE = {'optim_wrapper.paramwise_cfg': None}


@each_case('hook, changes, message', [
    (dict(switch_at=-1), {}, 'iteration.*fraction.*got -1'),
    (dict(switch_at=1.5), {}, 'iteration.*fraction.*got 1.5'),
    (dict(switch_at='half'), {}, "iteration.*fraction.*got 'half'"),
    (dict(switch_at=True), {}, 'iteration.*fraction.*got True'),
    (dict(switch_at=0, load_best=True), {}, 'needs a stage 1'),
    (dict(switch_at=6), {}, 'run ends after 6'),
    (dict(switch_at=99), {}, 'start at iteration 99.*ends after 6'),
    (dict(switch_at=5), {
        'optim_wrapper.accumulative_counts': 4
    }, 'start at iteration 8.*ends after 6'),
    (dict(switch_at=3, learn='nothing_like_this'), {},
     "'nothing_like_this'.*matches no parameter"),
    (dict(switch_at=3, learn=['nothing_like_this']), {},
     "'nothing_like_this'.*matches no parameter.*offset"),
    (dict(switch_at=3, learn={'.': -1.}), {}, 'must not be negative'),
    (dict(switch_at=3, learn={'.': 0.}), {}, 'all factors.*are 0'),
    (dict(switch_at=3, param_scheduler=dict(
        type='PolyLR', by_epoch=True)), {}, 'counts iterations.*`by_epoch`'),
    (dict(switch_at=3, learn=dict(offset=1.,
                                  backbone=.1)), ONE_RATE, 'paramwise_cfg'),
    (dict(switch_at=3),
     dict(custom_hooks=[
         dict(type='PromptLearnerHook', switch_at=at) for at in (3, 2)
     ]), '2 PromptLearnerHooks.*Leave one'),
])
def test_bad_plans(tmp_path, residual, hook, changes, message):
    cfg = tiny_config(tmp_path, residual, hook, save_every=1)
    cfg.merge_from_dict(changes)
    with pytest.raises(ValueError, match=message):
        run(cfg)
    assert not list(tmp_path.glob('work/iter_*'))


def test_text_of_other_classes(tmp_path, make_embeddings):
    names = [CLASSES[1], CLASSES[0], *CLASSES[2:]]
    text = dict(type='ClassEmbeddings', file=make_embeddings(8, names=names))
    for text, hook, message in ((text, {}, 'building'),
                                (None, dict(switch_at=3), 'found no text in')):
        with pytest.raises(ValueError, match=message):
            run(tiny_config(tmp_path, text, hook))


def test_optimizers_that_do_not_have_the_prompts(tmp_path, residual):
    """MMEngine leaves what is frozen out of a paramwise optimizer."""
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    runner = Runner.from_cfg(cfg)
    runner.model.get_parameter(OFFSET).requires_grad_(False)
    with pytest.raises(ValueError, match='not in the optimizer'):
        runner.train()
    cfg.experiment_name = f'{tmp_path}_several'
    runner = Runner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper = OptimWrapperDict(model=wrapper)
    runner.param_schedulers = None
    with pytest.raises(ValueError, match='one optimizer.*OptimWrapperDict'):
        runner.train()


def test_accumulation_rounds_the_switch(tmp_path, residual):
    counts = {'optim_wrapper.accumulative_counts': 2}
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3), **counts)
    cfg.param_scheduler = None
    _, recorder = record(cfg)
    stages = [OFFSET in row['learns'] for row in recorder.rows]
    assert stages == [False] * 4 + [True] * 2
    # Without a schedule of the run rates stay.
    assert [row['lr'][SCALE] for row in recorder.rows] == [0.05] * 6


@each_case('kind, saved', [('residual', 2), ('residual', 4), ('context', 2),
                           ('context', 4)])
def test_resume_with_another_text_is_refused(tmp_path, make_embeddings, kind,
                                             saved):
    """In both stages, also of prompts that need a tower to be compared."""
    file = make_embeddings(8, 64, CLASSES)
    text = tiny.residual(file)
    if kind == 'context':
        text = dict(PROMPTS, embeddings=text['embeddings'])
    cfg = tiny_config(tmp_path, text, dict(switch_at=3), save_every=saved)
    tiny.stop(cfg, saved)
    tiny.stop(cfg, saved, resume=True)  # with the same text
    words = [f'no {name}' for name in CLASSES]
    Path(file).unlink()
    encode_classes(
        dict(zip(CLASSES, ([w] for w in words))), 'toyclip',
        'photo').save(file)
    with pytest.raises(ValueError, match='must keep its text'):
        run(cfg, resume=True)


def test_a_run_from_learned_prompts_is_resumed(tmp_path, residual):
    """Its stage 1 is one, though its prompts have learned before it."""
    first = tiny_config(tmp_path, residual, dict(switch_at=2), max_iters=4)
    run(first)
    cfg = tiny_config(tmp_path, residual, dict(switch_at=4), 8, 2)
    cfg.load_from = f'{first.work_dir}/iter_4.pth'
    cfg.param_scheduler = None
    whole = tmp_path / 'whole'
    _, recorder = record(cfg, work_dir=str(whole))
    assert recorder.rows[0]['before'][OFFSET].any()
    stages = [OFFSET in row['learns'] for row in recorder.rows]
    assert stages == [False] * 4 + [True] * 4
    kill_and_resume(cfg, whole, 3)


@each_case('stopped', [2, 4, 6])
def test_context_that_has_learned_before_is_compared(tmp_path, make_embeddings,
                                                     stopped):
    """In the stage 1 of another run, at its switch, and after it."""
    file = make_embeddings(8, 64, CLASSES)
    text = dict(PROMPTS, embeddings=tiny.residual(file)['embeddings'])
    first = tiny_config(tmp_path, text, dict(switch_at=2), max_iters=4)
    run(first)
    cfg = tiny_config(tmp_path, text, dict(switch_at=4), 8, 2)
    cfg.update(
        load_from=f'{first.work_dir}/iter_4.pth', work_dir=f'{tmp_path}/2')
    tiny.stop(cfg, stopped)
    # With the same text.
    tiny.stop(cfg, stopped, resume=True, load_from=None)
    Path(file).unlink()
    encode_classes({
        name: [f'no {name}']
        for name in CLASSES
    }, 'toyclip', 'photo').save(file)
    with pytest.raises(ValueError, match='must keep its text'):
        run(cfg, resume=True, load_from=None)
    # A new run takes the text that its prompts give, from its stage 1 on.
    provider = run(
        cfg, work_dir=f'{tmp_path}/3', **{
            'train_cfg.max_iters': 5
        }).model.decode_head.conv_seg.text
    assert provider.check_loaded(resumed=True) is None


def test_text_without_its_file(tmp_path, residual):
    """Loaded weights fill it in stage 1; stage 2 starts from the file."""
    first = tiny_config(tmp_path, residual, dict(switch_at=2), max_iters=4)
    run(first)
    learned = load(tmp_path / 'work/iter_4.pth')['state_dict'][EMBEDDINGS]
    text = copy.deepcopy(residual)
    text['embeddings'].update(file='/nowhere.safetensors', dim=16)
    cfg = tiny_config(tmp_path, text, {}, 2, log_level='WARNING')
    cfg.update(
        load_from=f'{first.work_dir}/iter_4.pth', work_dir=f'{tmp_path}/2')
    runner = run(cfg)
    assert torch.equal(runner.model.decode_head.conv_seg.text(), learned)
    said = logs(tmp_path / '2')
    assert 'the text is that of the checkpoint' in said
    assert '/nowhere.safetensors' in said
    # As well if the network has been built by hand.
    names = inspect.signature(Runner).parameters
    parts = {key: cfg[key] for key in cfg if key in names}
    parts.update(model=MODELS.build(cfg.model), cfg={}, default_scope='mmseg')
    parts.update(work_dir=f'{tmp_path}/4', experiment_name='by_hand')
    runner = Runner(**parts)
    runner.train()
    assert torch.equal(runner.model.decode_head.conv_seg.text(), learned)
    cfg.custom_hooks[0].switch_at = 1
    cfg.work_dir = f'{tmp_path}/3'
    with pytest.raises(RuntimeError, match="cannot start.*'/nowhere.safeten"):
        run(cfg)
    assert not list(tmp_path.glob('3/iter_*'))


def test_load_from_takes_the_text_of_the_config(tmp_path, residual,
                                                make_embeddings):
    cfg = tiny_config(tmp_path, residual, {}, max_iters=2)
    run(cfg)
    cfg.model.decode_head.text.embeddings.file = make_embeddings(
        8, names=list(CLASSES), seed=1, file='other')
    runner = run(
        cfg, load_from=f'{cfg.work_dir}/iter_2.pth', work_dir=f'{tmp_path}/2')
    provider = runner.model.decode_head.conv_seg.text
    assert_close(provider.class_embeddings, provider.base)


def test_load_from_of_other_classes(tmp_path, residual, make_embeddings):
    """Prompts, biases and classifiers follow the names of their classes."""
    cfg = with_auxiliary_heads(
        tiny_config(tmp_path, residual, dict(switch_at=2), max_iters=4))
    run(cfg)
    cfg.load_from = f'{cfg.work_dir}/iter_4.pth'
    saved = load(cfg.load_from)['state_dict']
    names = [*CLASSES[3:], 'river', CLASSES[0], 'tram', 'bus']
    file = make_embeddings(len(names), names=names, seed=1, file='other')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=names)
    for head in (cfg.model.decode_head, *cfg.model.auxiliary_head):
        head.num_classes = len(names)
        if 'text' in head:
            head.text.embeddings.file = file
    second = tmp_path / 'second'
    runner, recorder = record(cfg, work_dir=str(second), log_level='WARNING')
    start = recorder.rows[0]['before']
    for key in (OFFSET, BIAS, f'{AUXILIARY}text.offset',
                'auxiliary_head.1.conv_seg.weight'):
        assert saved[key].abs().max() > 0 and len(start[key]) == len(names)
        for row, name in zip(start[key], names):
            if name in CLASSES:
                assert torch.equal(row, saved[key][CLASSES.index(name)]), key
            elif 'weight' not in key:  # its start is random
                assert not row.any(), key
    # The vectors are those of the config, for all classes.
    provider = runner.model.decode_head.conv_seg.text
    assert_close(start[EMBEDDINGS], of_offset(provider, start[OFFSET]))
    said = logs(second)
    assert '6 classes were found by name' in said
    assert "begin anew: ['river', 'tram', 'bus']" in said


@each_case('options, message', [
    (dict(model='local-dir:/nowhere'), 'nowhere'),
    (dict(n_ctx=70), 'tokens'),
    (dict(vocabulary=['a']), 'has the classes'),
    (dict(cache_dir='/nowhere', model='ViT-B-16', pretrained='openai'), ''),
])
def test_a_stage_2_that_cannot_be_is_told_before_stage_1(
        tmp_path, make_embeddings, options, message):
    file = make_embeddings(8, 64, CLASSES)
    text = dict(PROMPTS, embeddings=dict(type='ClassEmbeddings', file=file))
    cfg = tiny_config(tmp_path, dict(text, **options), dict(switch_at=3), 4, 1)
    with pytest.raises((ValueError, TextTowerError), match=message):
        run(cfg)
    assert not list(tmp_path.glob('work/iter_*'))


def test_prompts_that_no_loss_reaches_are_told_before_stage_1(
        tmp_path, residual):
    hook = dict(switch_at=3, learn=[r'\.text\.'])
    cfg = tiny_config(tmp_path, residual, hook, 6, 1, log_level='WARNING')
    losses = [
        dict(type='SemanticStructureLoss', min_pixels=1, scale=dict(init=1.))
    ]
    cfg.model.decode_head.update(role='auxiliary', text_losses=losses)
    with pytest.raises(
            ValueError, match="decode_head.*gradient.*'SemanticStructure"):
        run(cfg)
    assert not list(tmp_path.glob('work/iter_*'))
    # Where something else learns, it is only said.
    cfg.custom_hooks[0].learn = None
    runner = run(cfg)
    assert not runner.model.decode_head.text_branch.text.offset.any()
    said = 'will learn nothing in stage 2: no gradient'
    assert said in logs(tmp_path)
    losses.append(dict(type='TextAlignmentLoss'))
    cfg.model.decode_head.text_losses = losses
    runner = run(cfg, work_dir=str(tmp_path / 'more'))
    assert runner.model.decode_head.text_branch.text.offset.any()
    assert said not in logs(tmp_path / 'more')


@each_case('learn, heads', [(None, False), (None, True),
                            ({
                                r'\.text\.': 1.,
                                '.': .1
                            }, False)])
def test_auxiliary_role(tmp_path, residual, learn, heads):
    """A frozen network makes its stage 2 idle, which is said.

    Text on auxiliary heads learns nothing for a decode head that rests.
    """
    cfg = tiny_config(tmp_path, residual, dict(switch_at=4, learn=learn))
    cfg.model.decode_head.role, cfg.log_level = 'auxiliary', 'WARNING'
    _, recorder = record(with_auxiliary_heads(cfg) if heads else cfg)
    offset = 'decode_head.text_branch.text.offset'
    scale = 'decode_head.text_losses.0.scale.log_scale'
    classifier = 'decode_head.conv_seg.weight'
    assert {scale, classifier} <= recorder.changed(0)
    assert {offset, scale} <= recorder.changed(4)
    assert (classifier in recorder.changed(4)) == (learn is not None)
    idle = 'nothing that is deployed learns' in logs(tmp_path)
    assert idle == (learn is None)


@MODELS.register_module()
class PiecewiseSegmentor(EncoderDecoder):
    """It calls the parts of a head, as some projects do."""

    def loss(self, inputs, data_samples):
        logits = self.decode_head(self.extract_feat(inputs))
        return self.decode_head.loss_by_feat(logits, data_samples)


@each_case('role', ['auxiliary', 'classifier'])
def test_text_losses_that_nobody_computes(tmp_path, residual, role):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3), save_every=1)
    cfg.model.type, cfg.model.decode_head.role = 'PiecewiseSegmentor', role
    if role == 'classifier':  # which learns by the head's own losses
        assert run(cfg).iter == 6
        return
    with pytest.raises(
            RuntimeError, match='PiecewiseSegmentor.*call `decode_head.loss`'):
        run(cfg)
    assert not list(tmp_path.glob('work/iter_2.pth'))


AUXILIARY = 'auxiliary_head.0.conv_seg.'


def with_auxiliary_heads(cfg):
    """Put text on one of two auxiliary heads, as the guide does."""
    text = copy.deepcopy(cfg.model.decode_head)
    text.pop('role', None)
    stock = dict(text, type='FCNHead')
    stock.pop('text')
    cfg.model.auxiliary_head = [text, stock]
    return cfg


def test_text_on_auxiliary_heads(tmp_path, residual):
    """Each head learns prompts of its own, in both stages and the log."""
    cfg = with_auxiliary_heads(
        tiny_config(tmp_path, residual, dict(switch_at=3, log_interval=1)))
    runner, recorder = record(cfg)
    prompts = {OFFSET, f'{AUXILIARY}text.offset'}
    own = {f'{AUXILIARY}{name}' for name in ('scale.log_scale', 'logit_bias')}
    stage2 = prompts | own | {SCALE, BIAS}
    stage1 = {n for n, _ in runner.model.named_parameters()} - prompts
    learns = [row['learns'] for row in recorder.rows]
    assert learns == [stage1] * 3 + [stage2] * 3
    assert stage2 <= recorder.changed(4)
    heads = [runner.model.decode_head, runner.model.auxiliary_head[0]]
    texts = [head.text_branch.text for head in heads]
    assert not torch.equal(*(text.offset for text in texts))
    path = tmp_path / 'work' / 'iter_6.pth'
    saved = load(path)['state_dict']
    for i, (head, text) in enumerate(zip(heads, texts)):
        scale, drift = (
            runner.message_hub.get_scalar(f'train/text_{name}{i or ""}')
            for name in ('scale', 'distance'))
        assert scale.current() == head.text_branch.scale().item() != 1
        assert drift.current() == pytest.approx(
            text.distance_from_start()) != 0
        # The checkpoint has the text of both.
        key = (TEXT, f'{AUXILIARY}text.')[i]
        assert_close(saved[f'{key}class_embeddings'],
                     of_offset(text, saved[f'{key}offset']))
    # Without the auxiliary heads, which do not run at inference, it predicts
    # the same.
    expected = evaluate(cfg, path, 'auxiliary')
    auxiliary = cfg.model.pop('auxiliary_head')
    cfg.pop('custom_hooks')
    assert evaluate(cfg, path, 'nothing') == expected and 'mIoU' in expected
    # Each folds as the decode head does.
    for head in heads:
        head.conv_seg = head.conv_seg.as_conv()
    cfg.model.auxiliary_head = auxiliary
    for head in (cfg.model.decode_head, auxiliary[0]):
        head.update(type='FCNHead')
        head.pop('text')
    stock = MODELS.build(cfg.model)
    stock.load_state_dict(runner.model.state_dict(), strict=True)
