# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The hook in real, tiny runs."""
import ast
import copy
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
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
from tiny import CLASSES, StopHook, assert_equal, run, tiny_config

from mmseg_textkd.engine import PromptLearnerHook


@HOOKS.register_module()
class Recorder(Hook):
    """Note the state of the run in each iteration."""
    priority = 'LOWEST'

    def __init__(self):
        self.rows = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = getattr(runner.model, 'module', runner.model)
        groups = runner.optim_wrapper.param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        self.rows.append(
            dict(
                iter=runner.iter,
                learns={
                    n
                    for n, p in model.named_parameters() if p.requires_grad
                },
                before=copy.deepcopy(model.state_dict()),
                lr={
                    names[id(g['params'][0])]: g['lr']
                    for g in groups if g['params']
                }))

    def after_train_iter(self, runner, outputs, **kwargs):
        model = getattr(runner.model, 'module', runner.model)
        self.rows[-1]['after'] = copy.deepcopy(model.state_dict())
        self.rows[-1]['outer_lr'] = [
            g['lr'] for g in runner.optim_wrapper.param_groups
        ]

    def changed(self, i):
        """Names of what changed in iteration i."""
        row = self.rows[i]
        return {
            k
            for k, v in row['before'].items()
            if not torch.equal(v, row['after'][k])
        }


@pytest.fixture
def residual(make_embeddings):
    return tiny.residual(make_embeddings(8, names=list(CLASSES)))


def record(cfg, **changes):
    cfg = cfg.copy()
    cfg.merge_from_dict(changes)
    cfg.custom_hooks = list(cfg.custom_hooks) + [dict(type='Recorder')]
    runner = run(cfg)
    return runner, next(h for h in runner.hooks if isinstance(h, Recorder))


OFFSET = 'decode_head.conv_seg.text.offset'
SCALE = 'decode_head.conv_seg.scale.log_scale'
BIAS = 'decode_head.conv_seg.logit_bias'


def test_what_learns_in_each_stage(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=4 / 6))
    runner, recorder = record(cfg)
    everything = {n for n, _ in runner.model.named_parameters()}
    assert [row['iter'] for row in recorder.rows] == list(range(6))
    for row in recorder.rows[:4]:
        assert row['learns'] == everything - {OFFSET}
    for row in recorder.rows[4:]:
        assert row['learns'] == {OFFSET, SCALE, BIAS}
    # What learns is what changes: statistics of batch norms are frozen too.
    network = {
        SCALE, BIAS, 'decode_head.conv_seg.projection.conv.weight',
        'decode_head.convs.0.conv.weight', 'backbone.conv1.weight'
    }
    for i in (0, 3):
        assert network <= recorder.changed(i)
        assert OFFSET not in recorder.changed(i)
        assert any('running_mean' in k for k in recorder.changed(i))
    for i in (4, 5):
        # The embeddings are brought up to date for the checkpoint.
        embeddings = {OFFSET.replace('offset', 'class_embeddings')}
        assert recorder.changed(i) - embeddings == {OFFSET, SCALE, BIAS}


def test_no_stage_2_by_default(tmp_path, residual):
    runner, recorder = record(tiny_config(tmp_path, residual, dict()))
    assert all(OFFSET not in row['learns'] for row in recorder.rows)
    assert runner.message_hub.get_scalar('train/text_stage').current() == 1


def test_learned_embeddings_are_weights_of_the_network(tmp_path):
    """They learn in stage 1, without decay, and go through a resume."""
    vectors = 'decode_head.conv_seg.text.vectors'
    text = dict(type='LearnedEmbeddings', dim=16)
    cfg = tiny_config(tmp_path, text, {}, save_every=3)
    runner, recorder = record(cfg)
    for i, row in enumerate(recorder.rows):
        assert vectors in row['learns'] and vectors in recorder.changed(i)
    [own] = [
        g for g in runner.optim_wrapper.param_groups if any(
            p is runner.model.get_parameter(vectors) for p in g['params'])
    ]
    assert own['weight_decay'] == 0
    whole = runner.model.state_dict()
    saved = load(f'{cfg.work_dir}/iter_6.pth')['state_dict']
    rows = torch.nn.functional.normalize(whole[vectors], dim=1)
    torch.testing.assert_close(
        saved[vectors.replace('vectors', 'class_embeddings')], rows)
    # From the third iteration on again, with another seed of everything.
    runner = run(cfg, resume=True, load_from=f'{cfg.work_dir}/iter_3.pth')
    assert_equal(runner.model.state_dict(), whole)


def test_stage_2_as_a_run_of_its_own(tmp_path, residual):
    """From a checkpoint of stage 1, in which the text was fixed."""
    stage1 = tiny_config(tmp_path, residual['embeddings'], dict(), max_iters=2)
    stage1.work_dir = str(tmp_path / 'stage1')
    run(stage1)
    path = str(tmp_path / 'stage1' / 'iter_2.pth')
    for name, load_from in (('warned', None), ('stage2', path)):
        cfg = tiny_config(
            tmp_path,
            residual,
            dict(switch_at=0),
            max_iters=2,
            log_level='WARNING')
        cfg.work_dir, cfg.load_from = str(tmp_path / name), load_from
        _, recorder = record(cfg)
        assert all(row['learns'] == {OFFSET, SCALE, BIAS}
                   for row in recorder.rows)
        # By the schedule of the run, PolyLR from 0.05 to 1e-4.
        assert [row['lr'][SCALE]
                for row in recorder.rows] == pytest.approx([.05, 1e-4])
        log, = tmp_path.glob(f'{name}/*/*.log')
        assert ("without stage 1's weights" in log.read_text()) == (
            load_from is None)
    saved = load(path)['state_dict']
    assert SCALE in saved and OFFSET not in saved
    for key, value in saved.items():
        assert torch.equal(recorder.rows[0]['before'][key], value), key


ROOT = Path(__file__).parents[2]
STDC = dict(
    type='STDCContextPathNet',
    backbone_cfg=dict(
        type='STDCNet',
        stdc_type='STDCNet1',
        in_channels=3,
        channels=(8, 8, 16, 16, 16),
        bottleneck_type='cat',
        num_convs=4,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'),
        with_final_conv=False),
    last_in_channels=(16, 16),
    out_channels=8,
    ffm_cfg=dict(in_channels=24, out_channels=8, scale_factor=4))


def documented_variants():
    """Read `learn` of the published variants out of the guide."""
    page = ROOT / 'docs/en/user_guides/training.md'
    rows = re.findall(r'^\| `(\w+)`[^|]*\| [^|]+ \| `([\[{].+[\]}])` \|$',
                      page.read_text(), re.M)
    return {name: ast.literal_eval(learn) for name, learn in rows}


def test_stage_2_as_published(tmp_path):
    """What learns, and whose batch norm statistics move."""
    text = dict(
        type='ContextPromptLearner',
        embeddings=dict(type='ControlEmbeddings', kind='random', dim=64),
        model='toyclip',
        token_dim=64,
        context_length=9,
        class_specific=True,
        suffix='',
        vocabulary=list(CLASSES))
    base = tiny_config(tmp_path, max_iters=2)
    base.model.update(
        type='TextKD',
        score_map=dict(in_channels=16, projection=True, text=text),
        auxiliary_head=dict(base.model.decode_head, in_index=2))
    base.model.backbone = STDC
    base.model.decode_head.in_index = 3
    variants = documented_variants()
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
        cfg = copy.deepcopy(base)
        cfg.custom_hooks = [
            dict(
                type='PromptLearnerHook',
                switch_at=1,
                learn=variants[name],
                freeze_norm=freeze_norm)
        ]
        runner, recorder = record(cfg)
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
    hook = dict(
        switch_at=2,
        learn={
            r'\.text\.': 2.0,
            'backbone': 0.1,
            'log_scale': 1.0
        },
        param_scheduler=[warmup, decay])
    cfg = tiny_config(tmp_path, residual, hook)
    _, recorder = record(cfg)
    backbone = 'backbone.conv1.weight'
    for name, rate in ((OFFSET, 0.1), (backbone, 0.005), (SCALE, 0.05)):
        lrs = [row['lr'][name] for row in recorder.rows[2:]]
        # Half, full, (1 - 1 / 2)^2 of what is above eta_min, eta_min; the
        # factor is on all of it.
        base, least = 0.05, 1e-3
        factor = rate / base
        assert lrs == pytest.approx([
            rate / 2, rate, factor * (least + (base - least) / 4),
            factor * least
        ])
    stock = tiny_config(tmp_path, residual, dict())
    _, reference = record(stock)
    for row, other in zip(recorder.rows, reference.rows):
        assert row['outer_lr'] == other['outer_lr']
    # The backbone learns on, with its statistics; the head is frozen.
    changed = recorder.changed(5)
    assert backbone in changed and BIAS not in changed
    assert any('backbone' in k and 'running_mean' in k for k in changed)
    assert not any(k.startswith('decode_head.convs') for k in changed)


def test_the_old_schedule_is_still_read(tmp_path, residual):
    """Its values, by hand: cosine from 1 to 0 and a rise over two steps."""
    with pytest.warns(UserWarning, match='`schedule`.*`param_scheduler`'):
        cfg = tiny_config(
            tmp_path, residual,
            dict(switch_at=2, schedule=dict(type='cosine', warmup_iters=2)))
        _, recorder = record(cfg)
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
    runner = run(cfg)
    provider = runner.model.decode_head.conv_seg.text
    path = str(tmp_path / 'work' / 'iter_6.pth')
    saved = torch.load(path, weights_only=True)['state_dict']
    key = 'decode_head.conv_seg.text.class_embeddings'
    expected = torch.nn.functional.normalize(
        provider.base + 0.5 * saved[OFFSET], dim=1)
    torch.testing.assert_close(saved[key], expected)
    assert provider.distance_from_start() > 0
    assert {k
            for k in saved if '.text.' in k
            } == {key, OFFSET, 'decode_head.conv_seg.text.started'}
    bare = cfg.copy()
    bare.pop('custom_hooks')
    text = bare.model.decode_head.text.embeddings
    text.update(file=str(tmp_path / 'gone.safetensors'), dim=16)
    metrics = []
    for config in (cfg, bare):
        config = config.copy()
        config.update(load_from=path, experiment_name=f't{len(metrics)}')
        metrics.append(Runner.from_cfg(config).test())
    assert metrics[0] == metrics[1] and 'mIoU' in metrics[0]


def same_state(path_a, path_b):
    a, b = (torch.load(p, weights_only=True) for p in (path_a, path_b))
    assert a.keys() == b.keys()
    for part in ('state_dict', 'ema_state_dict', 'optimizer',
                 'param_schedulers'):
        assert_equal(a.get(part), b.get(part), part)


@each_case(
    'options, average, stops',
    [
        ({}, False, [2, 4, 6]),
        # Other averages, and accumulation: test_training_options.py.
        ({}, True, [6]),
        ({
            'optim_wrapper.type': 'CPUAmpOptimWrapper'
        }, False, [6]),
    ])
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, residual, options,
                                                   average, stops):
    """Stopped in stage 1, exactly at the switch, and in stage 2."""
    cfg = tiny_config(
        tmp_path, residual, dict(switch_at=4), max_iters=8, **options)
    cfg.default_hooks.checkpoint.interval = 2
    if average:
        cfg.custom_hooks.append(
            dict(
                type='EMAHook',
                ema_type='ExponentialMovingAverage',
                momentum=0.3,
                update_buffers=True))
    whole = run(cfg, work_dir=str(tmp_path / 'whole'))
    for stop in stops:
        killed = cfg.copy()
        killed.work_dir = str(tmp_path / f'killed{stop}')
        first = killed.copy()
        first.custom_hooks = list(
            first.custom_hooks) + [dict(type='StopHook', at=stop)]
        with pytest.raises(KeyboardInterrupt):
            run(first)
        resumed = run(killed, resume=True)
        assert resumed.iter == whole.iter == 8
        for a, b in zip(whole.model.named_parameters(),
                        resumed.model.named_parameters()):
            assert a[0] == b[0] and a[1].requires_grad == b[1].requires_grad
        same_state(
            str(tmp_path / 'whole' / 'iter_8.pth'),
            str(tmp_path / f'killed{stop}' / 'iter_8.pth'))


@HOOKS.register_module()
class StopInValidation(StopHook):
    """Stop it in the validation before that iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        pass

    def before_val_epoch(self, runner):
        super().before_train_iter(runner, 0)


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


def best_config(tmp_path, text, scores, **hook):
    """Validated after 2, 4, 6 and 8 iterations, stage 2 from 4 on."""
    cfg = tiny_config(
        tmp_path, text, dict(switch_at=4, load_best=True, **hook), max_iters=8)
    cfg.train_cfg.val_interval = 2
    cfg.val_evaluator = dict(type='ScoreOfIteration', scores=scores)
    cfg.default_hooks.checkpoint.update(
        interval=2, save_best='score', rule='greater')
    cfg.custom_hooks.append(
        dict(
            type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3))
    return cfg


@each_case('scores, best, stops', [
    ([.9, .5, .1, .2], 2, [('StopHook', 3), ('StopHook', 4), ('StopHook', 6)]),
    ([.5, .9, .1, .2], 4, [('StopInValidation', 4)]),
])
def test_stage_2_from_the_best_checkpoint(tmp_path, residual, scores, best,
                                          stops):
    """Reloaded at the switch and at no resume; stage 1's best is kept."""
    cfg = best_config(tmp_path, residual, scores)
    _, recorder = record(cfg, work_dir=str(tmp_path / 'whole'))
    start = load(tmp_path / 'whole' / f'best_score_iter_{best}.pth')
    for key, value in start['state_dict'].items():
        if not key.endswith('started'):
            assert torch.equal(recorder.rows[4]['before'][key], value), key
    assert SCALE in start['state_dict']
    # In the state of the optimizer is what has learned since.
    end = load(tmp_path / 'whole' / 'iter_8.pth')
    assert len(end['optimizer']['state']) == 3
    # Stage 2 has a best checkpoint of its own.
    assert sorted(p.name
                  for p in (tmp_path / 'whole').glob('best*')) == sorted(
                      [f'best_score_iter_{best}.pth', 'best_score_iter_8.pth'])
    for kind, at in stops:
        killed = cfg.copy()
        killed.work_dir = str(tmp_path / f'{kind}{at}')
        first = killed.copy()
        first.custom_hooks = list(
            first.custom_hooks) + [dict(type=kind, at=at)]
        with pytest.raises(KeyboardInterrupt):
            run(first)
        run(killed, resume=True)
        same_state(
            str(tmp_path / 'whole' / 'iter_8.pth'),
            f'{killed.work_dir}/iter_8.pth')


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
    cfg.custom_hooks += [
        dict(type='EMAHook', momentum=0.3),
        dict(type='TextSeenInValidation')
    ]
    runner = run(cfg)
    saved = torch.load(
        str(tmp_path / 'work' / 'iter_6.pth'), weights_only=True)
    base = runner.model.decode_head.conv_seg.text.base
    key = 'decode_head.conv_seg.text.class_embeddings'

    def of(offset):
        return torch.nn.functional.normalize(base + 0.5 * offset, dim=1)

    averaged, raw = saved['state_dict'], saved['ema_state_dict']
    assert not torch.equal(averaged[OFFSET], raw['module.' + OFFSET])
    torch.testing.assert_close(averaged[key], of(averaged[OFFSET]))
    torch.testing.assert_close(raw['module.' + key],
                               of(raw['module.' + OFFSET]))
    seen = next(
        h for h in runner.hooks if isinstance(h, TextSeenInValidation)).seen
    torch.testing.assert_close(seen, averaged[key])
    provider = runner.model.decode_head.conv_seg.text
    torch.testing.assert_close(provider.class_embeddings, of(provider.offset))


@HOOKS.register_module()
class TextSeenInValidation(Hook):
    """Note the text with which validation is run."""

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.seen = runner.model.decode_head.conv_seg.text().clone()


def test_log_of_the_text(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3, log_interval=1))
    hub = run(cfg).message_hub
    # At the start, after each iteration and at the switch.
    stage = hub.get_scalar('train/text_stage').data[0]
    assert stage.tolist() == [1] * 4 + [2] * 4
    drift = hub.get_scalar('train/text_distance').data[0]
    assert drift[:5] == pytest.approx(0, abs=1e-12)
    assert (drift[5:] > 1e-12).all() and drift[7] > drift[5]
    assert hub.get_scalar('train/text_scale').current() != 1
    mean = hub.get_scalar('train/text_cos_mean').current()
    closest = hub.get_scalar('train/text_cos_closest').current()
    assert -1 <= mean < closest < 1
    # What the loggers (TensorBoard too) are handed.
    file, = tmp_path.glob('work/*/vis_data/scalars.json')
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if 'loss' in row]
    assert [row['text_stage'] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[-1]['text_distance'] == pytest.approx(drift[-1])
    assert rows[-1]['text_scale'] == hub.get_scalar(
        'train/text_scale').current()


def test_a_frozen_parameter_stays_frozen(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    cfg.custom_hooks.append(dict(type='Recorder'))
    runner = Runner.from_cfg(cfg)
    frozen = 'backbone.conv1.weight'
    runner.model.get_parameter(frozen).requires_grad_(False)
    runner.train()
    recorder = next(h for h in runner.hooks if isinstance(h, Recorder))
    assert len(recorder.rows) == 6
    for i in range(6):
        assert recorder.changed(i) and frozen not in recorder.changed(i)


@each_case('hook, message', [
    (dict(switch_at=-1), 'iteration.*fraction.*got -1'),
    (dict(switch_at=1.5), 'iteration.*fraction.*got 1.5'),
    (dict(switch_at='half'), "iteration.*fraction.*got 'half'"),
    (dict(switch_at=True), 'iteration.*fraction.*got True'),
    (dict(switch_at=0, load_best=True), 'needs a stage 1'),
    (dict(switch_at=6), 'run ends after 6'),
    (dict(switch_at=99), 'start at iteration 99.*ends after 6'),
    (dict(switch_at=3, learn=['nothing_like_this']),
     "'nothing_like_this'.*matches no parameter.*offset"),
    (dict(switch_at=3, learn={'.': -1.}), 'must not be negative'),
    (dict(switch_at=3, learn={'.': 0.}), 'all factors.*are 0'),
    (dict(switch_at=3, param_scheduler=dict(
        type='PolyLR', by_epoch=True)), 'counts iterations.*`by_epoch`'),
])
def test_bad_plans(tmp_path, residual, hook, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_config(tmp_path, residual, hook, save_every=1))
    assert not list(tmp_path.glob('work/iter_*'))


def test_a_model_without_text(tmp_path):
    with pytest.raises(ValueError, match='found no text in the model'):
        run(tiny_config(tmp_path, None, dict(switch_at=3)))


def test_a_parameter_missing_from_the_optimizer(tmp_path, residual):
    """MMEngine leaves what is frozen out of a paramwise optimizer."""
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    runner = Runner.from_cfg(cfg)
    runner.model.get_parameter(OFFSET).requires_grad_(False)
    with pytest.raises(ValueError, match='not in the optimizer'):
        runner.train()


def test_several_optimizers_are_refused(tmp_path, residual):
    runner = Runner.from_cfg(
        tiny_config(tmp_path, residual, dict(switch_at=3)))
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper = OptimWrapperDict(model=wrapper)
    runner.param_schedulers = None
    with pytest.raises(ValueError, match='one optimizer.*OptimWrapperDict'):
        runner.train()


def test_without_a_schedule_of_the_run(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    cfg.param_scheduler = None
    _, recorder = record(cfg)
    assert [row['lr'][SCALE] for row in recorder.rows] == [0.05] * 6


def test_one_group_for_different_rates(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual,
                      dict(switch_at=3, learn={
                          'offset': 1.,
                          'backbone': .1
                      }))
    cfg.optim_wrapper.pop('paramwise_cfg')
    with pytest.raises(ValueError, match='paramwise_cfg'):
        run(cfg)


def test_text_of_other_classes(tmp_path, make_embeddings):
    names = list(CLASSES)
    names[0], names[1] = names[1], names[0]
    text = dict(type='ClassEmbeddings', file=make_embeddings(8, names=names))
    with pytest.raises(ValueError, match='building'):
        run(tiny_config(tmp_path, text, dict()))


def test_resume_with_another_text_is_refused(tmp_path, residual,
                                             make_embeddings):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3), save_every=4)
    run(cfg, **{'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4})
    make_embeddings(8, names=list(CLASSES), seed=1)  # the same file
    with pytest.raises(ValueError, match='must keep its text'):
        run(cfg, resume=True)


def test_load_from_takes_the_text_of_the_config(tmp_path, residual,
                                                make_embeddings):
    cfg = tiny_config(tmp_path, residual, dict(), max_iters=2)
    run(cfg)
    other = make_embeddings(8, names=list(CLASSES), seed=1, file='other')
    cfg.model.decode_head.text.embeddings.file = other
    runner = run(
        cfg,
        load_from=str(tmp_path / 'work' / 'iter_2.pth'),
        work_dir=str(tmp_path / 'second'))
    provider = runner.model.decode_head.conv_seg.text
    torch.testing.assert_close(provider.class_embeddings, provider.base)


def test_load_from_of_other_classes(tmp_path, residual, make_embeddings):
    """Prompts, biases and classifiers follow the names of their classes."""
    cfg = with_auxiliary_heads(
        tiny_config(tmp_path, residual, dict(switch_at=2), max_iters=4))
    run(cfg)
    saved = load(tmp_path / 'work' / 'iter_4.pth')['state_dict']
    names = [*CLASSES[3:], 'river', CLASSES[0], 'tram', 'bus']
    cfg.train_dataloader.dataset.metainfo = dict(classes=names)
    cfg.val_dataloader.dataset.metainfo = dict(classes=names)
    for head in (cfg.model.decode_head, *cfg.model.auxiliary_head):
        head.num_classes = len(names)
        if 'text' in head:
            head.text.embeddings.file = make_embeddings(
                len(names), names=names, seed=1, file='other')
    cfg.load_from = str(tmp_path / 'work' / 'iter_4.pth')
    cfg.work_dir, cfg.log_level = str(tmp_path / 'second'), 'WARNING'
    cfg.experiment_name = tmp_path.name
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Recorder())
    runner.train()
    recorder = next(h for h in runner.hooks if isinstance(h, Recorder))
    start = recorder.rows[0]['before']
    own = [CLASSES.index(n) if n in CLASSES else None for n in names]
    for key in (OFFSET, BIAS, f'{AUXILIARY}text.offset',
                'auxiliary_head.1.conv_seg.weight'):
        assert saved[key].abs().max() > 0 and len(start[key]) == len(names)
        for row, k in zip(start[key], own):
            if k is not None:
                assert torch.equal(row, saved[key][k]), key
            elif 'weight' not in key:  # its start is random
                assert not row.any(), key
    # The vectors are those of the config, for all classes.
    provider = runner.model.decode_head.conv_seg.text
    torch.testing.assert_close(
        start[OFFSET.replace('offset', 'class_embeddings')],
        torch.nn.functional.normalize(
            provider.base + .5 * start[OFFSET], dim=1))
    logs = ''.join(p.read_text() for p in (tmp_path / 'second').rglob('*.log'))
    assert '6 classes were found by name' in logs
    assert "begin anew: ['river', 'tram', 'bus']" in logs


def test_accumulation_rounds_the_switch(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3),
                      **{'optim_wrapper.accumulative_counts': 2})
    _, recorder = record(cfg)
    stages = [OFFSET in row['learns'] for row in recorder.rows]
    assert stages == [False] * 4 + [True] * 2


@each_case('learn', [None, {r'\.text\.': 1., '.': .1}])
def test_auxiliary_role(tmp_path, residual, learn):
    """A frozen network makes its stage 2 idle, which is said."""
    cfg = tiny_config(
        tmp_path,
        residual,
        dict(switch_at=4, learn=learn),
        log_level='WARNING',
        **{'model.decode_head.role': 'auxiliary'})
    _, recorder = record(cfg)
    offset = 'decode_head.text_branch.text.offset'
    scale = 'decode_head.text_losses.0.scale.log_scale'
    classifier = 'decode_head.conv_seg.weight'
    assert {scale, classifier} <= recorder.changed(0)
    assert {offset, scale} <= recorder.changed(4)
    assert (classifier in recorder.changed(4)) == (learn is not None)
    log, = tmp_path.glob('work/*/*.log')
    assert ('nothing that is deployed learns' in log.read_text()) == (
        learn is None)


@MODELS.register_module()
class PiecewiseSegmentor(EncoderDecoder):
    """It calls the parts of a head, as some projects do."""

    def loss(self, inputs, data_samples):
        logits = self.decode_head(self.extract_feat(inputs))
        return self.decode_head.loss_by_feat(logits, data_samples)


@each_case('role', ['auxiliary', 'classifier'])
def test_text_losses_that_nobody_computes(tmp_path, residual, role):
    cfg = tiny_config(
        tmp_path,
        residual,
        dict(switch_at=3),
        save_every=1,
        **{'model.decode_head.role': role})
    cfg.model.type = 'PiecewiseSegmentor'
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
    stock = dict(cfg.model.decode_head, type='FCNHead')
    for key in ('text', 'role'):
        stock.pop(key, None)
    text = dict(
        stock,
        type='TextFCNHead',
        text=copy.deepcopy(cfg.model.decode_head.text))
    cfg.model.auxiliary_head = [text, stock]
    return cfg


def test_text_on_auxiliary_heads(tmp_path, residual):
    """Each head learns prompts of its own, in both stages and the log."""
    cfg = with_auxiliary_heads(
        tiny_config(tmp_path, residual, dict(switch_at=3, log_interval=1)))
    runner, recorder = record(cfg)
    prompts = {OFFSET, f'{AUXILIARY}text.offset'}
    own = {
        SCALE, BIAS, f'{AUXILIARY}scale.log_scale', f'{AUXILIARY}logit_bias'
    }
    everything = {n for n, _ in runner.model.named_parameters()}
    assert [row['learns'] for row in recorder.rows
            ] == [everything - prompts] * 3 + [prompts | own] * 3
    assert prompts | own <= recorder.changed(4)
    heads = [runner.model.decode_head, runner.model.auxiliary_head[0]]
    offsets = [head.text_branch.text.offset for head in heads]
    assert not torch.equal(*offsets)
    hub = runner.message_hub
    for i, head in enumerate(heads):
        scale = hub.get_scalar(f'train/text_scale{i or ""}').current()
        assert scale == head.text_branch.scale().item() != 1
        drift = hub.get_scalar(f'train/text_distance{i or ""}').current()
        assert drift == pytest.approx(
            head.text_branch.text.distance_from_start()) != 0
    # The checkpoint has the text of both; without the auxiliary heads, which
    # do not run at inference, it predicts the same.
    path = tmp_path / 'work' / 'iter_6.pth'
    saved = load(path)['state_dict']
    for name in (OFFSET, f'{AUXILIARY}text.offset'):
        provider = runner.model.get_submodule(name[:-len('.offset')])
        torch.testing.assert_close(
            saved[name.replace('offset', 'class_embeddings')],
            torch.nn.functional.normalize(
                provider.base + 0.5 * saved[name], dim=1))
    metrics = []
    for keep in ('auxiliary_head', 'nothing'):
        test = copy.deepcopy(cfg)
        test.update(load_from=str(path), experiment_name=f'a{keep}')
        test.pop('custom_hooks')
        if keep == 'nothing':
            test.model.pop('auxiliary_head')
        metrics.append(Runner.from_cfg(test).test())
    assert metrics[0] == metrics[1] and 'mIoU' in metrics[0]
    # Each folds as the decode head does.
    model = runner.model.eval()
    for head in heads:
        head.conv_seg = head.conv_seg.as_conv()
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head[0]):
        head.update(type='FCNHead')
        head.pop('text')
    stock = MODELS.build(cfg.model)
    stock.load_state_dict(model.state_dict(), strict=True)


def test_auxiliary_heads_are_not_deployed(tmp_path, residual):
    """Text there learns nothing for a decode head that rests."""
    cfg = with_auxiliary_heads(
        tiny_config(
            tmp_path,
            residual,
            dict(switch_at=4),
            log_level='WARNING',
            **{'model.decode_head.role': 'auxiliary'}))
    run(cfg)
    log, = tmp_path.glob('work/*/*.log')
    assert 'nothing that is deployed learns' in log.read_text()


def test_several_hooks_are_refused(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    cfg.custom_hooks.append(dict(type='PromptLearnerHook', switch_at=2))
    with pytest.raises(ValueError, match='2 PromptLearnerHooks.*Leave one'):
        run(cfg)
    assert not list(tmp_path.glob('work/*.pth'))
