# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The benchmarks of deployment, of training and of encoding text."""
import time

import numpy as np
import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from network_tester import CONFIGS
from tiny import CLASSES, residual, tiny_config
from tool_modules import fails, load_tool, run
from torch import nn
from torch._inductor import config as inductor

from mmseg_textkd.analysis.benchmark import (interleave, paired_ratio,
                                             peak_memory, randomize_text,
                                             stopwatch, summarize)
from mmseg_textkd.analysis.benchmark_backends import BACKENDS, Skipped
from mmseg_textkd.analysis.benchmark_folders import time_folders
from mmseg_textkd.clip import TextTower
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.folder import deploy
from mmseg_textkd.deploy.runtimes import Form
from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_parameters)
from mmseg_textkd.utils.report import count_cost

TOY = CONFIGS / ('text_classifier/textkd_bisenetv2_fcn_toyclip_1xb8-200i_'
                 'toy-scenes-128x256.py')
SCORE_MAP_TOY = CONFIGS / ('textkd/textkd_stdc1_toyclip-score-map_1xb8-200i_'
                           'toy-scenes-128x256.py')
STOCK_TOY = CONFIGS / 'stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py'
NAMES = ['stock', 'stock again', 'text, unfolded', 'text, folded']
HAS_CUDA = torch.cuda.is_available()
TOOL, TRAINING, TEXT = (
    load_tool(f'analysis_tools/benchmark{name}.py')
    for name in ('', '_training', '_text'))


def test_ratios_within_rounds():
    # Drift that both have cancels.
    drift = np.linspace(1, 10, 16)
    assert paired_ratio(1.5 * drift, drift) == (1.5, 1.5, 1.5)
    # Not so where the values are those of other rounds.
    value, low, high = paired_ratio(1.5 * drift, drift[::-1])
    assert low < 1 < high
    # The median of three draws is the least of three with 7/27, and so on.
    assert paired_ratio([3, 2, 8], [3, 1, 2]) == (2, 1, 4)


def test_interval_covers_the_true_ratio():
    rng, found = np.random.default_rng(0), []
    for seed in range(200):
        common = rng.lognormal(sigma=.5, size=40)
        noise = rng.lognormal(sigma=.1, size=(2, 40))
        _, *ends = paired_ratio(1.1 * common * noise[0], common * noise[1],
                                400, seed)
        found.append(ends)
    low, high = np.transpose(found)
    hits = ((low <= 1.1) & (1.1 <= high)).sum()
    assert 180 <= hits <= 199  # 95 % of 200, and not all
    # A median of 40 has 1.25 / 40^0.5 of the spread of one.
    spread = 1.1 * .1 * 2**.5 * 1.25 / 40**.5
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * spread, rel=.2)


def test_summary():
    times = dict(a=[.004, .001, .003, .002], b=[.008, .002, .006, .004])
    rows = summarize(times, 'a')
    expected = dict(median_ms=2.5, q1_ms=1.75, q3_ms=3.25, min_ms=1, ratio=1)
    assert rows['a'] == expected | dict(
        ratio_ci95=[1, 1], runs_ms=[4, 1, 3, 2])
    assert rows['b']['ratio'] == 2 and rows['b']['ratio_ci95'] == [2, 2]


def test_every_round_has_everything_once_in_a_drawn_order():
    calls = []
    arms = {n: lambda n=n: calls.append(n) or len(calls) for n in 'abcd'}
    values = interleave(arms, runs=8, warmup=2)
    rounds = [tuple(calls[i:i + 4]) for i in range(0, 40, 4)]
    assert len(calls) == 40 and len(set(rounds)) > 4
    assert {frozenset(r) for r in rounds} == {frozenset('abcd')}
    for name in arms:
        # The first eight calls were the warm-up.
        expected = [i + 1 for i in range(8, 40) if calls[i] == name]
        assert values[name] == expected
    first = calls.copy()
    calls.clear()
    interleave(arms, runs=8, warmup=2)
    assert calls == first
    # In seconds.
    assert .02 <= stopwatch(lambda: time.sleep(.02), 'cpu')() < 1


def test_peak_memory_is_what_lives_at_a_time():
    size = 2**18  # float32: 1 MiB

    def one_by_one():
        for _ in range(3):
            torch.ones(size)

    together = peak_memory(lambda: [torch.ones(size), torch.ones(size)], 'cpu')
    assert together == 2 * 2**20
    assert peak_memory(one_by_one, 'cpu') == 2**20


def test_text_needs_no_file():
    cfg = Config.fromfile(TOY)
    before = cfg.pretty_text
    text = randomize_text(cfg).model.decode_head.text
    assert cfg.pretty_text == before
    control = dict(type='ControlEmbeddings', kind='random', dim=64)
    assert text.embeddings == control
    # Its prompts are still those of the classes.
    assert text.type == 'ContextPromptLearner'
    assert text.vocabulary == 'toy_scenes'
    vectors = MODELS.build(dict(control, num_classes=8)).class_embeddings
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(8))
    own = dict(type='ClassEmbeddings', file='own')
    mixture = dict(type='MixturePromptLearner', embeddings=dict(own, dim=4))
    for head in (own, mixture):
        cfg.model.decode_head.text = head
        assert randomize_text(cfg).model.decode_head.text == head


def test_without_compiler():
    conv = nn.Conv2d(3, 4, 3).eval()
    options = {'cpp.cxx': ('/none/g++', ), 'fx_graph_cache': False}
    with inductor.patch(options), torch.no_grad():
        with pytest.raises(Skipped, match=r'needs a C\+\+ compiler.*/none'):
            BACKENDS['compile'].prepare(conv, torch.randn(1, 3, 11, 13))


@torch.no_grad()
def test_networks_are_what_their_names_say():
    networks = TOOL.build_networks(Config.fromfile(TOY))
    assert list(networks) == NAMES
    stock, again, text, folded = networks.values()
    twin = MODELS.build(Config.fromfile(STOCK_TOY).model).state_dict()
    shapes = {k: v.shape for k, v in twin.items()}
    for model in (stock, again, folded):
        assert not model.training
        assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert stock is not again
    inputs = torch.randn(1, 3, 64, 128)
    expected = text(inputs)
    torch.testing.assert_close(folded(inputs), expected, rtol=0, atol=1e-4)
    assert (stock(inputs) - expected).abs().max() > 1e-2
    got, = BACKENDS['onnxruntime'].prepare(text, inputs)()
    got = torch.from_numpy(got)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    # A score map stays; what belongs to it alone is not in the stock network.
    cfg = Config.fromfile(SCORE_MAP_TOY)
    cfg.model.text_loss = dict(type='TextToTextContrastiveLoss')
    stock, _, text = TOOL.build_networks(cfg).values()
    more = text.state_dict().keys() - stock.state_dict().keys()
    assert more and stock.state_dict().keys() < text.state_dict().keys()
    assert {key.split('.')[0] for key in more} == {'score_map'}


@pytest.mark.stacks
def test_tool(tmp_path, capsys):
    results, page = run(TOOL, tmp_path, TOY, '--size', 64, 128, '--runs', 3,
                        '--warmup', 1, '--backends', 'cuda', 'onnxruntime',
                        'eager')
    assert page in capsys.readouterr().out
    assert results['size'] == [64, 128] and results['config'] == str(TOY)
    where = results['environment']
    assert where['versions']['torch'] == torch.__version__
    assert {'onnxruntime', 'mmseg', 'mmseg_textkd'} <= set(where['versions'])
    assert where['threads'] == torch.get_num_threads()
    assert where['cpu'] in page and where['date'] in page

    # Counted by another counter, and by hand.
    counts = results['networks']
    stock = MODELS.build(Config.fromfile(STOCK_TOY).model).eval()
    flops = FlopAnalyzer(stock, torch.zeros(1, 3, 64, 128)).by_operator()
    params = sum(p.numel() for p in stock.parameters())
    expected = dict(params=params, flops=2 * flops['conv'])
    for name in ('stock', 'stock again', 'text, folded'):
        assert counts[name] == expected
    # 1024 channels, vectors of width 64, 8 classes, at 1/8 of 64x128; batch
    # norm, scale, biases, and four context vectors.
    text = counts['text, unfolded']
    extra = 2 * 8 * 16 * (1024 * 64 + 64 * 8 - 1024 * 8)
    assert text['flops'] - expected['flops'] == extra
    extra = 1024 * 64 + 2 * 64 + 1 + 4 * 64 - 1024 * 8
    assert text['params'] - params == extra

    backends = results['backends']
    assert list(backends) == ['eager', 'onnxruntime', 'cuda']
    for backend in ('eager', 'onnxruntime'):
        rows = backends[backend]
        assert list(rows) == NAMES
        assert rows['stock']['ratio_ci95'] == [1, 1]
        for name, row in rows.items():
            assert len(row['runs_ms']) == 3
            assert f'| {backend} | {name} | {row["median_ms"]:.2f} [' in page
    peaks = [row['peak_bytes'] for row in backends['eager'].values()]
    assert peaks[0] == peaks[1] == peaks[3] < peaks[2]
    assert peaks[0] > 4 * params
    assert all(not r['peak_bytes'] for r in backends['onnxruntime'].values())
    if not HAS_CUDA:
        assert backends['cuda'] == dict(skipped='no CUDA device')
        assert '- `cuda` was skipped: no CUDA device' in page


def test_deployed_folders(tmp_path):
    """Ratios are to the first; the peak was reached in the same rounds."""
    model = MODELS.build(tiny_config(tmp_path).model).eval()
    network = ExportableSegmentor(model)
    classes = dict(classes=CLASSES, palette=[[0, 0, 0]] * len(CLASSES))
    paths = [tmp_path / 'a', tmp_path / 'b stock']
    for path in paths:
        deploy(path, 'torchscript', network, Form((32, 64)), classes, {})
    results, page = run(TOOL, tmp_path, *paths, '--runs', 3, '--warmup', 1)
    assert list(results['arms']) == [str(path) for path in paths]
    flops = count_cost(model, lambda: model(torch.zeros(1, 3, 32, 64))).flops
    for name, row in results['arms'].items():
        speed = flops / row['median_ms'] / 1e6
        assert row['gflops'] == pytest.approx(speed, rel=1e-3)
        share = speed / results['gflops_peak']
        assert row['share_of_peak'] == pytest.approx(share, rel=1e-3)
        assert f'| {name} | {row["median_ms"]:.2f} [' in page
    assert results['arms'][str(paths[0])]['ratio_ci95'] == [1, 1]
    folders = {'x': paths[0], 'x stock': paths[1]}
    found = time_folders(folders, 3, 0, 1, model, (32, 64))['arms']
    assert found['eager']['ratio'] == 1 and found['x']['to_stock'] > 0
    assert 'One picture of 32x64; 3 rounds' in page
    deploy(tmp_path / 'c', 'torchscript', network, Form((64, 96)), classes, {})
    with pytest.raises(SystemExit, match='a takes 32x64, .*c takes 64x96'):
        run(TOOL, tmp_path, paths[0], tmp_path / 'c')
    low, high = found['x']['to_stock_ci95']
    assert low <= found['x']['to_stock'] <= high


@pytest.mark.skipif(not HAS_CUDA, reason='needs a CUDA device')
def test_tool_on_cuda(tmp_path):
    results, _ = run(TOOL, tmp_path, TOY, '--size', 64, 128, '--runs', 3,
                     '--backends', 'cuda', 'cuda-graph')
    rows = results['backends']['cuda']
    assert rows['text, folded']['peak_bytes'] == rows['stock']['peak_bytes']
    assert list(results['backends']['cuda-graph']) == NAMES


def test_bad_arguments(capsys, tmp_path):
    none = tmp_path / 'no'
    for message, tool, *argv in [
        ('has no text', TOOL, STOCK_TOY),
        ('--runs must be at least 2', TOOL, TOY, '--runs', 1),
        ('--runs must be at least 2', TRAINING, TOY, '--runs', 1),
        ('--runs must be at least 2', TEXT, '--runs', 1),
        ('one config at a time', TOOL, TOY, TOY),
        (f'there is no folder {none}', TOOL, TOY, '--out', none / 'a.json'),
        ("'coca_ViT-B-32' has no text side", TEXT, '--model', 'coca_ViT-B-32'),
        ('--num-classes must be at least 2', TEXT, '--classes', 1),
    ]:
        assert message in fails(tool, capsys, *argv)


def training_config(tmp_path):
    hook = dict(switch_at=3, log_interval=2)
    cfg = tiny_config(tmp_path, residual('no such file', dim=16), hook)
    # More than rounding, even for weights with small gradients.
    cfg.optim_wrapper.optimizer.lr = .5
    return cfg


def build_trainings(cfg):
    return TRAINING.build_trainings(cfg, (32, 64), 2, 'cpu')


def size_of(model):
    state = model.state_dict().values()
    return sum(v.numel() * v.element_size() for v in state)


@pytest.mark.stacks
def test_what_trains(tmp_path):
    trainings = build_trainings(training_config(tmp_path))
    names = ['stock', 'stock again', 'stage 1', 'stage 2', 'LSeg-style']
    assert list(trainings) == names
    for name, training in trainings.items():
        model = training.model
        with torch.no_grad():
            for param in model.parameters():
                # Some get no gradient; off zero, weight decay moves them.
                param.add_(0.01 * torch.randn_like(param))
        params = set(dict(model.named_parameters()))
        prompts = set(prompt_parameters(model))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        groups = training.optim_wrapper.param_groups
        rates = [group['lr'] for group in groups]
        training.iterate()
        training.iterate()
        after = model.state_dict()
        changed = {k for k in after if not torch.equal(after[k], before[k])}
        assert rates == [group['lr'] for group in groups]
        if name == 'stage 2':
            assert changed & params == set(text_parameters(model)) > prompts
            # Batch norms rest as well.
            assert all('.text.' in k for k in changed - params)
        else:
            assert changed & params == params - prompts
            assert any(k.endswith('running_mean') for k in changed)
        # What rests in stage 2 too, because it has learned in stage 1.
        known = params if name == 'stage 2' else params - prompts
        assert len(training.optim_wrapper.optimizer.state) == len(known)
    heads = {k: v.model.decode_head for k, v in trainings.items()}
    assert type(heads['stock']).__name__ == 'FCNHead'
    norms = [heads[name].conv_seg.projection.norm for name in names[2:]]
    assert norms == ['bn', 'bn', 'l2']


def test_what_trains_with_a_teacher(tmp_path):
    """The teacher of the config, and regions, without their files."""
    tiny_config(tmp_path).dump(tmp_path / 'teacher.py')
    cfg, text = tiny_config(tmp_path), training_config(tmp_path)
    guided = dict(type='TextGuidedDistillationLoss', min_pixels=1)
    text.model.decode_head.text_losses = [
        dict(guided, teacher=teacher) for teacher in ('regions', 'segmentor')
    ]
    files = dict(config=f'{tmp_path}/teacher.py', checkpoint='no such file')
    for config in (cfg, text):
        config.model.type = 'DistilledEncoderDecoder'
        config.model.teacher = files
    cfg.model.distill_losses = [dict(type='LogitDistillationLoss')]
    trainings = build_trainings(cfg)
    assert list(trainings) == ['stock', 'stock again', 'distilled']
    stock, distilled = trainings['stock'], trainings['distilled']
    assert not hasattr(stock.model, 'teacher')
    more = distilled.peak_bytes('cpu') - stock.peak_bytes('cpu')
    assert more >= size_of(distilled.model.teacher.model) > 0
    text = build_trainings(text)
    assert list(text)[2:] == ['stage 1', 'stage 2', 'LSeg-style']
    model, batch = text['stage 1'].model, text['stage 1'].batch
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    assert losses['decode.loss_text_guided'] > 0


def test_what_trains_with_clip_as_the_teacher():
    """Without labels of the classes that stay unseen."""
    path, = (CONFIGS / 'balance').glob('*bisenetv2*toy-scenes*')
    cfg = Config.fromfile(path)
    trainings = build_trainings(cfg)
    assert list(trainings)[2:] == ['stage 1', 'stage 2', 'LSeg-style']
    unseen = cfg.model.decode_head.text_branch.unseen
    stock, stage = trainings['stock'], trainings['stage 1']
    labels = stock.batch['data_samples'][0].gt_sem_seg.data
    assert unseen and not set(unseen) & set(labels.unique().tolist())
    assert not hasattr(stock.model, 'teacher')
    more = stage.peak_bytes('cpu') - stock.peak_bytes('cpu')
    assert more > size_of(stage.teacher.tower.network) > 0


@pytest.fixture
def level():
    """Put back the level of the logger, which the tool sets."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    yield
    logger.setLevel(before)


def test_training_tool(tmp_path, level):
    path = tmp_path / 'tiny.py'
    training_config(tmp_path).dump(path)
    results, page = run(TRAINING, tmp_path, path, '--runs', 3, '--device',
                        'cpu')
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


def test_builders_agree():
    """Also a tower with random weights."""
    phrases = dict(road='road', car='sports car', thing='something very long')
    tower = TEXT.random_tower('ViT-S-32-alt')
    # Tokens, positions, ten layers of width 256, and the projection.
    layer = 12 * 256**2 + 13 * 256
    expected = 49408 * 256 + 77 * 256 + 10 * layer + 2 * 256 + 256**2 + 1
    assert sum(p.numel() for p in tower.parameters()) == expected
    assert tower.can_cut
    templates = ['{}', 'a photo of a {}.']
    for tower in (tower, TextTower('toyclip')):
        got = TEXT.measure(tower, phrases, templates, 2, 0)
        assert got['max_difference'] < 1e-6 < 1e-3 < got['closest_classes']
        assert list(got['times']) == ['mmseg_textkd', 'open_clip']
        assert got['times']['mmseg_textkd']['ratio'] == 1


def test_text_tool(tmp_path):
    words = '--classes', 3, '--templates', 'vild', '--runs', 2
    results, page = run(TEXT, tmp_path, *words)
    assert (results['classes'], results['templates']) == (3, 14)
    assert results['max_difference'] < 1e-6
    ratio = results['times']['open_clip']['ratio']
    assert f'| {ratio:.3f} [' in page and '3 classes x 14 templates' in page
