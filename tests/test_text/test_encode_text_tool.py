# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from processes import start
from tiny_clip import save_model
from tool_modules import fails, load_tool

from mmseg_textkd.clip.text_tower import TextTower
from mmseg_textkd.text.embedding_file import TextEmbeddings
from mmseg_textkd.text.embedding_statistics import geometry
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.text.vocabulary import Vocabulary

TOOL = Path(__file__).parents[2] / 'tools' / 'encode_text.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


def test_dataset_as_a_command(tmp_path, clip_name):
    """The one run in a process of its own."""
    out = tmp_path / 'toy.safetensors'
    done = start(
        'python',
        TOOL,
        'toy_scenes',
        *('--model', clip_name),
        *('--templates', 'photo'),
        *('--out', out),
        *('--closest', '2'),
        cwd=tmp_path)
    assert done.status == 0, done.output
    assert 'Encoding text' not in done.output  # a bar is for terminals
    made = TextEmbeddings.load(out)
    direct = encode_classes('toy_scenes', clip_name, 'photo')
    assert made.sha256 == direct.sha256
    i, j = geometry(made.vectors)['closest_pair']
    assert f'{made.names[i]} - {made.names[j]}' in done.output
    assert made.sha256 in done.output


def test_names_and_bank(tool, tmp_path, clip_name, capsys):
    out = tmp_path / 'own.safetensors'
    argv = [
        'road, sky,car', '--model', clip_name, '--templates', 'none',
        '--keep-bank', '--out',
        str(out)
    ]
    tool.main(argv)
    made = TextEmbeddings.load(out)
    assert made.names == ('road', 'sky', 'car')
    assert made.bank.shape[:2] == (3, 1)
    before = out.read_bytes()
    assert '--force' in fails(tool, capsys, *argv)
    assert out.read_bytes() == before
    tool.main([*argv, '--force'])


def test_names_file(tool, tmp_path, clip_name):
    (tmp_path / 'own.txt').write_text('road: road, street\nsky\n')
    out = tmp_path / 'own.safetensors'
    tool.main([
        str(tmp_path / 'own.txt'), '--model', clip_name, '--templates',
        'a {} there', '--out',
        str(out)
    ])
    made = TextEmbeddings.load(out)
    assert made.phrases == (('road', 'street'), ('sky', ))
    assert made.templates == ('a {} there', )


def test_import_under_a_datasets_names(tool, tmp_path, capsys):
    """Vectors say 'Traffic Light', Cityscapes says 'traffic light'."""
    names = Vocabulary.from_spec('cityscapes').names
    rows = list(reversed(range(len(names))))
    vectors = torch.randn(len(names), 16)
    np.save(tmp_path / 'v.npy', vectors.numpy())
    (tmp_path / 'n.json').write_text(
        json.dumps(
            dict(
                names=[names[row].title() for row in rows],
                model='OpenAI CLIP ViT-B/16',
                template='a photo of a {}')))
    out = tmp_path / 'city.safetensors'
    argv = [
        '--import', tmp_path / 'v.npy', '--names-file', tmp_path / 'n.json',
        '--out', out
    ]
    tool.main(['cityscapes', *map(str, argv)])
    made = TextEmbeddings.load(out)
    assert made.names == names
    expected = F.normalize(vectors, dim=1)[rows]
    assert torch.allclose(made.vectors, expected, atol=1e-6)
    assert made.model == 'OpenAI CLIP ViT-B/16'
    said = fails(tool, capsys, 'camvid', *argv, '--force')
    assert 'pavement' in said
    assert TextEmbeddings.load(out).sha256 == made.sha256


def test_import_by_phrase(tool, tmp_path, capsys):
    """Rows of phrases become classes, and a bank of what was found."""
    phrases = ['Street', 'sky', 'road', 'auto', 'car', 'bus']
    vectors = torch.randn(6, 16)
    np.save(tmp_path / 'v.npy', vectors.numpy())
    (tmp_path / 'n.json').write_text(
        json.dumps(dict(names=phrases, template='a photo of a {}')))
    (tmp_path /
     'c.txt').write_text('sky\nroad: road, lane, street\ncar: car, auto\n')
    out = tmp_path / 'own.safetensors'
    argv = [
        str(tmp_path / 'c.txt'), '--import',
        str(tmp_path / 'v.npy'), '--names-file',
        str(tmp_path / 'n.json'), '--by-phrase', '--keep-bank', '--out',
        str(out)
    ]
    tool.main(argv)
    made = TextEmbeddings.load(out)
    assert made.names == ('sky', 'road', 'car')
    assert made.phrases == (('sky', ), ('road', 'street'), ('car', 'auto'))
    assert made.templates == ('a photo of a {}', )
    unit = F.normalize(vectors, dim=1)
    for k, rows in enumerate(([1], [2, 0], [4, 3])):
        assert torch.allclose(made.bank[k][made.bank_mask[k]], unit[rows])
        mean = F.normalize(unit[rows].mean(0), dim=0)
        assert torch.allclose(made.vectors[k], mean, atol=1e-6)
    (tmp_path / 'c.txt').write_text('sky\ntree: tree, bush\n')
    assert "no vectors of ['tree']" in fails(tool, capsys, *argv, '--force')
    assert TextEmbeddings.load(out).sha256 == made.sha256


def test_looking_at_a_file(tool, tmp_path, capsys):
    """--center changes the report and not the file."""
    vectors = F.normalize(torch.randn(30, 8) + 2, dim=1)
    file = tmp_path / 'a.safetensors'
    TextEmbeddings(vectors,
                   tuple(f'class with a long name {k}'
                         for k in range(30))).save(file)
    before = file.read_bytes()
    tool.main([str(file)])
    raw = capsys.readouterr().out
    picture = tmp_path / 'new' / 'a.png'
    tool.main(
        [str(file), '--center', '--closest', '3', '--heatmap',
         str(picture)])
    centered = capsys.readouterr().out
    assert f'mean {geometry(vectors)["mean"]:.3f}' in raw
    assert 'after centering' in centered and 'after centering' not in raw
    assert centered.split('closest pairs:')[1].count('class with') == 6
    assert picture.read_bytes()[1:4] == b'PNG'
    import matplotlib.image
    image = matplotlib.image.imread(picture)[..., :3]
    # No label is cut off: the rim is white.
    for rim in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (rim == 1).all()
    # A drawn matrix: many colors, and as large as its labels need.
    assert min(image.shape[:2]) > 1000
    assert len({tuple(c) for c in image[::7, ::7].reshape(-1, 3)}) > 200
    # The diagonal, which is 1 everywhere, is left out of the colors.
    gray = (abs(image - .85) < .01).all(axis=-1).nonzero()
    assert len(gray[0]) > 30 * 100 and np.corrcoef(gray)[0, 1] > .9
    assert file.read_bytes() == before


class Hub(BaseHTTPRequestHandler):
    """The little of a model hub's protocol that a download needs."""

    folder: Path

    def do_HEAD(self):
        """Answer HEAD and, but for the body, GET."""
        repo, _, name = self.path.partition('/resolve/main/')
        file = self.folder / name
        found = repo == '/org/name' and name and file.is_file()
        self.send_response(200 if found else 404)
        data = file.read_bytes() if found else b''
        if found:
            self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
        else:
            self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        return data

    def do_GET(self):
        """Answer GET."""
        self.wfile.write(self.do_HEAD())

    def log_message(self, *args):
        """Keep quiet."""


# The tool, where timm has not imported what reads the variables of the hub.
NEW_HUB = f"""
import runpy, sys
for name in [n for n in sys.modules if n.startswith('huggingface_hub')]:
    del sys.modules[name]
sys.argv[0] = {str(TOOL)!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_prefetch_from_a_hub(tmp_path):
    """Download once; from then on the hub is not needed."""
    folder, cache = tmp_path / 'served', tmp_path / 'cache'
    save_model(folder, 'clip', own_words=False)
    handler = type('Handler', (Hub, ), dict(folder=folder))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = start(
            'python',
            '-c',
            NEW_HUB,
            *('--prefetch', '--model', 'hf-hub:org/name'),
            *('--cache-dir', cache),
            cwd=tmp_path,
            fork=True,
            HF_HUB_OFFLINE='0',
            HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
            no_proxy='127.0.0.1')
    finally:
        server.shutdown()
        server.server_close()
    assert done.status == 0, done.output
    assert 'hf-hub:org/name works (D = 24)' in done.output
    offline = TextTower('hf-hub:org/name', cache_dir=cache)
    assert offline.checksum() == TextTower(f'local-dir:{folder}').checksum()


def test_prefetch_of_what_is_there(tool, clip_name, capsys):
    tool.main(['--prefetch', '--model', clip_name])
    assert 'works (D = 24)' in capsys.readouterr().out


@each_case('argv, words', [
    ([], 'nothing to encode'),
    (['toy_scenes', '--model', 'toyclip'], '--out is needed'),
    (['toy_scenes', '--out', 'x.safetensors'], '--model is needed'),
    (['toy_scenes', '--out', 'x.pt', '--model', 'm'], '.safetensors'),
    (['toy_scenes', '--names', 'a', '--model', 'm'], 'once'),
    (['--import', 'v.npy', '--out', 'x.safetensors'], 'needs the names'),
    (['--import', 'v.npy', '--names', 'a', '--model', 'm'], 'no sense'),
    (['--names-file', 'n.json', '--model', 'm'], 'belongs to --import'),
    (['camvid', '--by-phrase', '--model', 'm'], 'belongs to --import'),
    (['--import', 'v.npy', '--names', 'a', '--by-phrase'], 'names-file'),
    (['--prefetch'], '--prefetch needs --model'),
    (['x.safetensors', '--out', 'y.safetensors'], 'looked at'),
    (['x.safetensors'], 'no embeddings file'),
    (['nonsense', '--out', 'x.safetensors', '--model', 'm'], 'nonsense'),
    (['toy_scenes', '--out', 'x.safetensors', '--model', 'local-dir:gone'
      ], 'Three remedies'),
    (['--names', 'a,a', '--out', 'x.safetensors', '--model', 'm'], 'twice'),
    (['--names', 'a,,b', '--out', 'x.safetensors', '--model', 'm'], 'empty'),
    (['--names', 'a,b', '--import', 'gone.npy', '--out', 'x.safetensors'
      ], 'gone.npy'),
])
def test_wrong_use(tool, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    said = fails(tool, capsys, *argv)
    assert words in said
    assert 'Traceback' not in said
    assert list(tmp_path.iterdir()) == []
