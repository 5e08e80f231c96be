# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""docs/en/networks.md and the tool that makes it."""
import functools
import re

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from network_tester import stock_twin
from tool_modules import ROOT, fails, load_tool
from torch import nn

PAGE = (ROOT / 'docs' / 'en' / 'networks.md').read_text(encoding='utf-8')
NUM_CLASSES = 19
# A head that classifies twice in training; no such thing; auxiliary heads.
MEASURED = ['ddrnet_23-slim_in1k-pre', 'erfnet_fcn', 'fast_scnn']


@pytest.fixture(scope='module')
def tool():
    module = load_tool('analysis_tools/networks.py')
    # Each network once, whoever asks.
    module.measure = functools.cache(module.measure)
    return module


@pytest.fixture
def rows(tool):
    """What is measured now."""
    configs = tool.text_configs()
    return {name: tool.measure(name, configs[name]) for name in MEASURED}


def tables():
    """The tables of the page: cells by name of the network."""
    found = []
    for block in re.findall(r'(?:^\|.*\n)+', PAGE, re.MULTILINE):
        lines = [line.strip('| ').split(' | ') for line in block.splitlines()]
        names = [line[0].strip('[').split(']')[0] for line in lines]
        found.append(dict(zip(names[2:], [line[1:] for line in lines[2:]])))
    assert len(found) == 4
    return found


def test_every_network_is_in_every_table(tool):
    configs = tool.text_configs()
    assert len(configs) == 15
    *of_all, score_maps = tables()
    for table in of_all:
        assert list(table) == list(configs)
    assert {*score_maps} < {*configs} and len(score_maps) == 9
    for name, path in configs.items():
        link, *_ = re.findall(rf'\[{re.escape(name)}\]\((.*?)\)', PAGE)
        assert (ROOT / 'docs' / 'en' / link).resolve() == path


def test_page_is_what_is_measured(tool, rows):
    page = tool.page(list(rows.values()), tool.score_map_rows(MEASURED))
    assert tool.differences(PAGE, page, MEASURED) == []
    assert sum(line.startswith('|') for line in page.splitlines()) == 8 + 9 + 2

    def prose(text):
        return [line for line in text.splitlines() if line[:1] != '|']

    assert prose(PAGE) == prose(page)


def test_nothing_is_left_of_text_when_deployed():
    _, params, macs, _ = tables()
    for name in params:
        stock, classifier, auxiliary, deployed, _ = params[name]
        assert deployed == stock and '+' in classifier and '+' in auxiliary
        stock, text, deployed, *training = map(float, macs[name])
        assert deployed == stock < text
        assert training == sorted(training)


def test_every_row_agrees_with_arithmetic():
    """The cost of text follows from C, D and stride alone."""
    for name, (_, widths, stride, _) in tables()[0].items():
        channels, dim = map(int, widths.split(' → '))
        pixels = (1024 // int(stride)) * (2048 // int(stride))
        branch = channels * dim + dim * NUM_CLASSES
        conv_seg = channels * NUM_CLASSES
        macs = [float(cell) for cell in tables()[2][name]]
        for text, stock, less in ((1, 0, conv_seg), (4, 3, conv_seg), (5, 3,
                                                                       0)):
            # Each is rounded to 0.01.
            expected = (branch - less) * pixels / 1e9
            found = macs[text] - macs[stock]
            assert found == pytest.approx(expected, abs=0.0101), name
        # Projection, batch norm, offsets and scale; and bias for bias.
        params = branch + 2 * dim + 1
        for cell, less in zip(tables()[1][name][1:3], (conv_seg, 0)):
            more = float(re.search(r'\(\+(.*)\)', cell)[1])
            assert more == pytest.approx((params - less) / 1e6, abs=0.00051)


def test_exact_counts_of_one_network(rows):
    row = rows['fast_scnn']
    pixels = (1024 // 8) * (2048 // 8)
    assert (row.channels, row.dim, row.stride) == (128, 512, 8)
    branch = (128 * 512 + 512 * NUM_CLASSES) * pixels
    conv_seg = 128 * NUM_CLASSES * pixels
    macs = row.macs
    assert macs['text'] - macs['stock'] == branch - conv_seg
    training = macs['training stock'] + branch
    assert macs['training classifier'] == training - conv_seg
    assert macs['training auxiliary'] == training
    # Two auxiliary heads: a 3x3 and a 1x1 convolution, at 1/8 and 1/32.
    assert row.training_only == '2 `FCNHead`'
    head = 2 * 32 + 32 * NUM_CLASSES + NUM_CLASSES
    assert row.params['training only'] == 9 * (128 + 64) * 32 + 2 * head


def test_count_agrees_with_mmengine(tool, rows):
    """On a real forward of another counter."""
    path = stock_twin(tool.text_configs()['fast_scnn'])
    model = tool.build(Config.fromfile(path)).eval()
    with torch.no_grad():
        image = torch.zeros(1, 3, *tool.SIZE)
        counts = FlopAnalyzer(model, image).by_operator()
    assert counts['conv'] == rows['fast_scnn'].macs['stock']
    # There is no other kind of product in this network.
    assert counts.keys() == {
        'conv', 'batch_norm', 'adaptive_avg_pool2d', 'upsample_bilinear2d'
    }
    assert rows['fast_scnn'].params['stock'] == sum(
        p.numel() for p in model.parameters())


def test_deployed_must_be_the_stock_network(tool):
    path = tool.text_configs()['fast_scnn']
    stock = tool.build(Config.fromfile(stock_twin(path)))
    stock.further = nn.Linear(1, 1)
    for role in ('classifier', 'auxiliary'):
        model = tool.build(Config.fromfile(path), role=role)
        with pytest.raises(RuntimeError, match='further.weight'):
            tool.take_text_away(model, stock)


def test_check_names_what_differs(tool, capsys, tmp_path):
    copy = tmp_path / 'networks.md'
    copy.write_text(PAGE, encoding='utf-8')
    argv = '--check', '--only', 'fast_scnn', '--out', str(copy)
    tool.main(argv)
    assert 'up to date: 1 networks' in capsys.readouterr().out
    true, = re.findall(r'^\| fast_scnn \| 7\..*$', PAGE, re.MULTILINE)
    false = true.replace('| 7.', '| 6.', 1)
    copy.write_text(PAGE.replace(true, false), encoding='utf-8')
    said = fails(tool, capsys, *argv)
    assert f'{copy} is out of date' in said
    assert f'\n-{false}\n+{true}\nRun `python tools/' in said
    assert false in copy.read_text(encoding='utf-8')


def test_bad_arguments(tool, capsys, tmp_path):
    for words, said in [
        (['--only', 'fast_scnn'],
         '--only would write a page without the other networks'),
        (['--check', '--only', 'resnet'], 'there is no resnet.*pidnet-s'),
        (['--check', '--out',
          tmp_path / 'no.md'], f'there is no {tmp_path}/no.md'),
        (['--out', tmp_path / 'no/networks.md'], f'there is no {tmp_path}/no'),
    ]:
        assert re.search(f'(?s){said}', fails(tool, capsys, *words))


def test_a_score_map_costs_what_arithmetic_says():
    """A projection, the products with 11 vectors, and what reads them."""
    pixels = 32 * 64
    # STDC: 3x3 to 128 channels, and 1x1 on one pooled pixel.
    macs = pixels * (1024 * 512 + 512 * 11 + 9 * 11 * 128) + 11 * 128
    params = 1024 * 512 + 9 * 11 * 128 + 11 * 128
    found = tables()[3]['stdc1_in1k-pre']
    assert found[3:5] == [f'+{params / 1e6:.3f}', f'+{macs / 1e9:.3f}']
