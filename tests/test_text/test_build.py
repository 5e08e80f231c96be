# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
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
    return Config(
        dict(
            model=dict(
                decode_head=dict(text=dict(embeddings=node)),
                auxiliary_head=[dict(text=dict(embeddings=node))])))


def test_missing_files_of_a_sampler_are_made(tmp_path, clip_name):
    file = tmp_path / 't.safetensors'
    cfg = config(file, clip_name, keep_bank=True)
    cfg.model.auxiliary_head = None
    cfg.model.decode_head.text.embeddings.type = 'SynonymSampler'
    assert ensure_embeddings(cfg) == [file]
    assert TextEmbeddings.load(file).bank.shape[1] == 2 * len(TEMPLATES)
    assert ensure_embeddings(cfg) == []


def test_only_what_the_model_uses_is_made(tmp_path, clip_name):
    """A variable that is overridden, or has several data sets, is not."""
    file = tmp_path / 't.safetensors'
    cfg = config(file, clip_name)
    other = copy.deepcopy(cfg.model.decode_head.text.embeddings)
    other.update(file=str(tmp_path / 'other.safetensors'))
    other.build.update(model='no such tower')
    cfg.text_provider = dict(embeddings=other)
    assert ensure_embeddings(cfg) == [file]
    assert [p.name for p in tmp_path.glob('*.safetensors')] == [file.name]


@pytest.fixture(scope='module')
def tower(clip_name):
    return TextTower(clip_name)


def test_parity_with_open_clip_classifier(tower, clip_dirs):
    """One phrase a class: open_clip's own ensembling over templates."""
    import open_clip
    folder = clip_dirs['clip']
    clip = open_clip.create_model(f'local-dir:{folder}').eval()
    tokenizer = open_clip.get_tokenizer(
        f'local-dir:{folder}', bpe_path=str(folder / 'bpe_vocab.txt.gz'))
    names = ['road', 'sky', 'car', 'a wide street']
    expected = open_clip.build_zero_shot_classifier(clip, tokenizer, names,
                                                    TEMPLATES).T
    got = encode_classes(names, tower, TEMPLATES)
    assert (got.vectors - expected).abs().max() <= 1e-5
    assert got.names == tuple(names) and got.templates == tuple(TEMPLATES)
    assert got.model == tower.model and 'open_clip' in got.library


def test_ensembling_over_phrases_and_bank(tower):
    got = encode_classes(VOCABULARY, tower, TEMPLATES, keep_bank=True)
    assert got.phrases == (('road', 'street'), ('sky', ), ('car', ))
    assert got.bank_mask.sum(1).tolist() == [6, 3, 3]
    for k, phrases in enumerate(got.phrases):
        single = [
            F.normalize(tower.encode_text([t.format(p)]), dim=1)[0]
            for p in phrases for t in TEMPLATES
        ]
        expected = sum(single) / len(single)
        expected = expected / expected.norm()
        assert (got.vectors[k] - expected).abs().max() <= 1e-5
        bank = got.bank[k, :len(single)]
        assert (bank - torch.stack(single)).abs().max() <= 1e-5
        assert got.bank[k, len(single):].abs().sum() == 0
    # The mean of the bank is the ensemble, from which mixtures start.
    mean = F.normalize(got.bank.sum(1), dim=1)
    assert (mean - got.vectors).abs().max() <= 1e-6
    assert encode_classes(VOCABULARY, tower, TEMPLATES).bank is None


def test_sentences_are_encoded_once(tower, monkeypatch):
    seen = []
    encode = tower.encode_text
    monkeypatch.setattr(tower, 'encode_text',
                        lambda s, **kw: seen.extend(s) or encode(s, **kw))
    with pytest.warns(UserWarning, match='street'):
        shared = encode_classes(
            {
                'road': ['street', 'road'],
                'lane': ['street']
            }, tower, ['{}', 'a {}'])
    assert sorted(seen) == ['a road', 'a street', 'road', 'street']
    alone = encode_classes({'lane': 'street', 'x': 'y'}, tower, ['{}', 'a {}'])
    assert (shared.vectors[1] - alone.vectors[0]).abs().max() <= 1e-6


def test_too_long_phrase_is_named(tower):
    with pytest.raises(ValueError, match='road road road'):
        encode_classes({'x': 'road ' * 80, 'y': 'sky'}, tower, 'none')


def test_ensure_makes_a_missing_file_once(tmp_path, clip_name, tower):
    file = tmp_path / 'text' / 'own.safetensors'
    cfg = config(file, clip_name, keep_bank=True)
    assert ensure_embeddings(cfg) == [file]
    made = TextEmbeddings.load(file)
    direct = encode_classes(VOCABULARY, tower, TEMPLATES, keep_bank=True)
    assert made.sha256 == direct.sha256
    stamp = file.stat().st_mtime_ns
    assert ensure_embeddings(cfg) == []
    assert file.stat().st_mtime_ns == stamp


def test_a_killed_writer_does_not_disturb(tmp_path, clip_name):
    file = tmp_path / 'own.safetensors'
    (tmp_path / '.own.safetensors.abc123.tmp').write_bytes(b'half a fi')
    (tmp_path / '.own.safetensors.lock').touch()
    assert ensure_embeddings(config(file, clip_name)) == [file]
    assert TextEmbeddings.load(file).names == tuple(VOCABULARY)


def test_damaged_file_is_reported_and_kept(tmp_path, clip_name):
    file = tmp_path / 'own.safetensors'
    file.write_bytes(b'half a file')
    with pytest.raises(ValueError, match='own.safetensors'):
        ensure_embeddings(config(file, clip_name))
    assert file.read_bytes() == b'half a file'


def test_existing_file_for_other_classes(tmp_path, clip_name):
    file = tmp_path / 'own.safetensors'
    ensure_embeddings(config(file, clip_name))
    other = config(file, clip_name, vocabulary=['road', 'sky', 'truck'])
    with pytest.raises(ValueError) as info:
        ensure_embeddings(other)
    message = str(info.value)
    for part in ('truck', 'car', str(file), 'Delete or rename',
                 'encode_text.py "road,sky,truck"'):
        assert part in message, part


def test_existing_file_made_otherwise_is_used(tmp_path, clip_name, log):
    file = tmp_path / 'own.safetensors'
    ensure_embeddings(config(file, clip_name))
    before = file.read_bytes()
    assert ensure_embeddings(
        config(
            file,
            'ViT-B-16',
            pretrained='openai',
            templates=['{}'],
            keep_bank=True)) == []
    out = log.getvalue()
    for part in ('used as it is', 'ViT-B-16', 'openai', "('{}',)", 'no bank'):
        assert part in out, part
    assert file.read_bytes() == before


@each_case('build, words', [
    (dict(prompts='none'), 'prompts'),
    (dict(vocabulary=None), "missing keys .'vocabulary'"),
])
def test_wrong_build(tmp_path, clip_name, build, words):
    with pytest.raises(ValueError, match=words):
        ensure_embeddings(
            config(tmp_path / 'own.safetensors', clip_name, **build))
    assert list(tmp_path.iterdir()) == []


def test_two_ways_for_one_file(tmp_path, clip_name):
    file = tmp_path / 'own.safetensors'
    cfg = dict(a=config(file, clip_name), b=[config(file, 'ViT-B-16')])
    with pytest.raises(ValueError, match='two ways'):
        ensure_embeddings(cfg)


def test_config_without_build(tmp_path):
    cfg = dict(
        a=dict(type='ClassEmbeddings', file=str(tmp_path / 'x.safetensors')),
        b=dict(type='ControlEmbeddings', kind='random'))
    assert ensure_embeddings(cfg) == []


def test_build_command_can_be_run():
    text = build_command(
        'out.safetensors',
        dict(
            model='ViT-B-16',
            pretrained='openai',
            templates='vild',
            vocabulary='camvid',
            keep_bank=True))
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


def test_two_processes_and_one_file(tmp_path, clip_name):
    """One encodes; the other waits, encodes nothing and gets the same."""
    file = tmp_path / 'own.safetensors'
    node = dict(
        type='ClassEmbeddings',
        file=str(file),
        build=dict(model=clip_name, templates='none', vocabulary=VOCABULARY))

    def write(*ready):
        return start(
            'python',
            '-c',
            WRITER,
            json.dumps(dict(node=node)),
            *ready,
            cwd=tmp_path,
            fork=True)

    done = side_by_side({
        'ab': lambda: write('a', 'b'),
        'ba': lambda: write('b', 'a')
    }).values()
    assert [d.status for d in done] == [0, 0], done
    results = [json.loads(d.output.splitlines()[-1]) for d in done]
    assert sorted(r['made'] for r in results) == [0, 1]
    assert len({r['sha'] for r in results}) == 1
    loser, = [r for r in results if not r['made']]
    assert not loser['open_clip']
    assert not list(tmp_path.glob('*.tmp'))
