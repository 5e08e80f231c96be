# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What stage 1 must not have."""
import json

from processes import start
from tiny import CLASSES

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
import json, pathlib, sys
import fate_hook, tiny
text = dict(
    tiny.PROMPTS, embeddings=dict(type='ClassEmbeddings', file={file!r}))
cfg = tiny.tiny_config(
    pathlib.Path({folder!r}), text, dict(switch_at={switch}), max_iters=4)
cfg.custom_hooks.insert(0, dict(type='FateHook'))
tiny.run(cfg)
print('open_clip is imported:', 'open_clip' in sys.modules)
'''


def test_stage_1_trains_without_either(tmp_path):
    """And stage 2, which needs open_clip, says so."""
    file = str(tmp_path / 'text.safetensors')
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)
    code = [
        TRAIN.format(switch=switch, folder=str(tmp_path), file=file)
        for switch in (None, 2)
    ]
    code = BARE + ''.join(code)
    done = start('python', '-c', code, cwd=tmp_path, fork=True)
    assert 'open_clip is imported: False' in done.output
    facts = json.loads((tmp_path / 'work/report_0.json').read_text())
    assert facts['iters'] == [0, 1, 2, 3]
    assert facts['open_clip'] == [False] * 4 and facts['towers'] == []
    assert all('text.context' not in n for row in facts['learns'] for n in row)
    assert done.status != 0
    assert 'pip install open_clip_torch' in done.output
