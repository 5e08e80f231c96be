# Copyright (c) mmseg_textkd contributors. All rights reserved.
import json
import math
import os
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from tiny import assert_equal

from mmseg_textkd.text.embedding_file import EmbeddingFileError, TextEmbeddings
from mmseg_textkd.text.embedding_statistics import (ce_floor, center,
                                                    closest_pairs, geometry)

NAMES = ('sky', 'road', 'traffic sign', 'car')
SOME = torch.ones(4, 2).bool()


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def set_one(value):
    vectors = unit(4, 6)
    vectors[2, 1] = value
    return vectors


def make(**kwargs):
    phrases = (('sky', ), ('road', 'street'), ('sign', ), ('car', ))
    fields = dict(vectors=unit(4, 6), names=NAMES, phrases=phrases)
    fields.update(model='toyclip', library='open_clip_torch 0')
    fields.update(templates=('a photo of a {}.', 'ünïcode {}'))
    return TextEmbeddings(**fields | kwargs)


def with_bank():
    mask = torch.arange(4) < torch.tensor([2, 4, 2, 2])[:, None]
    return make(bank=unit(4, 4, 6, seed=1) * mask[..., None], bank_mask=mask)


@pytest.fixture
def file(tmp_path):
    """A file with embeddings."""
    make().save(tmp_path / 'a.safetensors')
    return tmp_path / 'a.safetensors'


def refused(words, file, load=TextEmbeddings.load):
    with pytest.raises(EmbeddingFileError, match=f'(?s){words}') as info:
        load(file)
    assert str(file) in str(info.value)


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path, )


@each_case('build', [make, with_bank])
def test_round_trip(tmp_path, build):
    before, file = build(), tmp_path / 'new' / 'text.safetensors'
    before.save(file)
    after = TextEmbeddings.load(file)
    assert_equal(vars(after), vars(before))
    assert after.sha256 == before.sha256 and after.dim == 6
    # Nothing else is left, and others may read it as any new file.
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    plain = tmp_path / 'plain'
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_hash_covers_everything():
    changes = [
        dict(vectors=unit(4, 6, seed=5)),
        dict(names=('sky', 'road', 'car', 'traffic sign')),
        dict(phrases=()),
        dict(templates=('{}', )),
        *(dict({key: 'x'}) for key in ('model', 'pretrained', 'library')), {}
    ]
    hashes = {make(**change).sha256 for change in changes}
    assert len(hashes | {with_bank().sha256}) == 9


def rewrite(file, tensors=None, **meta):
    """Change a file as somebody with an editor could."""
    with safe_open(file, 'pt') as opened:
        metadata = opened.metadata()
    save_file({**load_file(file), **(tensors or {})}, file, metadata | meta)


@each_case('change', [
    dict(tensors=dict(vectors=unit(4, 6, seed=9))),
    dict(names=json.dumps(['sky', 'car', 'traffic sign', 'road'])),
    dict(model=json.dumps('ViT-B-16')),
    dict(names='not json'),
    dict(sha256='0' * 64),
])
def test_tampered_file(file, change):
    make().save(file)
    rewrite(file, **change)
    refused('SHA-256', file)


def test_cut_short_at_any_length(file):
    data = file.read_bytes()
    for length in [*range(9, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:length])
        refused('cut short', file)
    file.write_bytes(b'')
    refused('an empty file', file)


@each_case('change, words', [
    (dict(vectors=set_one(float('nan'))), 'NaN or infinity .* rows .2.'),
    (dict(vectors=set_one(float('inf'))), 'NaN or infinity .* rows .2.'),
    (dict(vectors=set_one(2.)), 'row 2 has length'),
    (dict(vectors=unit(4, 6) * 1.002), r'row \d has length 1.002'),
    (dict(vectors=unit(4, 6).double()), 'float64'),
    (dict(vectors=unit(24)), r'shape \(24,\)'),
    (dict(vectors=unit(3, 6)), '3 vectors for 4 names'),
    (dict(names=('a', 'b', ' ', 'd')), r'rows \[2\]'),
    (dict(names=('a', 'b', 'a', 'd')), r"\['a'\] occur"),
    (dict(phrases=(('a', ), )), '1 phrases'),
    (dict(bank=unit(4, 2, 6)), 'bank_mask'),
    (dict(bank=unit(4, 2, 5), bank_mask=SOME), 'K, R, D'),
    (dict(bank=unit(4, 2, 6), bank_mask=~SOME), 'at least one'),
    (dict(bank=unit(4, 2, 6) * 2, bank_mask=SOME), 'unit length'),
])
def test_bad_content(file, change, words):
    """Refused in memory and, with a right hash around it, in a file."""
    with pytest.raises(EmbeddingFileError, match=words):
        make(**change)
    if list(change) == ['vectors'] and change['vectors'].shape == (4, 6):
        good = make()
        object.__setattr__(good, 'vectors', change['vectors'])
        good.save(file)
        refused(words, file)


def test_files_of_another_kind(file, tmp_path):
    bomb = tmp_path / 'exploded'
    rewrite(file, tensors=dict(more=unit(2, 2)))
    refused('more', file)
    for protocol in range(2, 6):
        file.write_bytes(pickle.dumps(Bomb(bomb), protocol))
        refused('a pickle.*--import', file)
    torch.save(Bomb(bomb), file)
    refused('torch.save', file)
    assert not bomb.exists()
    with open(file, 'wb') as opened:
        np.save(opened, unit(4, 6).numpy())
    refused('a NumPy array', file)
    file.write_text('version https://git-lfs.github.com/spec/v1')
    refused('unknown kind', file)
    save_file({'weight': unit(4, 6)}, file)
    refused('weight.*--import', file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='encode_text.py'):
        TextEmbeddings.load(file)


def test_a_failed_save_leaves_the_old_file(file):
    with patch('os.fsync', side_effect=OSError('disk full')):
        with pytest.raises(OSError, match='disk full'):
            make(model='new').save(file)
    assert TextEmbeddings.load(file).model == 'toyclip'
    assert list(file.parent.iterdir()) == [file]


def test_check_names():
    embeddings = make()
    embeddings.check_names(list(NAMES), 'x')
    order = (r'CamVid.*another order\D*'
             r"1: 'road' instead of 'car'\D*3: 'car' instead of 'road'\D*$")
    with pytest.raises(ValueError, match=f'(?s){order}'):
        embeddings.check_names(('sky', 'car', 'traffic sign', 'road'),
                               'CamVid')
    with pytest.raises(ValueError) as info:
        embeddings.check_names(('sky', 'road', 'fence'), 'CamVid')
    for part in ("missing here: ['fence']", 'number: 4 instead of 3',
                 "unexpected here: ['traffic sign', 'car']"):
        assert part in str(info.value)


def test_renamed():
    old, names = with_bank(), ('Car', 'sky', 'trafficSign', 'road')
    new, rows = old.renamed(names), [3, 0, 2, 1]
    assert new.names == names
    for key in ('vectors', 'bank', 'bank_mask'):
        assert torch.equal(getattr(new, key), getattr(old, key)[rows]), key
    assert new.phrases == tuple(old.phrases[row] for row in rows)
    with pytest.raises(ValueError, match='fence'):
        old.renamed(['fence', *names[1:]])


def write_vectors(file, vectors):
    if file.suffix == '.npy':
        np.save(file, vectors)
    elif file.suffix == '.safetensors':
        save_file({'text': vectors}, file)
    else:
        torch.save(vectors, file)
    return file


def load_vectors(file):
    return TextEmbeddings.from_vectors(file, dict(names=NAMES, model='m'))


@each_case('suffix', ['npy', 'pt', 'pth', 'safetensors'])
def test_import(tmp_path, suffix):
    vectors = unit(4, 6) * torch.tensor([[1.], [7.], [.1], [2.]])
    vectors = dict(
        npy=vectors.half().numpy(), pth=dict(text=vectors,
                                             epoch=3)).get(suffix, vectors)
    file = write_vectors(tmp_path / f'v.{suffix}', vectors)
    imported = load_vectors(file)
    tolerance = 2e-3 if suffix == 'npy' else 1e-6
    assert (imported.vectors - unit(4, 6)).abs().max() < tolerance
    assert imported.names == NAMES and imported.model == 'm'
    assert imported.phrases == tuple((name, ) for name in NAMES)
    assert file.name in imported.library


def test_import_with_names_file(tmp_path):
    file = write_vectors(tmp_path / 'v.npy', unit(4, 6).numpy())
    phrases = ['sky', ['road', 'street'], 'traffic sign', 'car']
    known = dict(names=NAMES, phrases=phrases, model='OpenAI CLIP ViT-B/16')
    known.update(template='a photo of a {}', license='MIT')
    imported = []
    for name, text in (('n.json', json.dumps(known)), ('list.json',
                                                       json.dumps(NAMES)),
                       ('n.txt', '\n'.join(NAMES) + '\n\n')):
        (tmp_path / name).write_text(text)
        imported.append(TextEmbeddings.from_vectors(file, tmp_path / name))
    assert {made.names for made in imported} == {NAMES}
    assert imported[0].phrases[:2] == (('sky', ), ('road', 'street'))
    assert imported[0].model == 'OpenAI CLIP ViT-B/16'
    assert imported[0].templates == ('a photo of a {}', )
    with pytest.raises(EmbeddingFileError, match='4 vectors.* 3 names'):
        TextEmbeddings.from_vectors(file, NAMES[:3])


def test_import_executes_nothing(tmp_path):
    bomb, trace = Bomb(tmp_path / 'exploded'), tmp_path / 'exploded'
    array = np.array([bomb], dtype=object)
    np.save(tmp_path / 'a.npy', array, allow_pickle=True)
    torch.save(dict(text=unit(4, 6), other=bomb), tmp_path / 'a.pt')
    for name in ('b.npy', 'b.pth', 'b.safetensors'):
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    files = [p for p in tmp_path.iterdir() if p.suffix]
    assert len(files) == 5
    for file in files:
        # No advice to run it, as torch gives.
        refused('^(?!.*(weights_only|still be loaded))', file, load_vectors)
    assert not trace.exists()
    # The bomb does go off where somebody unpickles it.
    pickle.loads((tmp_path / 'b.pth').read_bytes())
    assert trace.exists()


@each_case('content, words', [
    (dict(a=unit(4, 6), b=unit(4, 6)), 'one tensor'),
    (dict(a=1), 'one tensor'),
    ([1, 2], 'a list and not a tensor'),
    (unit(4), 'K×D'),
    (torch.zeros(0, 4), 'K×D'),
    (torch.tensor([[1., 0], [0, 0], [1, 0], [0, 1]]), r'rows \[1\]'),
    (unit(4, 6) / 0 * 0, 'NaN'),
    (unit(4, 6).numpy().astype(complex), 'complex128'),
])
def test_import_of_something_else(tmp_path, content, words):
    suffix = 'npy' if isinstance(content, np.ndarray) else 'pt'
    file = write_vectors(tmp_path / f'a.{suffix}', content)
    refused(words, file, load_vectors)
    # A file of an unknown kind, and none.
    file = file.rename(tmp_path / 'a.csv')
    refused('.csv', file, load_vectors)
    with pytest.raises(FileNotFoundError):
        load_vectors(tmp_path / 'missing.npy')


@each_case('name, content, words', [
    ('n.txt', 'Straße'.encode('latin-1'), 'not UTF-8 .*iconv'),
    ('n.json', '["a"]'.encode('utf-16'), 'not UTF-8 .*iconv'),
    ('n.json', b'["a", 2]', 'name 1 is no text but 2'),
    ('n.json', b'{"labels": ["a"]}', '"names"'),
    ('n.json', b'{"names": {"a": ["b"]}}', 'list under "names"'),
    ('n.json', b'["a", "b\\nc"]', "'b.*nc'.* control character"),
    ('n.json', b'{"names": ["a"], "phrases": {"a": "b"}}', '"phrases"'),
    ('n.json', b'{"names": ["a"], "phrases": [[["b"]]]}', '"phrases"'),
    ('n.json', b'{"names": ["a"], "model": 3}', '"model"'),
])
def test_bad_names_files(tmp_path, name, content, words):
    vectors = write_vectors(tmp_path / 'v.npy', unit(1, 6).numpy())
    (tmp_path / name).write_bytes(content)
    refused(f'Names file .*{words}', tmp_path / name,
            lambda file: TextEmbeddings.from_vectors(vectors, file))


def test_center():
    vectors = F.normalize(unit(8, 16) + unit(1, 16, seed=3) * 5, dim=1)
    centered = center(vectors)
    expected = F.normalize(vectors - vectors.mean(0), dim=1)
    assert torch.allclose(centered, expected)
    assert geometry(vectors)['mean'] > .9
    assert abs(geometry(centered)['mean']) < .2
    with pytest.raises(ValueError, match='two'):
        center(vectors[:1])
    with pytest.raises(ValueError, match='all zero after centering'):
        center(vectors[:1].expand(3, -1))


def test_geometry_of_known_angles():
    angles = torch.tensor([0., 90, 100, 352]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    result = geometry(vectors)
    assert result['closest_pair'] == (0, 3)
    assert result['farthest_pair'] == (2, 3)
    cosines = np.cos(np.radians([90, 100, 8, 10, 98, 108]))
    for name, value in (('closest', cosines.max()), ('min', cosines.min()),
                        ('mean', cosines.mean())):
        assert result[name] == pytest.approx(value)
    two = closest_pairs(vectors, 2)
    assert {pair[:2] for pair in two} == {(0, 3), (1, 2)}
    assert len(closest_pairs(vectors, 99)) == 6


@each_case('num, dim', [(2, 2), (4, 4), (4, 16), (19, 64)])
@each_case('scale', [1., 5., 14.29])
def test_ce_floor_of_orthonormal_vectors(num, dim, scale):
    """By symmetry e = a·t_k + b·(rest), which gives a closed form."""
    spread = math.sqrt(num / (num - 1))
    expected = math.log1p((num - 1) * math.exp(-scale * spread))
    rotation = torch.linalg.qr(torch.randn(dim, dim).double())[0]
    got = ce_floor(rotation[:num], scale)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_ce_floor_against_another_optimizer():
    vectors = F.normalize(unit(6, 10).double() + unit(1, 10, seed=2), dim=1)

    def loss(free):
        logits = 8. * F.normalize(free.view(6, 10), dim=1) @ vectors.T
        return F.cross_entropy(logits, torch.arange(6)).item()

    found = minimize(
        lambda x: loss(torch.from_numpy(x)),
        vectors.flatten().numpy(),
        options=dict(gtol=1e-7))
    assert ce_floor(vectors, 8.) == pytest.approx(found.fun, rel=1e-5)


def test_ce_floor_orderings():
    vectors = F.normalize(unit(9, 32) + 2 * unit(1, 32, seed=7), dim=1)
    floors = [ce_floor(vectors, scale) for scale in (5, 10, 20, 40)]
    assert floors == sorted(floors, reverse=True) and len(set(floors)) == 4
    # Room at the bottom is what centering buys.
    assert ce_floor(center(vectors), 10) < .1 * floors[1]
    # No vector does better than the floor, its own text included.
    own = F.cross_entropy(10 * vectors @ vectors.T, torch.arange(9))
    assert floors[1] < float(own)
