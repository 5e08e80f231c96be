# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The benchmark of deployment: what it compares, and what it writes."""
import numpy as np
import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny import CLASSES, tiny_config
from tool_modules import ROOT, fails, load_tool, run

from mmseg_textkd.analysis.benchmark_backends import BACKENDS
from mmseg_textkd.analysis.benchmark_folders import time_folders
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.folder import deploy
from mmseg_textkd.deploy.runtimes import Form
from mmseg_textkd.utils.report import count_cost

TOY = ROOT.joinpath(
    'configs/text_classifier/'
    'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py')
STOCK_TOY = ROOT.joinpath(
    'configs/stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py')
NAMES = ['stock', 'stock again', 'text, unfolded', 'text, folded']
HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis_tools/benchmark.py')


@pytest.fixture
def networks(tool):
    return tool.build_networks(Config.fromfile(TOY))


def test_networks_are_what_their_names_say(networks):
    assert list(networks) == NAMES
    stock, again, text, folded = networks.values()
    twin = MODELS.build(Config.fromfile(STOCK_TOY).model)
    for model in (stock, again, folded):
        assert not model.training
        assert {
            k: v.shape
            for k, v in model.state_dict().items()
        } == {
            k: v.shape
            for k, v in twin.state_dict().items()
        }
    assert stock is not again
    inputs = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        expected = text(inputs)
        torch.testing.assert_close(folded(inputs), expected, rtol=0, atol=1e-4)
        assert (stock(inputs) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_onnxruntime_computes_the_same(networks):
    inputs = torch.randn(1, 3, 64, 128)
    model = networks['text, unfolded']
    got, = BACKENDS['onnxruntime'].prepare(model, inputs)()
    torch.testing.assert_close(
        torch.from_numpy(got), model(inputs), rtol=0, atol=1e-4)


@pytest.mark.stacks
def test_tool(tool, tmp_path, capsys):
    results, page = run(tool, tmp_path, TOY, '--size', 64, 128, '--runs', 3,
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
    expected = dict(
        params=sum(p.numel() for p in stock.parameters()),
        flops=2 * flops['conv'])
    for name in ('stock', 'stock again', 'text, folded'):
        assert counts[name] == expected
    # 1024 channels, vectors of width 64, 8 classes, at 1/8 of 64x128; batch
    # norm, scale, biases, and four context vectors.
    extra = {
        key: counts['text, unfolded'][key] - expected[key]
        for key in expected
    }
    assert extra['flops'] == 2 * 8 * 16 * (1024 * 64 + 64 * 8 - 1024 * 8)
    assert extra['params'] == (1024 * 64 + 2 * 64 + 1 + 4 * 64 - 1024 * 8)

    assert list(results['backends']) == ['eager', 'onnxruntime', 'cuda']
    for backend in ('eager', 'onnxruntime'):
        rows = results['backends'][backend]
        assert list(rows) == NAMES
        assert rows['stock']['ratio_ci95'] == [1, 1]
        for name, row in rows.items():
            assert len(row['runs_ms']) == 3
            assert row['median_ms'] == pytest.approx(
                np.median(row['runs_ms']), abs=1e-3)
            assert row['min_ms'] <= row['q1_ms'] <= row['q3_ms']
            low, high = row['ratio_ci95']
            assert low <= row['ratio'] <= high
            assert f'| {backend} | {name} | {row["median_ms"]:.2f} [' in page
    peaks = [
        row['peak_bytes'] for row in results['backends']['eager'].values()
    ]
    assert peaks[0] == peaks[1] == peaks[3] < peaks[2]
    assert peaks[0] > 4 * expected['params']
    assert {
        row['peak_bytes']
        for row in results['backends']['onnxruntime'].values()
    } == {None}
    if not HAS_CUDA:
        assert results['backends']['cuda'] == dict(skipped='no CUDA device')
        assert '- `cuda` was skipped: no CUDA device' in page


def test_deployed_folders(tool, tmp_path):
    """Ratios are to the first; the peak was reached in the same rounds."""
    model = MODELS.build(tiny_config(tmp_path).model).eval()
    network = ExportableSegmentor(model)
    classes = dict(classes=CLASSES, palette=[[0, 0, 0]] * len(CLASSES))
    paths = [tmp_path / 'a', tmp_path / 'b stock']
    for path in paths:
        deploy(path, 'torchscript', network, Form((32, 64)), classes, {})
    results, page = run(tool, tmp_path, *paths, '--runs', 3, '--warmup', 1)
    assert list(results['arms']) == [str(path) for path in paths]
    flops = count_cost(model, lambda: model(torch.zeros(1, 3, 32, 64))).flops
    for name, row in results['arms'].items():
        speed = flops / row['median_ms'] / 1e6
        assert row['gflops'] == pytest.approx(speed, rel=1e-3)
        share = speed / results['gflops_peak']
        assert row['share_of_peak'] == pytest.approx(share, rel=1e-3)
        assert f'| {name} | {row["median_ms"]:.2f} [' in page
    assert results['arms'][str(paths[0])]['ratio_ci95'] == [1, 1]
    found = time_folders({
        'x': paths[0],
        'x stock': paths[1]
    }, 3, 0, 1, model, (32, 64))['arms']
    assert found['eager']['ratio'] == 1 and found['x']['to_stock'] > 0
    low, high = found['x']['to_stock_ci95']
    assert low <= found['x']['to_stock'] <= high


@pytest.mark.skipif(not HAS_CUDA, reason='needs a CUDA device')
def test_tool_on_cuda(tool, tmp_path):
    results, _ = run(tool, tmp_path, TOY, '--size', 64, 128, '--runs', 3,
                     '--backends', 'cuda', 'cuda-graph')
    rows = results['backends']['cuda']
    assert rows['text, folded']['peak_bytes'] == rows['stock']['peak_bytes']
    assert list(results['backends']['cuda-graph']) == NAMES


def test_bad_arguments(tool, capsys, tmp_path):
    assert 'has no text' in fails(tool, capsys, STOCK_TOY)
    for name in ('benchmark', 'benchmark_training', 'benchmark_text'):
        argv = [] if name == 'benchmark_text' else [TOY]
        said = fails(
            load_tool(f'analysis_tools/{name}.py'), capsys, *argv, '--runs', 1)
        assert '--runs must be at least 2' in said
    assert 'one config at a time' in fails(tool, capsys, TOY, TOY)
    said = fails(tool, capsys, TOY, '--out', tmp_path / 'no' / 'a.json')
    assert f'there is no folder {tmp_path / "no"}' in said
