# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""docs/en/runtimes.md and the tool that makes it."""
import json

import pytest
from processes import start
from tool_modules import ROOT, load_tool

from mmseg_textkd.deploy.runtimes import RUNTIMES


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis_tools/runtimes.py')


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


@pytest.mark.runtimes
def test_segnext_in_openvino(tmp_path):
    """Its compiler ended the process on the graph that it traced itself."""
    pytest.importorskip('openvino')
    done = start(
        'python',
        f'{ROOT}/tools/analysis_tools/runtimes.py',
        *('--networks', 'segnext_mscan-t', '--cells', 'openvino:fp32'),
        *('--size', '64', '128', '--num-images', '1'),
        *('--work-dir', 'folders', '--out', 'page.md'),
        cwd=str(tmp_path),
        fork=False)
    assert done.status == 0, done.output
    row, = (
        r for r in (tmp_path / 'page.md').read_text().split('\n')
        if 'segnext' in r)
    assert float(row.split('|')[2].split(',')[0]) < 1e-4


def test_networks_ran_in_float32_and_are_near():
    """The page that is shipped; an empty cell has not been run."""
    page = (ROOT / 'docs' / 'en' / 'runtimes.md').read_text(encoding='utf-8')
    lines = [
        line.split('|')[1:-1] for line in page.split('## Time')[0].split('\n')
        if line.startswith('|')
    ]
    columns = {
        name.strip(): [cell.split(',')[0].strip() for cell in cells if
                       cell.strip()]
        for name, _, *cells in zip(*lines)
    }  # yapf: disable
    assert len(columns['network']) == 15
    for runtime in RUNTIMES:
        cells = columns.get(f'{runtime} fp32', [])
        least = 5 if runtime in ('litert', 'executorch') else 15
        # TorchScript is what PyTorch itself runs.
        assert len(cells) >= least or runtime == 'torchscript'
        assert all(float(cell) < 1e-4 for cell in cells)
