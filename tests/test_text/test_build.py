# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import json
from unittest.mock import Mock

import pytest
import torch.nn.functional as F
from mmengine import Config
from processes import side_by_side, start

from mmseg_textkd.clip.text_tower import TextTower
from mmseg_textkd.text.embedding_file import TextEmbeddings
from mmseg_textkd.text.encode_classes import (build_command, encode_classes,
                                              ensure_embeddings)

VOCABULARY = {'road': ['road', 'street'], 'sky': 'sky', 'car': ['car']}
TEMPLATES = ['a photo of a {}.', '{}', 'there is a {} in the scene.']


def config(file, model, **build):
    build = dict(
        dict(model=model, templates=TEMPLATES, vocabulary=VOCABULARY), **build)
    node = dict(type='ClassEmbeddings', file=str(file), build=build)
    # The same file twice and deep down, as two heads would have it.
    heads = dict(
        decode_head=dict(text=dict(embeddings=node)),
        auxiliary_head=[dict(text=dict(embeddings=node))])
    return Config(dict(model=heads))


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'own.safetensors'


def test_missing_files_of_a_sampler_are_made(file, clip_name):
    cfg = config(file, clip_name, keep_bank=True)
    cfg.model.auxiliary_head = None
    cfg.model.decode_head.text.embeddings.type = 'SynonymSampler'
    assert ensure_embeddings(cfg) == [file]
    assert TextEmbeddings.load(file).bank.shape[1] == 2 * len(TEMPLATES)
    assert ensure_embeddings(cfg) == []


def test_only_what_the_model_uses_is_made(file, clip_name):
    """A variable that is overridden, or has several data sets, is not."""
    cfg = config(file, clip_name)
    other = copy.deepcopy(cfg.model.decode_head.text.embeddings)
    other.update(file=f'{file.parent}/other.safetensors')
    other.build.update(model='no such tower')
    cfg.text_provider = dict(embeddings=other)
    # Nor is what has no recipe.
    gone = dict(type='ClassEmbeddings', file=f'{file.parent}/gone.safetensors')
    random = dict(type='ControlEmbeddings', kind='random')
    cfg.model.auxiliary_head += [dict(text=gone), dict(text=random)]
    assert ensure_embeddings(cfg) == [file]
    assert list(file.parent.glob('*.safetensors')) == [file]


@pytest.fixture(scope='module')
def tower(clip_name):
    return TextTower(clip_name)


def test_ensembling_over_phrases_and_bank(tower):
    got = encode_classes(VOCABULARY, tower, TEMPLATES, keep_bank=True)
    assert got.model == tower.model and 'open_clip' in got.library
    assert got.names == (*VOCABULARY, ) and got.templates == (*TEMPLATES, )
    assert got.phrases == (('road', 'street'), ('sky', ), ('car', ))
    assert got.bank_mask.sum(1).tolist() == [6, 3, 3]
    for k, phrases in enumerate(got.phrases):
        sentences = [t.format(p) for p in phrases for t in TEMPLATES]
        single = F.normalize(tower.encode_text(sentences), dim=1)
        # The mean of the bank is the ensemble, from which mixtures start.
        expected = F.normalize(single.mean(0), dim=0)
        assert (got.vectors[k] - expected).abs().max() <= 1e-5
        bank = got.bank[k]
        assert (bank[:len(single)] - single).abs().max() <= 1e-5
        assert bank[len(single):].abs().sum() == 0
    assert encode_classes(VOCABULARY, tower, TEMPLATES).bank is None


def test_sentences_are_encoded_once(tower, monkeypatch):
    encode = Mock(wraps=tower.encode_text)
    monkeypatch.setattr(tower, 'encode_text', encode)
    spec = dict(road=['street', 'road'], lane=['street'])
    with pytest.warns(UserWarning, match='street'):
        shared = encode_classes(spec, tower, ['{}', 'a {}'])
    seen = sum((list(call.args[0]) for call in encode.mock_calls), [])
    assert sorted(seen) == ['a road', 'a street', 'road', 'street']
    alone = encode_classes(dict(lane='street', x='y'), tower, ['{}', 'a {}'])
    assert (shared.vectors[1] - alone.vectors[0]).abs().max() <= 1e-6


def test_too_long_phrase_is_named(tower):
    with pytest.raises(ValueError, match='road road road'):
        encode_classes({'x': 'road ' * 80, 'y': 'sky'}, tower, 'none')


def test_ensure_makes_a_missing_file_once(tmp_path, clip_name, tower):
    folder = tmp_path / 'text'
    file = folder / 'own.safetensors'
    # A writer that was killed does not disturb.
    folder.mkdir()
    (folder / '.own.safetensors.abc123.tmp').write_bytes(b'half a fi')
    (folder / '.own.safetensors.lock').touch()
    cfg = config(file, clip_name, keep_bank=True)
    assert ensure_embeddings(cfg) == [file]
    made = TextEmbeddings.load(file)
    direct = encode_classes(VOCABULARY, tower, TEMPLATES, keep_bank=True)
    assert made.sha256 == direct.sha256
    stamp = file.stat().st_mtime_ns
    assert ensure_embeddings(cfg) == []
    assert file.stat().st_mtime_ns == stamp


def test_config_that_was_written(file, clip_name, tmp_path):
    """MMEngine sorts its keys; the classes keep their order."""

    def written(**node):
        cfg = config(file, clip_name)
        for head in (cfg.model.decode_head, *cfg.model.auxiliary_head):
            head.text.embeddings.update(node)
        cfg.dump(tmp_path / 'written.py')
        return Config.fromfile(tmp_path / 'written.py')

    ensure_embeddings(config(file, clip_name))
    made = TextEmbeddings.load(file)
    assert ensure_embeddings(written()) == []
    file.unlink()
    assert ensure_embeddings(written(classes=list(VOCABULARY))) == [file]
    again = TextEmbeddings.load(file)
    assert (again.names, again.sha256) == (made.names, made.sha256)


def test_damaged_file_is_reported_and_kept(file, clip_name):
    file.write_bytes(b'half a file')
    with pytest.raises(ValueError, match='own.safetensors'):
        ensure_embeddings(config(file, clip_name))
    assert file.read_bytes() == b'half a file'


def test_existing_file_that_was_made_otherwise(file, clip_name, log):
    ensure_embeddings(config(file, clip_name))
    before = file.read_bytes()
    other = config(file, clip_name, vocabulary=['road', 'sky', 'truck'])
    with pytest.raises(ValueError) as info:
        ensure_embeddings(other)
    for part in ('truck', 'car', str(file), 'Delete or rename',
                 'encode_text.py "road,sky,truck"'):
        assert part in str(info.value), part
    # For the same classes it is used.
    build = dict(pretrained='openai', templates=['{}'], keep_bank=True)
    assert ensure_embeddings(config(file, 'ViT-B-16', **build)) == []
    for part in ('used as it is', 'ViT-B-16', 'openai', "('{}',)", 'no bank'):
        assert part in log.getvalue(), part
    assert file.read_bytes() == before


def test_wrong_build(file, clip_name):
    cases = [
        (config(file, clip_name, prompts='none'), 'prompts'),
        (config(file, clip_name, vocabulary=None), "missing keys .'vocabul"),
        (dict(a=config(file, clip_name), b=[config(file,
                                                   'ViT-B-16')]), 'two ways'),
    ]
    for cfg, words in cases:
        with pytest.raises(ValueError, match=words):
            ensure_embeddings(cfg)
    assert list(file.parent.iterdir()) == []


def test_build_command_can_be_run():
    recipe = dict(model='ViT-B-16', pretrained='openai', keep_bank=True)
    recipe.update(templates='vild', vocabulary='camvid')
    text = build_command('out.safetensors', recipe)
    assert ('`python tools/encode_text.py camvid --model ViT-B-16 '
            '--pretrained openai --templates "vild" --keep-bank --out '
            'out.safetensors`') in text
    assert 'DATASET --model MODEL' in build_command('x')


WRITER = """
import json, os, sys, time
from mmseg_textkd.text import encode_classes as build
from mmseg_textkd.text.embedding_file import TextEmbeddings
cfg, me, other = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
encode = build.encode_classes
def slow(*args, **kwargs):
    # Long enough for the other process to find the lock taken.
    time.sleep(2)
    return encode(*args, **kwargs)
build.encode_classes = slow
open(me, 'w').close()
while not os.path.exists(other):
    time.sleep(.01)
made = build.ensure_embeddings(cfg)
print(json.dumps(dict(
    made=len(made), open_clip='open_clip' in sys.modules,
    sha=TextEmbeddings.load(cfg['node']['file']).sha256)))
"""


def test_two_processes_and_one_file(tmp_path, file, clip_name):
    """One encodes; the other waits, encodes nothing and gets the same."""
    build = dict(model=clip_name, templates='none', vocabulary=VOCABULARY)
    node = dict(type='ClassEmbeddings', file=str(file), build=build)
    words = ('python', '-c', WRITER, json.dumps(dict(node=node)))

    def write(*ready):
        return start(*words, *ready, cwd=tmp_path, fork=True)

    jobs = dict(ab=lambda: write('a', 'b'), ba=lambda: write('b', 'a'))
    done = side_by_side(jobs).values()
    assert [d.status for d in done] == [0, 0], done
    winner, loser = sorted(
        (json.loads(d.output.splitlines()[-1]) for d in done),
        key=lambda result: -result['made'])
    assert (winner['made'], loser['made']) == (1, 0)
    assert winner['sha'] == loser['sha'] and not loser['open_clip']
    assert not list(tmp_path.glob('*.tmp'))
