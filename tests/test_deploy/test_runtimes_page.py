# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""docs/en/runtimes.md and the tool that makes it."""
import json

import pytest
from analysis_tools import ROOT, load_tool

from mmseg_textkd.deploy.runtimes import RUNTIMES


@pytest.fixture(scope='module')
def tool():
    return load_tool('runtimes')


def test_cells_say_what_the_folders_say(tool, tmp_path):
    found = dict(difference=2e-5, largest=10., differing=0, pixels=1000)
    for runtime, differing in ('ncnn', 0), ('onnx', 25):
        path = tmp_path / f'fast_scnn_{runtime}_fp32'
        path.mkdir()
        checks = [dict(found, differing=differing)]
        (path / 'network.json').write_text(json.dumps(dict(checks=checks)))
    argv = ['--work-dir', str(tmp_path), '--out', str(tmp_path / 'page.md')]
    args = tool.complete(tool.parse_args(argv))
    assert args.cells == tool.CELLS and len(args.networks) == 15
    text = tool.page(args, None)
    header, _, *rows = [r for r in text.splitlines() if r.startswith('|')]
    assert header == '| network | onnx fp32 | ncnn fp32 |'
    assert '| fast_scnn | 2.0e-06, 97.50 % | 2.0e-06 |' in rows
    assert '| pidnet-s |  |  |' in rows and len(rows) == 15
    times = dict(
        ratio=.5, to_stock=1.001, to_stock_ci95=[.99, 1.01], share_of_peak=.42)
    arms = {'eager': {}, 'ncnn fp32': times, 'ncnn fp32 stock': {}}
    results = dict(rows=[dict(network='fast_scnn', arms=arms)])
    assert tool.time_rows(results) == [('fast_scnn', 'ncnn fp32', '0.500',
                                        '1.001 [0.990, 1.010]', '42 %')]


def test_every_network_ran_in_three_runtimes_and_some_in_two_more():
    """The page that is shipped; in fp32 a cell is there only if it is near."""
    page = (ROOT / 'docs' / 'en' / 'runtimes.md').read_text(encoding='utf-8')
    header, _, *rows = [r for r in page.splitlines() if r.startswith('|')]
    cells = [[c.strip() for c in row.split('|')[1:-1]] for row in rows]
    columns = dict(
        zip([c.strip() for c in header.split('|')[1:-1]], zip(*cells)))
    assert len(cells) == 15
    for runtime in 'onnx', 'openvino', 'ncnn':
        assert all(columns[f'{runtime} fp32']), runtime
    for runtime in 'litert', 'executorch':
        assert sum(map(bool, columns[f'{runtime} fp32'])) >= 5, runtime
    assert {c.split()[0] for c in list(columns)[1:]} <= set(RUNTIMES)
