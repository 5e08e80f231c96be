# Copyright (c) mmseg_textkd contributors. All rights reserved.
import dataclasses
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import matplotlib.image
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
from mmseg_textkd.text.phrases import phrase_vectors
from mmseg_textkd.text.vocabulary import Vocabulary

TOOL = Path(__file__).parents[2] / 'tools' / 'encode_text.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'own.safetensors'


def imported(folder, names, **meta):
    """Write vectors of names; returns them and the options to import them."""
    vectors, file = torch.randn(len(names), 16), folder / 'n.json'
    np.save(folder / 'v.npy', vectors.numpy())
    meta = dict(names=names, template='a photo of a {}', **meta)
    file.write_text(json.dumps(meta))
    options = ['--import', f'{folder}/v.npy', '--names-file', str(file)]
    return F.normalize(vectors, dim=1), options


def test_dataset_as_a_command(tmp_path, out, clip_name):
    """The one run in a process of its own."""
    words = f'toy_scenes --model {clip_name} --templates photo --closest 2'
    done = start('python', TOOL, *words.split(), '--out', out, cwd=tmp_path)
    assert done.status == 0, done.output
    assert 'Encoding text' not in done.output  # a bar is for terminals
    made = TextEmbeddings.load(out)
    direct = encode_classes('toy_scenes', clip_name, 'photo')
    assert made.sha256 == direct.sha256
    i, j = geometry(made.vectors)['closest_pair']
    assert f'{made.names[i]} - {made.names[j]}' in done.output
    assert made.sha256 in done.output


def test_names_and_bank(tool, tmp_path, out, clip_name, capsys):
    options = ['--model', clip_name, '--out', str(out), '--templates']
    argv = ['road, sky,car', *options, 'none', '--keep-bank']
    tool.main(argv)
    made = TextEmbeddings.load(out)
    assert made.names == ('road', 'sky', 'car')
    assert made.bank.shape[:2] == (3, 1)
    before = out.read_bytes()
    assert '--force' in fails(tool, capsys, *argv)
    assert out.read_bytes() == before
    (tmp_path / 'own.txt').write_text('road: road, street\nsky\n')
    tool.main([f'{tmp_path}/own.txt', *options, 'a {} there', '--force'])
    made = TextEmbeddings.load(out)
    assert made.phrases == (('road', 'street'), ('sky', ))
    assert made.templates == ('a {} there', )


def test_import_under_a_datasets_names(tool, tmp_path, out, capsys):
    """Vectors say 'Traffic Light', Cityscapes says 'traffic light'."""
    names = Vocabulary.from_spec('cityscapes').names
    vectors, options = imported(
        tmp_path, [name.title() for name in reversed(names)],
        model='OpenAI CLIP ViT-B/16')
    argv = [*options, '--out', str(out)]
    tool.main(['cityscapes', *argv])
    made = TextEmbeddings.load(out)
    assert made.names == names
    assert torch.allclose(made.vectors, vectors.flip(0), atol=1e-6)
    assert made.model == 'OpenAI CLIP ViT-B/16'
    assert 'pavement' in fails(tool, capsys, 'camvid', *argv, '--force')
    assert TextEmbeddings.load(out).sha256 == made.sha256


def test_import_by_phrase(tool, tmp_path, out, capsys):
    """Rows of phrases become classes, and a bank of what was found."""
    unit, options = imported(tmp_path,
                             ['Street', 'sky', 'road', 'auto', 'car', 'bus'])
    file = tmp_path / 'c.txt'
    file.write_text('sky\nroad: road, lane, street\ncar: car, auto\n')
    argv = [str(file), *options, '--by-phrase', '--keep-bank', '--out', out]
    tool.main(list(map(str, argv)))
    made = TextEmbeddings.load(out)
    assert made.names == ('sky', 'road', 'car')
    assert made.phrases == (('sky', ), ('road', 'street'), ('car', 'auto'))
    assert made.templates == ('a photo of a {}', )
    for k, rows in enumerate(([1], [2, 0], [4, 3])):
        assert torch.allclose(made.bank[k][made.bank_mask[k]], unit[rows])
        mean = F.normalize(unit[rows].mean(0), dim=0)
        assert torch.allclose(made.vectors[k], mean, atol=1e-6)
    # Vectors that come as the mean of several templates are one a phrase.
    several = dataclasses.replace(made, templates=('a {}', 'the {}'))
    vectors, mask = phrase_vectors(several)
    assert torch.equal(mask, made.bank_mask)
    assert torch.allclose(vectors[mask], made.bank[mask])
    # A word that is another one in another case.
    unit, options = imported(tmp_path, ['Polish', 'polish', 'bus'])
    file.write_text('x: Polish\ny: polish\nz: Bus\n')
    argv = [str(file), *options, '--by-phrase', '--out', out, '--force']
    tool.main(list(map(str, argv)))
    assert torch.allclose(TextEmbeddings.load(out).vectors, unit, atol=1e-6)
    made = TextEmbeddings.load(out)
    file.write_text('bus\ntree: tree, bush\n')
    assert "no vectors of ['tree']" in fails(tool, capsys, *argv, '--force')
    assert TextEmbeddings.load(out).sha256 == made.sha256


def test_a_file_with_a_comma_is_a_file(tool, tmp_path, out):
    file = tmp_path / 'a, b' / 'c,d.txt'
    file.parent.mkdir()
    file.write_text('sky\nroad: road, street\n')
    tool.main([str(file), '--model', 'toyclip', '--out', str(out)])
    assert TextEmbeddings.load(out).names == ('sky', 'road')
    # A list that is longer than the name of a file may be is none.
    names = tuple(f'class number {k}' for k in range(30))
    args = tool.parse_args(
        [','.join(names), '--model', 'toyclip', '--out', 'none.safetensors'])
    assert tuple(args.names.split(',')) == names and args.classes is None


def test_looking_at_a_file(tool, tmp_path, capsys):
    """--center changes the report and not the file."""
    vectors = F.normalize(torch.randn(30, 8) + 2, dim=1)
    file, picture = tmp_path / 'a.safetensors', tmp_path / 'new' / 'a.png'
    names = tuple(f'class with a long name {k}' for k in range(30))
    TextEmbeddings(vectors, names).save(file)
    before = file.read_bytes()
    tool.main([str(file)])
    raw = capsys.readouterr().out
    options = f'--center --closest 3 --heatmap {picture}'
    tool.main([str(file), *options.split()])
    centered = capsys.readouterr().out
    assert f'mean {geometry(vectors)["mean"]:.3f}' in raw
    assert ', '.join(names) in raw
    assert 'after centering' in centered and 'after centering' not in raw
    assert centered.split('closest pairs:')[1].count('class with') == 6
    assert picture.read_bytes()[1:4] == b'PNG'
    image = matplotlib.image.imread(picture)[..., :3]
    # No label is cut off: the rim is white.
    for rim in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (rim == 1).all()
    # A drawn matrix: many colors, and as large as its labels need.
    assert min(image.shape[:2]) > 1000
    assert len(np.unique(image[::7, ::7].reshape(-1, 3), axis=0)) > 200
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


def test_prefetch_from_a_hub(tool, tmp_path, capsys):
    """Download once; from then on the hub is not needed."""
    folder, cache = tmp_path / 'served', tmp_path / 'cache'
    save_model(folder, 'clip', own_words=False)
    handler = type('Handler', (Hub, ), dict(folder=folder))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    words = f'--prefetch --model hf-hub:org/name --cache-dir {cache}'
    hub = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}')
    hub.update(HF_HUB_OFFLINE='0', no_proxy='127.0.0.1')
    try:
        words = ('python', '-c', NEW_HUB, *words.split())
        done = start(*words, cwd=tmp_path, fork=True, **hub)
    finally:
        server.shutdown()
        server.server_close()
    assert done.status == 0, done.output
    assert 'hf-hub:org/name works (D = 24)' in done.output
    offline = TextTower('hf-hub:org/name', cache_dir=cache)
    assert offline.checksum() == TextTower(f'local-dir:{folder}').checksum()
    # What is there already, in a folder too.
    tool.main(['--prefetch', '--model', f'local-dir:{folder}'])
    assert 'works (D = 24)' in capsys.readouterr().out


@each_case('argv, words', [
    ('', 'nothing to encode'),
    ('toy_scenes --model toyclip', '--out is needed'),
    ('toy_scenes --out x.safetensors', '--model is needed'),
    ('toy_scenes --out x.pt --model m', '.safetensors'),
    ('toy_scenes --names a --model m', 'once'),
    ('--import v.npy --out x.safetensors', 'needs the names'),
    ('--import v.npy --names a --model m', 'no sense'),
    ('--names-file n.json --model m', 'belongs to --import'),
    ('camvid --by-phrase --model m', 'belongs to --import'),
    ('--import v.npy --names a --by-phrase', 'names-file'),
    ('--prefetch', '--prefetch needs --model'),
    ('x.safetensors --out y.safetensors', 'looked at'),
    ('x.safetensors', 'no embeddings file'),
    ('nonsense --out x.safetensors --model m', 'nonsense'),
    ('toy_scenes --out x.safetensors --model local-dir:gone',
     'Three remedies'),
    ('--names a,a --out x.safetensors --model m', 'twice'),
    ('--names a,,b --out x.safetensors --model m', 'empty'),
    ('--names a,b --import gone.npy --out x.safetensors', 'gone.npy'),
])
def test_wrong_use(tool, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    said = fails(tool, capsys, *argv.split())
    assert words in said and 'Traceback' not in said
    assert list(tmp_path.iterdir()) == []
