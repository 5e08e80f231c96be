# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What all tools and demos have in common: their command lines."""
import argparse
import ast
import io
import json
import os.path as osp
import re
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import VISBACKENDS
from processes import ROOT
from tiny import RESIDUAL, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd.analysis.benchmark import interleave
from mmseg_textkd.compat import load_stock_tool, shorten_console
from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes
from mmseg_textkd.utils.arguments import merge_options, read_options

TOOLS = sorted(
    path for pattern in ('tools/*.py', 'tools/*/*.py', 'demo/*.py')
    for path in glob(osp.join(ROOT, pattern))
    if "__name__ == '__main__'" in Path(path).read_text(encoding='utf-8'))
# Runs `--help` of each; what takes time to import does not import here.
CODE = """
import argparse, json, os, runpy, sys, time
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmengine', 'mmseg', 'mmcv', 'cv2',
                                  'numpy', 'mmseg_textkd', 'matplotlib',
                                  'PIL', 'onnx', 'onnxruntime', 'gradio'):
            raise ImportError('before --help: ' + name)
sys.meta_path.insert(0, Heavy())
found, spent = {}, {}
def print_help(parser, file=None):
    found[tool] = {
        (a.option_strings or [a.dest])[0]: [a.help, a.nargs]
        for a in parser._actions if a.help != argparse.SUPPRESS}
    parser.format_help()
    spent[tool] = time.process_time() - began
argparse.ArgumentParser.print_help = print_help
for tool in json.loads(sys.argv.pop()):
    sys.argv, began = [tool, '--help'], time.process_time()
    sys.path.insert(0, os.path.dirname(tool))
    try:
        runpy.run_path(tool, run_name='__main__')
    except SystemExit as end:
        assert not end.code, (tool, end.code)
    sys.path.pop(0)
assert max(spent.values()) < 0.5, spent  # of the CPU
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def helps():
    words = [sys.executable, '-c', CODE, json.dumps(TOOLS)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout).items()
    return {osp.relpath(tool, ROOT): options for tool, options in found}


def test_every_argument_is_explained_at_once(helps):
    """Help comes before what takes seconds."""
    assert len(helps) == len(TOOLS) > 25
    mute = [(tool, name) for tool, options in helps.items()
            for name, (text, _) in options.items()
            if not text or text.strip().startswith('default')]
    assert not mute


def test_one_thing_has_one_spelling(helps):
    """The old ones are hidden."""
    old = {
        '--shape', '--height', '--width', '--tower', '--vocabulary', '--names',
        '--json', '--markdown', '--batch', '--text', 'out'
    }
    assert not [(t, old & {*o}) for t, o in helps.items() if old & {*o}]
    for name in ('--size', '--cfg-options', '--device', '--num-images',
                 '--max-pixels', '--model', '--batch-size', '--embeddings',
                 '--templates', '--pretrained'):
        kinds = [o[name][1] for o in helps.values() if name in o]
        assert kinds and kinds == kinds[:1] * len(kinds), (name, kinds)


BUILT = {
    '_build', 'methods', 'results', 'contributing.md', 'model_zoo.md',
    'released_models.md'
}


def pages():
    """All pages, but for what docs/en/conf.py makes of them."""
    yield from Path(ROOT).glob('*.md')
    for folder in ('configs', 'model_zoo', 'docs/en', 'docs/zh_cn'):
        for page in Path(ROOT, folder).rglob('*.md'):
            if not BUILT & {*page.relative_to(ROOT).parts}:
                yield page


def test_python_of_the_guides_imports_the_package_first():
    """Else MMSegmentation wants the compiled ops of mmcv, see the FAQ."""
    late, number = [], 0
    stock = re.compile(r'^(?:from|import) mmseg\.(?:apis|models)\b', re.M)
    for page in pages():
        text = page.read_text(encoding='utf-8')
        code = ''.join(re.findall(r'```python\n(.*?)```', text, re.S))
        before, *after = stock.split(code, 1)
        if after:
            number += 1
            if not re.search(r'^(?:from|import) mmseg_textkd', before, re.M):
                late.append(str(page))
    assert not late and number > 4


def test_pages_of_results_are_in_the_index():
    """Sphinx takes a page that no index has for a fault."""
    index = Path(ROOT, 'docs/en/index.md').read_text(encoding='utf-8')
    found = {
        name
        for name in re.findall(r'^results/(\w+)$', index, re.M)
        if name != 'index'
    }
    pages = Path(ROOT, 'docs/results').glob('*.md')
    assert found == {page.stem for page in pages} - {'README'}


def test_files_that_the_guides_name_exist():
    missing, number = [], 0
    named = re.compile(r'(?<=[`/])((?:tools|configs|demo|docs|apis|text|clip|'
                       r'models|engine|deploy|utils|datasets|evaluation)/'
                       r'[\w./-]+\.(?:py|sh|yaml|md))`')
    for page in pages():
        text = page.read_text(encoding='utf-8')
        for name in named.findall(text) * (page.name != 'changelog.md'):
            number += 1
            if not any(
                    osp.exists(osp.join(ROOT, folder, name))
                    for folder in ('', 'mmseg_textkd', page.parent)):
                missing.append((str(page), name))
    # `KEY` stands for any.
    assert {name
            for _, name in missing} <= {'configs/_base_/text/vit-b16_KEY.py'}
    assert number > 80


def commands():
    """Commands of the pages that call a tool: page and words."""
    for page in pages():
        text = page.read_text(encoding='utf-8')
        blocks = re.findall(r'```(?:shell|bash)\n(.*?)```', text, re.S)
        for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
            found = re.search(r'python ((?:tools|demo)/\S+\.py)(.*)', line)
            if found and found[1] != 'tools/stock_tool.py':
                words = re.split(r' [|>]|&&', found[2])[0]
                yield page.name, found[1], shlex.split(words, comments=True)


def test_commands_of_the_guides(tmp_path, monkeypatch, capsys):
    """They parse, and none is in an old spelling."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'net_stock').mkdir()  # what has been deployed before
    (tmp_path / 'demo').symlink_to(osp.join(ROOT, 'demo'))
    tools, faults, number = {}, [], 0
    for page, path, words in commands():
        if path not in tools:
            tools[path] = load_tool(f'../{path}')
        if not hasattr(tools[path], 'parse_args'):
            continue
        # What a page leaves out.
        words = [word for word in words if word != '...']
        try:
            args = tools[path].parse_args(words)
        except TypeError:  # as MMSegmentation's
            monkeypatch.setattr(sys, 'argv', [path, *words])
            args = tools[path].parse_args()
        except SystemExit:
            faults.append((page, path, words, capsys.readouterr().err))
            continue
        given = {key for key, value in vars(args).items() if value is not None}
        faults += [(page, path, words, k) for k in given if k[:4] == 'old_']
        number += 1
    assert not faults, "\n".join(map(str, faults))
    assert number > 80


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_ours_have_the_arguments_of_the_stock_tools(name, helps, monkeypatch):
    taken = []
    stock = load_stock_tool(name)
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    monkeypatch.setattr('argparse.ArgumentParser.print_help',
                        lambda self: taken.append(self))
    with pytest.raises(SystemExit):
        stock.parse_args()
    theirs = {(a.option_strings or [a.dest])[0] for a in taken[0]._actions}
    assert theirs - {'--local_rank'} < set(helps[f'tools/{name}'])


def test_settings_are_read_as_mmengine_does():
    words = ['a.b=1', 'c=[(1,2),x]', 'd=true', 'e=1,2', 'f=g=h', 'i=']
    parser = argparse.ArgumentParser()
    parser.add_argument('--o', nargs='+', action=DictAction)
    assert read_options(words) == parser.parse_args(['--o', *words]).o
    assert read_options(None) == {}
    cfg = Config(dict(a=dict(b=0)))
    merge_options(cfg, ['a.b=3'])
    assert cfg.a.b == 3


def test_settings_given_twice_add_up():
    """As with MMEngine's `DictAction`, in subcommands too."""
    seen = 0
    for tool in TOOLS:
        for call in ast.walk(ast.parse(Path(tool).read_text())):
            if isinstance(call, ast.Call) and call.args and getattr(
                    call.args[0], 'value', '') in ('--cfg-options', '--vars'):
                keys = {k.arg: k.value for k in call.keywords}
                assert keys['action'].value == 'extend', tool
                seen += 1
    assert seen >= 14


def test_bad_settings_are_refused():
    for word in ('junk', '=1'):
        with pytest.raises(
                ValueError, match=f'--cfg-options {word}.*key=value'):
            read_options([word])
    with pytest.raises(ValueError, match=r'--cfg-options a.b.c=1.*not fit'):
        merge_options(Config(dict(a=dict(b=[1, 2]))), ['a.b.c=1'])


def test_what_nobody_can_act_upon_is_not_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MMLogger, 'callHandlers', MMLogger.callHandlers)
    shorten_console()
    file = tmp_path / 'log'
    log = MMLogger('noise', log_file=str(file))
    log.warning('"FileClient" will be deprecated in future.')
    log.warning('The prefix is not set in metric class IoUMetric.')
    log.warning('Failed to search registry with scope "mmseg" in the '
                '"function" registry tree.')
    log.warning('The prefix of your metric is odd.')
    log.info('Config:\nmodel = dict()')
    said = capsys.readouterr()
    assert 'is odd' in said.out + said.err
    assert 'model' not in said.out + said.err
    written = file.read_text()
    assert 'model = dict()' in written and 'is odd' in written
    for text in ('FileClient', 'metric class', 'function'):
        assert text not in written


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_for_terminals(tmp_path, monkeypatch, terminal):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, 'stderr', shown)
    interleave(dict(a=lambda: 0.), runs=3, warmup=1)
    generate_toy_scenes(
        tmp_path / 'toys', 1, 1, height=64, width=128, progress=True)
    for task in ('Measuring: 100%', 'Drawing: 100%'):
        assert (task in shown.getvalue()) == terminal


def test_logs_of_the_guide(tmp_path):
    """What a run logs is in TensorBoard; W&B's lines name what there is."""
    guide = Path(ROOT, 'docs/en/user_guides/training.md').read_text()
    found = {}
    for block in re.findall(r'```python\n(vis_backends.*?)```', guide, re.S):
        values = {}
        exec(block, values)
        found[values['vis_backends'][-1]['type']] = values['visualizer']
    assert sorted(found) == ['TensorboardVisBackend', 'WandbVisBackend']
    assert all(VISBACKENDS.get(name) for name in found)
    cfg = tiny_config(
        tmp_path, RESIDUAL, dict(switch_at=2, log_interval=1), max_iters=3)
    board = found['TensorboardVisBackend']
    run(cfg, visualizer=dict(board, type='SegLocalVisualizer'))
    from tensorboard.backend.event_processing.event_accumulator import \
        EventAccumulator
    events, = tmp_path.glob('work/*/vis_data/events*')
    log = EventAccumulator(str(events)).Reload()
    assert [e.value for e in log.Scalars('text_stage')] == [1, 1, 2]
    assert log.Scalars('mIoU')
