# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The hook in real, tiny runs."""
import copy
import json

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmseg.registry import HOOKS, MODELS
from processes import load
from tiny import CLASSES, assert_equal, run, tiny_config

from mmseg_textkd.engine.stages import StageSchedule


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

    def after_train_iter(self,
                         runner,
                         batch_idx,
                         data_batch=None,
                         outputs=None):
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
    return dict(
        type='ResidualPromptLearner',
        embeddings=dict(
            type='ClassEmbeddings',
            file=make_embeddings(8, names=list(CLASSES))))


def record(cfg, **changes):
    cfg = cfg.copy()
    cfg.merge_from_dict(changes)
    cfg.custom_hooks = list(cfg.custom_hooks) + [dict(type='Recorder')]
    runner = run(cfg)
    return runner, next(h for h in runner.hooks if isinstance(h, Recorder))


OFFSET = 'decode_head.conv_seg.text.offset'
SCALE = 'decode_head.conv_seg.scale.log_scale'
BIAS = 'decode_head.conv_seg.logit_bias'


@pytest.mark.parametrize('switch_at', [4, 4 / 6])
def test_what_learns_in_each_stage(tmp_path, residual, switch_at):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=switch_at))
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
        'decode_head.convs.0.conv.weight',
        'backbone.detail.detail_branch.0.0.conv.weight'
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
    cfg = tiny_config(tmp_path, dict(type='LearnedEmbeddings', dim=16), {})
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


def test_stage_2_from_the_start(tmp_path, residual):
    _, recorder = record(tiny_config(tmp_path, residual, dict(switch_at=0)))
    assert all(row['learns'] == {OFFSET, SCALE, BIAS} for row in recorder.rows)


def test_rates_of_stage_2(tmp_path, residual):
    """Base rate x factor x schedule; the run's schedule goes on below."""
    hook = dict(
        switch_at=3,
        learn={
            r'\.text\.': 2.0,
            'backbone': 0.1,
            'log_scale': 1.0
        },
        schedule=dict(type='cosine', warmup_iters=2))
    cfg = tiny_config(tmp_path, residual, hook)
    _, recorder = record(cfg)
    backbone = next(n for n in recorder.rows[0]['learns'] if 'backbone' in n)
    schedule = StageSchedule('cosine', 2)
    for i in range(3, 6):
        lr = recorder.rows[i]['lr']
        factor = schedule.factor(i - 3, 3)
        assert lr[OFFSET] == pytest.approx(0.05 * 2 * factor)
        assert lr[backbone] == pytest.approx(0.05 * 0.1 * factor)
        assert lr[SCALE] == pytest.approx(0.05 * factor)
    stock = tiny_config(tmp_path, residual, dict())
    _, reference = record(stock)
    for row, other in zip(recorder.rows, reference.rows):
        assert row['outer_lr'] == other['outer_lr']
    # The backbone learns on, with its statistics; the head is frozen.
    changed = recorder.changed(5)
    assert backbone in changed and BIAS not in changed
    assert any('backbone' in k and 'running_mean' in k for k in changed)
    assert not any(k.startswith('decode_head.convs') for k in changed)


def test_schedule_factors():
    cosine = StageSchedule('cosine')
    assert cosine.factor(0, 10) == 1 and cosine.factor(
        5, 10) == pytest.approx(0.5)
    assert StageSchedule('poly').factor(5, 10) == pytest.approx(0.5**0.9)
    assert StageSchedule().factor(9, 10) == 1
    warm = StageSchedule(warmup_iters=4)
    assert [warm.factor(i, 10) for i in range(5)] == [.25, .5, .75, 1, 1]
    with pytest.raises(ValueError, match='unknown schedule'):
        StageSchedule('step')
    with pytest.raises(ValueError, match='warmup_iters'):
        StageSchedule(warmup_iters=-1)


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
    assert provider.drift() > 0
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


VARIANTS = dict(
    plain={},
    ema={
        'extra_hook':
        dict(
            type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3)
    },
    ema_buffers={
        'extra_hook':
        dict(
            type='EMAHook',
            ema_type='ExponentialMovingAverage',
            momentum=0.3,
            update_buffers=True)
    },
    amp={'optim_wrapper.type': 'CPUAmpOptimWrapper'},
    accumulation={'optim_wrapper.accumulative_counts': 2})


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('stop', [2, 4, 6])
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, residual, variant,
                                                   stop):
    """Stopped in stage 1, exactly at the switch, and in stage 2."""
    changes = dict(VARIANTS[variant])
    extra = changes.pop('extra_hook', None)
    cfg = tiny_config(
        tmp_path, residual, dict(switch_at=4), max_iters=8, **changes)
    if extra:
        cfg.custom_hooks.append(extra)
    whole = run(cfg, work_dir=str(tmp_path / 'whole'))
    killed = cfg.copy()
    killed.work_dir = str(tmp_path / 'killed')
    first = killed.copy()
    first.custom_hooks = list(
        first.custom_hooks) + [dict(type='StopAt', at=stop)]
    with pytest.raises(KeyboardInterrupt):
        run(first)
    resumed = run(killed, resume=True)
    assert resumed.iter == whole.iter == 8
    for a, b in zip(whole.model.named_parameters(),
                    resumed.model.named_parameters()):
        assert a[0] == b[0] and a[1].requires_grad == b[1].requires_grad
    same_state(
        str(tmp_path / 'whole' / 'iter_8.pth'),
        str(tmp_path / 'killed' / 'iter_8.pth'))


@HOOKS.register_module()
class StopAt(Hook):
    """Stop the run before it begins iteration ``at``."""
    priority = 'HIGHEST'

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            raise KeyboardInterrupt


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
    drift = hub.get_scalar('train/text_drift').data[0]
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
    assert rows[-1]['text_drift'] == pytest.approx(drift[-1])
    assert rows[-1]['text_scale'] == hub.get_scalar(
        'train/text_scale').current()


def test_a_frozen_parameter_stays_frozen(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
    cfg.custom_hooks.append(dict(type='Recorder'))
    runner = Runner.from_cfg(cfg)
    frozen = 'backbone.detail.detail_branch.0.0.conv.weight'
    runner.model.get_parameter(frozen).requires_grad_(False)
    runner.train()
    recorder = next(h for h in runner.hooks if isinstance(h, Recorder))
    assert len(recorder.rows) == 6
    for i in range(6):
        assert recorder.changed(i) and frozen not in recorder.changed(i)


@pytest.mark.parametrize('hook, error, message', [
    (dict(switch_at=-1), ValueError, 'must not be negative'),
    (dict(switch_at=1.5), ValueError, r'must lie in \(0, 1\)'),
    (dict(switch_at='half'), TypeError, 'iteration'),
    (dict(switch_at=True), TypeError, 'iteration'),
    (dict(switch_at=6), ValueError, 'run ends after 6'),
    (dict(switch_at=99), ValueError, 'start at iteration 99.*ends after 6'),
    (dict(switch_at=3, learn=['nothing_like_this']), ValueError,
     "'nothing_like_this'.*matches no parameter.*offset"),
])
def test_bad_plans(tmp_path, residual, hook, error, message):
    with pytest.raises(error, match=message):
        run(tiny_config(tmp_path, residual, hook))
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
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3))
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


def test_accumulation_rounds_the_switch(tmp_path, residual):
    cfg = tiny_config(tmp_path, residual, dict(switch_at=3),
                      **{'optim_wrapper.accumulative_counts': 2})
    _, recorder = record(cfg)
    stages = [OFFSET in row['learns'] for row in recorder.rows]
    assert stages == [False] * 4 + [True] * 2


@pytest.mark.parametrize('learn', [None, {r'\.text\.': 1., '.': .1}])
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
    offsets = [head.text.text.offset for head in heads]
    assert not torch.equal(*offsets)
    hub = runner.message_hub
    for i, head in enumerate(heads):
        scale = hub.get_scalar(f'train/text_scale{i or ""}').current()
        assert scale == head.text.scale().item() != 1
        drift = hub.get_scalar(f'train/text_drift{i or ""}').current()
        assert drift == pytest.approx(head.text.text.drift()) != 0
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
