# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What stage 1 must not have, and what stage 2 must not leave behind."""
import json

import pytest
from processes import load, start
from tiny import CLASSES

from mmseg_textkd.clip import TextTower
from mmseg_textkd.text.encode_classes import encode_classes

# A machine without open_clip and without a network.
BARE = '''
import socket, sys
assert 'open_clip' not in sys.modules
for name in [n for n in sys.modules if n.startswith('huggingface_hub')]:
    del sys.modules[name]  # timm imports it
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('open_clip', 'huggingface_hub'):
            raise ModuleNotFoundError(f'BLOCKED: {name}', name=name)
sys.meta_path.insert(0, Blocker())
class NoSocket(socket.socket):
    def connect(self, address):
        raise OSError(f'BLOCKED: {address}')
    connect_ex = connect
def no_address(*args, **kwargs):
    raise OSError(f'BLOCKED: {args}')
socket.socket, socket.getaddrinfo = NoSocket, no_address
'''
TRAIN = '''
import json, pathlib
import fate_hook, tiny
text = dict(
    tiny.PROMPTS, embeddings=dict(type='ClassEmbeddings', file={file!r}))
cfg = tiny.tiny_config(
    pathlib.Path({folder!r}), text, dict(switch_at={switch}), max_iters=4)
cfg.custom_hooks.insert(0, dict(type='FateHook'))
cfg.default_hooks.checkpoint.interval = 4
runner = tiny.run(cfg)
groups = runner.optim_wrapper.optimizer.param_groups
names = {{id(p): n for n, p in runner.model.named_parameters()}}
json.dump(
    dict(
        optimized=[names.get(id(p), 'UNKNOWN')
                   for g in groups for p in g['params']],
        inside=[type(m).__name__ for m in runner.model.modules()],
        tower_graded=[
            n for m in runner.model.modules() if getattr(m, 'tower', None)
            for n, p in m.tower.named_parameters()
            if p.requires_grad or p.grad is not None]),
    open(f'{{cfg.work_dir}}/facts.json', 'w'))
import sys
print('open_clip is imported:', 'open_clip' in sys.modules)
'''


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('light')
    file = str(root / 'text.safetensors')
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)

    def python(name, *parts):
        (root / name).mkdir()
        code = [
            part if part is BARE else TRAIN.format(
                switch=part, folder=str(root / name), file=file)
            for part in parts
        ]
        return start('python', '-c', ''.join(code), cwd=root / name, fork=True)

    return root, dict(
        bare=python('bare', BARE, None, 2),
        both_stages=python('both_stages', 2))


def read(root, name, file):
    return json.loads((root / name / 'work' / file).read_text())


def test_stage_1_trains_without_either(runs):
    root, outcomes = runs
    assert 'open_clip is imported: False' in outcomes['bare'].output
    facts = read(root, 'bare', 'report_0.json')
    assert facts['iters'] == [0, 1, 2, 3]
    assert facts['open_clip'] == [False] * 4 and facts['towers'] == []
    assert all('text.context' not in n for row in facts['learns'] for n in row)


def test_the_block_holds(runs):
    """Stage 2 needs open_clip, says so, and has run stage 1 before."""
    done = runs[1]['bare']
    assert done.status != 0
    assert 'pip install open_clip_torch' in done.output


def test_stage_2_leaves_no_trace_of_the_tower(runs):
    root, outcomes = runs
    done = outcomes['both_stages']
    assert done.status == 0, done.output[-3000:]
    assert 'open_clip is imported: True' in done.output
    report = read(root, 'both_stages', 'report_0.json')
    assert report['open_clip'][:2] == [False, False]
    assert report['open_clip'][3] is True
    # Bit for bit what a fresh one is.
    assert report['towers'] == [TextTower('toyclip').checksum()]
    facts = read(root, 'both_stages', 'facts.json')
    assert facts['tower_graded'] == []
    assert 'ContextPromptLearner' in facts['inside']
    assert not {'TextTower', 'Transformer', 'CLIP'} & set(facts['inside'])
    assert 'UNKNOWN' not in facts['optimized']
    assert 'decode_head.conv_seg.text.context' in facts['optimized']
    path = root / 'both_stages' / 'work' / 'iter_4.pth'
    saved = load(path)
    assert {k
            for k in saved['state_dict'] if '.text.' in k} == {
                f'decode_head.conv_seg.text.{key}'
                for key in ('class_embeddings', 'context', 'started')
            }
    # One entry for each parameter that has ever had a step.
    params = saved['optimizer']['param_groups']
    assert sum(len(g['params']) for g in params) == len(facts['optimized'])
    tower = sum(p.numel() for p in TextTower('toyclip').parameters())
    own = sum(v.numel() for v in saved['state_dict'].values())
    assert path.stat().st_size < 4 * (3 * own + tower)
