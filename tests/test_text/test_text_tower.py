# Copyright (c) mmseg_textkd contributors. All rights reserved.
import gc
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import weakref
from pathlib import Path
from unittest.mock import Mock

import open_clip
import pytest
import torch
from each_case import each_case
from huggingface_hub import constants
from processes import start
from safetensors.torch import load_file, save_file
from tiny import CLASSES
from tiny_clip import EOS, TEXT_CFG, VARIANTS, open_clip_model, save_model

from mmseg_textkd.clip.image_tower import ImageTower
from mmseg_textkd.clip.text_tower import TextTower, TextTowerError, load_tower
from mmseg_textkd.clip.weights import (_tag_file, find_weights,
                                       warn_of_activation)

WEIGHTS = 'open_clip_model.safetensors'
SENTENCES = ('road', 'a photo of a car.', 'the sky over a wide street at dusk',
             'sky', 'a very long sentence about a road with one car')
CUTTABLE = ('clip', 'custom', 'eos', 'wide_bias', 'no_proj', 'qk_norm')
UNCUT = ('last', 'bidirectional', 'bidirectional_last', 'cls')
assert sorted(CUTTABLE + UNCUT) == sorted(VARIANTS)


def tower_of(clip_dirs, variant):
    return TextTower(f'local-dir:{clip_dirs[variant]}')


def reference(clip_dirs, variant):
    """open_clip's own loading, tokenizing and encoding."""
    clip, tokenizer = open_clip_model(clip_dirs[variant])
    with torch.no_grad():
        features = clip.encode_text(tokenizer(list(SENTENCES)))
    return features[0] if isinstance(features, tuple) else features


@pytest.fixture
def tower(clip_name):
    return TextTower(clip_name)


@pytest.fixture
def folder(clip_dirs, tmp_path):
    """A model's folder of one's own."""
    return Path(shutil.copytree(clip_dirs['clip'], tmp_path / 'model'))


def cached(cache, name, make):
    """Put a model where the hub's client would have put it."""
    repo = cache / f'models--{name.replace("/", "--")}'
    snapshot = repo / 'snapshots' / 'abc'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text('abc')
    make(snapshot)
    return snapshot


@each_case('variant', CUTTABLE + UNCUT)
def test_parity_with_open_clip(clip_dirs, variant):
    tower = tower_of(clip_dirs, variant)
    expected = reference(clip_dirs, variant)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for cut, batch_size in itertools.product((True, False), (2, 256)):
        got = tower.encode_text(SENTENCES, batch_size=batch_size, cut=cut)
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= 1e-5
    assert tower.dim == expected.shape[1]
    # It cuts only where that is exact.
    assert tower.can_cut == (variant in CUTTABLE)
    lengths = []
    tower._text.transformer.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.shape[1]))
    tower.encode_text(['road', 'car'])
    # [start] road [end]: three tokens instead of 77, or 78 with a class token.
    assert lengths == [3 if tower.can_cut else 77 + (variant == 'cls')]
    ids = tower.tokenize(SENTENCES)
    if variant == 'cls':
        with pytest.raises(TextTowerError, match='takes no soft prompts'):
            tower.embed_tokens(ids)
        return

    def encode(ids):
        """As soft prompts, which equal text."""
        return tower.encode_prompts(tower.embed_tokens(ids), ids)

    assert (encode(ids) - expected).abs().max() <= 1e-5
    # Prompts may come with any length that holds the end tokens.
    short = ids[:, :tower.end_positions(ids).max() + 1]
    if tower.can_cut:
        assert (encode(short) - encode(ids)).abs().max() <= 1e-6
    else:
        with pytest.raises(ValueError, match='exactly 77'):
            encode(short)


def test_gradient_reaches_prompts_and_not_weights(tower):
    before, ids = tower.checksum(), tower.tokenize(['a road', 'car'])
    prompts = tower.embed_tokens(ids).requires_grad_()
    target = torch.randn(2, tower.dim)
    (tower.encode_prompts(prompts, ids) * target).sum().backward()
    gradient = prompts.grad
    for row, end in enumerate(tower.end_positions(ids).tolist()):
        assert (gradient[row, :end + 1].abs().sum(dim=1) > 0).all()
        # What lies behind the end token is not seen.
        assert gradient[row, end + 1:].abs().sum() == 0
    # Against a finite difference, in one coordinate.
    step = torch.zeros_like(prompts)
    step[0, 1, 3] = 1e-2
    with torch.no_grad():
        up, down = (
            tower.encode_prompts(prompts + sign * step, ids)
            for sign in (1, -1))
    slope = ((up - down) * target).sum().item() / 2e-2
    assert slope == pytest.approx(gradient[0, 1, 3].item(), rel=2e-2, abs=1e-4)
    assert all(p.grad is None for p in tower.parameters())
    assert tower.checksum() == before


def test_frozen_and_without_its_visual_side(clip_dirs):
    tower = tower_of(clip_dirs, 'custom')
    parameters = dict(tower.named_parameters())
    assert len(parameters) > 20
    assert not any(p.requires_grad for p in parameters.values())
    assert tower.train() is tower
    torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert not hasattr(tower.clip, 'visual')
    assert not [name for name in parameters if 'visual' in name]


def test_checksum_sees_every_weight(tower, clip_name, tmp_path):
    twin = TextTower(clip_name)
    assert tower.checksum() == twin.checksum()
    save_model(tmp_path / 'other', 'clip', seed=1)
    other = TextTower(f'local-dir:{tmp_path / "other"}')
    assert other.checksum() != tower.checksum()
    twin.clip.positional_embedding.data[-1, -1] += 1e-6
    assert twin.checksum() != tower.checksum()


def test_float32_under_autocast(tower):
    ids, expected = tower.tokenize(SENTENCES), tower.encode_text(SENTENCES)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        text = tower.encode_text(SENTENCES)
        soft = tower.encode_prompts(tower.embed_tokens(ids).bfloat16(), ids)
    assert (text - expected).abs().max() <= 1e-6
    assert soft.dtype == torch.float32
    # Only the input was rounded; the arithmetic was not.
    assert (soft - expected).abs().max() <= 3e-2


def test_tokenize(tower):
    start = EOS - 1
    assert tower.tokenize(['road'])[0, :4].tolist() == [start, 512 + 2, EOS, 0]
    assert tower.tokenize('road').shape == (1, TEXT_CFG['context_length'])
    # Once, however long they are.
    sentences = [*SENTENCES, ' '.join(['road'] * 75)]
    expected = tower.tokenizer(sentences, context_length=tower.context_length)
    tower.tokenizer = Mock(wraps=tower.tokenizer)
    assert torch.equal(tower.tokenize(sentences), expected)
    seen = sum((call.args[0] for call in tower.tokenizer.mock_calls), [])
    assert seen == sentences
    road = ' '.join(['road'] * 76)
    with pytest.raises(ValueError, match='(?s)1 sentence.*78.*road road'):
        tower.tokenize(['car', road])
    with pytest.raises(ValueError, match='no sentences'):
        tower.tokenize([])


def test_prompts_that_do_not_fit(tower):
    ids = tower.tokenize(['road'])
    with pytest.raises(ValueError, match='width 32'):
        tower.encode_prompts(torch.zeros(1, 77, 31), ids)
    with pytest.raises(ValueError, match='up to 77'):
        tower.encode_prompts(torch.zeros(1, 78, 32), torch.zeros(1, 78).long())


def test_load_tower_shares_and_lets_go(clip_name):
    tower = load_tower(clip_name)
    assert load_tower(clip_name) is tower
    gone = weakref.ref(tower)
    del tower
    gc.collect()
    assert gone() is None
    assert load_tower(clip_name) is not None


def test_damaged_folders(folder):

    def refused(words):
        with pytest.raises(TextTowerError, match=f'(?s){words}') as info:
            TextTower(f'local-dir:{folder}')
        return info.value

    vocabulary, weights = folder / 'bpe_vocab.txt.gz', folder / WEIGHTS
    whole, state = weights.read_bytes(), load_file(weights)
    state['ln_final.bias'][0] = float('nan')
    save_file(state, weights)
    refused('not finite')
    weights.write_bytes(whole[:len(whole) // 2])
    assert refused('cannot be loaded').__cause__ is not None
    weights.write_bytes(whole)
    vocabulary.unlink()
    refused('(?=.*521)(?=.*49408).*bpe_vocab.txt.gz')
    weights.unlink()
    # open_clip itself would go on with random weights here.
    refused('no weights')
    (folder / 'open_clip_config.json').unlink()
    refused('has no open_clip_config.json')
    folder.rmdir()
    refused('no such folder.*--prefetch.*local-dir:/path.*--import')


def test_architecture_with_a_weights_file(tmp_path, monkeypatch, clip_dirs):
    """An architecture name takes its weights from a local file."""
    config = (clip_dirs['wide_bias'] / 'open_clip_config.json').read_text()
    arch = json.loads(config)['model_cfg']
    # Full vocabulary: an architecture has open_clip's own tokenizer.
    arch['text_cfg'].update(vocab_size=49408, width=16)
    (tmp_path / 'tiny-test-arch.json').write_text(json.dumps(arch))
    for name in ('_MODEL_CONFIG_PATHS', '_MODEL_CONFIGS'):
        value = getattr(open_clip.factory, name)
        monkeypatch.setattr(open_clip.factory, name, value.copy())
    open_clip.add_model_config(tmp_path)
    clip = open_clip.create_model('tiny-test-arch')
    file = tmp_path / 'weights.pt'
    torch.save(clip.state_dict(), file)
    tower = TextTower('tiny-test-arch', str(file))
    with torch.no_grad():
        expected = clip.encode_text(
            open_clip.get_tokenizer('tiny-test-arch')(list(SENTENCES)))
    assert (tower.encode_text(SENTENCES) - expected).abs().max() <= 1e-5
    for words, args in (('would be random', ['tiny-test-arch']),
                        ('neither a file nor one of the',
                         ['tiny-test-arch', f'{tmp_path}/missing.pt'
                          ]), ("'ViT-B-16'", ['ViT-B16', 'openai'])):
        with pytest.raises(TextTowerError, match=words):
            TextTower(*args)


def test_activation_of_a_weights_file(tmp_path, monkeypatch, log):
    """Nothing in a file tells it, and both forms load."""
    file = tmp_path / 'weights.pt'
    file.write_bytes(b'as OpenAI published them')
    plain = find_weights('ViT-B-32', str(file))
    assert plain[:3] == ('ViT-B-32', str(file), False)
    warn_of_activation('ViT-B-32', str(file), plain)
    assert 'trained with QuickGELU' in log.getvalue()
    assert 'then give ViT-B-32-quickgelu' in log.getvalue()
    # The files that are known decide by themselves, whatever they are called.
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    known = open_clip.pretrained._PRETRAINED['ViT-B-32']
    assert len(known['openai']['url'].split('/')[-2]) == len(sha256)
    monkeypatch.setitem(known, 'openai',
                        dict(url=f'https://x/{sha256}/a.pt', quick_gelu=True))
    log.truncate(0)
    for name in ('ViT-B-32', 'ViT-B-32-quickgelu'):
        found = find_weights(name, str(file))
        assert found[:3] == (name, str(file), True)
        warn_of_activation(name, str(file), found)
    assert not log.getvalue()


@each_case('model, pretrained, looked', [
    ('ViT-B-16', 'openai', 'models--timm--vit_base_patch16_clip_224.openai'),
    ('hf-hub:nobody/nothing', None, 'models--nobody--nothing'),
])
def test_missing_weights_without_network(model, pretrained, looked, tmp_path,
                                         monkeypatch):
    """No route to the hub: one clear error, within seconds."""
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    start = time.time()
    with pytest.raises(TextTowerError) as info:
        TextTower(model, pretrained, cache_dir=tmp_path)
    assert time.time() - start < 10
    assert isinstance(info.value.__cause__, OSError)
    for part in (model, str(tmp_path), looked, '--prefetch', 'local-dir:/path',
                 '--import', '127.0.0.1', 'HF_HUB_CACHE=DIR',
                 '`--embeddings FILE.s', "embeddings='FILE.s", '--text-model'):
        assert part in str(info.value), part


def test_offline_switch_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(TextTowerError, match='HF_HUB_OFFLINE'):
        TextTower('ViT-B-32', 'laion2b_s34b_b79k', cache_dir=tmp_path)


def test_cached_hub_model_needs_no_network(clip_dirs, tmp_path, monkeypatch):
    """A model in the cache opens at once; nothing asks the hub."""
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://127.0.0.1:9')
    cached(tmp_path, 'org/name',
           lambda place: shutil.copytree(clip_dirs['clip'], place))
    tower = TextTower('hf-hub:org/name', cache_dir=tmp_path)
    expected = reference(clip_dirs, 'clip')
    assert (tower.encode_text(SENTENCES) - expected).abs().max() <= 1e-5


@each_case('name, tag, repo, quick_gelu', [
    ('ViT-B-16', 'openai', 'timm/vit_base_patch16_clip_224.openai', True),
    ('ViT-B-16', 'laion2b_s34b_b88k', 'laion/CLIP-ViT-B-16-laion2B-s34B-b88K',
     False),
    ('ViT-B-16-SigLIP', 'webli', 'timm/ViT-B-16-SigLIP', False),
])
def test_tags_bring_what_a_file_does_not(tmp_path, monkeypatch, name, tag,
                                         repo, quick_gelu):
    """OpenAI's weights under the plain architecture need QuickGELU, of which
    open_clip only warns; others were trained with another normalization."""
    file = cached(tmp_path, repo, lambda place: place.mkdir(parents=True))
    file = file / WEIGHTS
    file.touch()
    found = find_weights(name, tag, tmp_path)
    assert found[:3] == (name, str(file), quick_gelu)
    mean = .5 if tag == 'webli' else 0.48145466
    assert found.preprocess['mean'][0] == mean
    # The hub's client takes a folder of this name as it is.
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    assert find_weights(name, tag, f'~/{tmp_path.name}') == found
    # Where all tags of an architecture agree, the normalization is known.
    assert find_weights(name, str(file)).preprocess == found.preprocess


def test_images_are_normalized_as_the_tag_says(tmp_path, monkeypatch):
    """MobileCLIP's are not: mean 0, deviation 1."""
    name, tag = 'MobileCLIP-S1', 'datacompdr'
    cfg = open_clip.get_model_config(name)
    cfg['text_cfg'].update(width=64, heads=1, layers=1)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, cfg)
    file = tmp_path / 'weights.pt'
    torch.save(open_clip.create_model(name).state_dict(), file)
    monkeypatch.setattr('mmseg_textkd.clip.weights._tag_file',
                        lambda *args: str(file))
    for pretrained in (tag, str(file)):
        tower = ImageTower(name, pretrained)
        assert not tower.mean.any() and (tower.std == 255).all()


def test_tag_with_a_plain_address(tmp_path):
    """Older tags are files on a server and not hub repositories."""
    cfg = dict(url='https://127.0.0.1:9/models/abc/ViT-X.pt', hf_hub='')
    with pytest.raises(Exception, match='ViT-X.pt'):
        _tag_file(cfg, tmp_path)
    (tmp_path / 'ViT-X.pt').touch()
    assert _tag_file(cfg, tmp_path) == str(tmp_path / 'ViT-X.pt')


def test_without_open_clip(tmp_path):
    """Importing the package needs no open_clip; a tower says how to get it."""
    (tmp_path / 'open_clip.py').write_text('raise ImportError("no open_clip")')
    code = ('import sys, mmseg_textkd\n'
            'assert "open_clip" not in sys.modules\n'
            'from mmseg_textkd.clip.text_tower import *\n'
            'try:\n    TextTower("toyclip")\n'
            'except TextTowerError as e:\n    print(e)\n')
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = start(
        'python', '-c', code, cwd=tmp_path, fork=True, PYTHONPATH=path)
    assert done.status == 0, done.output
    assert 'pip install open_clip_torch' in done.output


def test_toyclip_is_loaded_and_named(log):
    tower = TextTower('toyclip')
    assert tower.can_cut and tower.model == 'toyclip'
    assert 'ToyCLIP' in log.getvalue()
    cut, full = (tower.encode_text(CLASSES, cut=cut) for cut in (True, False))
    assert (cut - full).abs().max() <= 1e-5
