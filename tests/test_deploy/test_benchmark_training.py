# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The benchmarks of training and of encoding text."""
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from network_tester import CONFIGS
from tiny import tiny_config
from tool_modules import fails, load_tool, run

from mmseg_textkd.clip import TextTower
from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_parameters)


def training_config(tmp_path):
    cfg = tiny_config(
        tmp_path,
        dict(
            type='ResidualPromptLearner',
            embeddings=dict(
                type='ClassEmbeddings', file='no such file', dim=16)),
        dict(switch_at=3, log_interval=2))
    # More than rounding, even for weights with small gradients.
    cfg.optim_wrapper.optimizer.lr = .5
    return cfg


@pytest.mark.stacks
def test_what_trains(tmp_path):
    trainings = load_tool(
        'analysis_tools/benchmark_training.py').build_trainings(
            training_config(tmp_path), (32, 64), 2, 'cpu')
    assert list(trainings) == [
        'stock', 'stock again', 'stage 1', 'stage 2', 'LSeg-style'
    ]
    for name, training in trainings.items():
        model = training.model
        with torch.no_grad():
            for param in model.parameters():
                # Some get no gradient; off zero, weight decay moves them.
                param.add_(0.01 * torch.randn_like(param))
        params = set(dict(model.named_parameters()))
        prompts = set(prompt_parameters(model))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rates = [g['lr'] for g in training.optim_wrapper.param_groups]
        training.iterate()
        training.iterate()
        changed = {
            k
            for k, v in model.state_dict().items()
            if not torch.equal(v, before[k])
        }
        assert rates == [g['lr'] for g in training.optim_wrapper.param_groups]
        if name == 'stage 2':
            assert changed & params == set(text_parameters(model)) > prompts
            # Batch norms rest as well.
            assert all('.text.' in k for k in changed - params)
        else:
            assert changed & params == params - prompts
            assert any(k.endswith('running_mean') for k in changed)
        # What rests in stage 2 too, because it has learned in stage 1.
        assert len(training.optim_wrapper.optimizer.state
                   ) == len(params - prompts) + len(prompts) * (
                       name == 'stage 2')
    heads = {k: v.model.decode_head for k, v in trainings.items()}
    assert type(heads['stock']).__name__ == 'FCNHead'
    assert heads['stage 1'].conv_seg.projection.norm == 'bn'
    assert heads['stage 2'].conv_seg.projection.norm == 'bn'
    assert heads['LSeg-style'].conv_seg.projection.norm == 'l2'


def test_what_trains_with_a_teacher(tmp_path):
    """The teacher of the config, and regions, without their files."""
    tool = load_tool('analysis_tools/benchmark_training.py')
    tiny_config(tmp_path).dump(tmp_path / 'teacher.py')
    cfg = tiny_config(tmp_path)
    text = training_config(tmp_path)
    text.model.decode_head.text_losses = [
        dict(type='TextGuidedDistillationLoss', teacher=teacher, min_pixels=1)
        for teacher in ('regions', 'segmentor')
    ]
    for config in (cfg, text):
        config.model.type = 'DistilledEncoderDecoder'
        config.model.teacher = dict(
            config=str(tmp_path / 'teacher.py'), checkpoint='no such file')
    cfg.model.distill_losses = [dict(type='LogitDistillationLoss')]
    trainings = tool.build_trainings(cfg, (32, 64), 2, 'cpu')
    assert list(trainings) == ['stock', 'stock again', 'distilled']
    stock, distilled = trainings['stock'], trainings['distilled']
    assert not hasattr(stock.model, 'teacher')
    weights = sum(v.numel() * v.element_size()
                  for v in distilled.model.teacher.model.state_dict().values())
    more = distilled.peak_bytes('cpu') - stock.peak_bytes('cpu')
    assert more >= weights > 0
    text = tool.build_trainings(text, (32, 64), 2, 'cpu')
    assert list(text)[2:] == ['stage 1', 'stage 2', 'LSeg-style']
    stage = text['stage 1']
    losses = stage.model(
        **stage.model.data_preprocessor(stage.batch, True), mode='loss')
    assert losses['decode.loss_text_guided'] > 0


@pytest.fixture
def level():
    """Put back the level of the logger, which the tool sets."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    yield
    logger.setLevel(before)


def test_what_trains_with_clip_as_the_teacher():
    """Without labels of the classes that stay unseen."""
    tool = load_tool('analysis_tools/benchmark_training.py')
    path, = (CONFIGS / 'balance').glob('*bisenetv2*toy-scenes*')
    cfg = Config.fromfile(path)
    trainings = tool.build_trainings(cfg, (32, 64), 2, 'cpu')
    assert list(trainings)[2:] == ['stage 1', 'stage 2', 'LSeg-style']
    unseen = cfg.model.decode_head.text_branch.unseen
    labels = trainings['stock'].batch['data_samples'][0].gt_sem_seg.data
    assert unseen and not set(unseen) & set(labels.unique().tolist())
    assert not hasattr(trainings['stock'].model, 'teacher')
    teacher = trainings['stage 1'].teacher
    weights = sum(v.numel() * v.element_size()
                  for v in teacher.tower.network.state_dict().values())
    more = (
        trainings['stage 1'].peak_bytes('cpu') -
        trainings['stock'].peak_bytes('cpu'))
    assert more > weights > 0


def test_training_tool(tmp_path, level):
    path = tmp_path / 'tiny.py'
    training_config(tmp_path).dump(path)
    results, page = run(
        load_tool('analysis_tools/benchmark_training.py'), tmp_path, path,
        '--runs', 3, '--device', 'cpu')
    entry = results['configs'][str(path)]
    assert entry['size'] == [32, 64] and entry['batch'] == 2
    arms = entry['arms']
    assert all(len(row['runs_ms']) == 3 for row in arms.values())
    assert arms['stock']['ratio'] == 1
    peaks = {name: row['peak_bytes'] for name, row in arms.items()}
    # No gradients and no activations of the network in stage 2.
    assert peaks['stage 2'] < peaks['stock'] == peaks['stock again']
    assert peaks['stock'] < peaks['stage 1']
    for name, row in arms.items():
        assert f'| {name} | {row["median_ms"]:.2f} [' in page
        assert f'| {peaks[name] / peaks["stock"]:.3f} |' in page


# ------------------------------------------------------------ text
PHRASES = dict(road='road', car='sports car', thing='something very long')


def test_builders_agree():
    tool = load_tool('analysis_tools/benchmark_text.py')
    got = tool.measure(
        TextTower('toyclip'), PHRASES, ['{}', 'a photo of a {}.'], 2, 0)
    assert 0 <= got['max_difference'] < 1e-6
    assert got['closest_classes'] > 1e-3
    assert list(got['times']) == ['mmseg_textkd', 'open_clip']
    assert got['times']['mmseg_textkd']['ratio'] == 1


def test_tower_with_random_weights():
    tool = load_tool('analysis_tools/benchmark_text.py')
    tower = tool.random_tower('ViT-S-32-alt')
    # Tokens, positions, ten layers of width 256, and the projection.
    layer = 12 * 256**2 + 13 * 256
    assert sum(
        p.numel()
        for p in tower.parameters()) == (49408 * 256 + 77 * 256 + 10 * layer +
                                         2 * 256 + 256**2 + 1)
    assert tower.can_cut
    got = tool.measure(tower, PHRASES, ['{}'], 2, 0)
    assert got['max_difference'] < 1e-6 < 1e-3 < got['closest_classes']


def test_text_tool(tmp_path, capsys):
    tool = load_tool('analysis_tools/benchmark_text.py')
    results, page = run(tool, tmp_path, '--classes', 3, '--templates', 'vild',
                        '--runs', 2)
    assert (results['classes'], results['templates']) == (3, 14)
    assert results['max_difference'] < 1e-6
    ratio = results['times']['open_clip']['ratio']
    assert f'| {ratio:.3f} [' in page and '3 classes x 14 templates' in page
    said = fails(tool, capsys, '--model', 'coca_ViT-B-32')
    assert "'coca_ViT-B-32' has no text side" in said
    assert '--num-classes must be at least 2' in fails(tool, capsys,
                                                       '--classes', 1)
