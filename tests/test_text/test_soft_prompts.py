# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Learned context in the prompts of every kind of text tower."""
import json
from pathlib import Path

import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F

from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.models.text_providers import (ContextPromptLearner,
                                                context_prompt_learner)

PHRASES = {'road': 'road', 'light': 'traffic light', 'wall': 'brick wall'}
# Start tokens, end token, padding: what Hugging Face's tokenizers put around
# the words in open_clip's models. CLIPA's end token is stripped.
FRAMES = {
    'SigLIP2': ([], 1, 0),
    'SigLIP': ([], 1, 1),
    'bert-base-uncased': ([101], 0, 0),
    'facebook/xlm-v-base': ([0], 2, 1),
    'google/mt5-base': ([], 1, 0),
}
# Settings of text towers that matter here.
KEYS = ('context_length', 'pool_type', 'eos_id', 'no_causal_mask', 'embed_cls',
        'hf_tokenizer_name')


class Words:
    """A tokenizer with the frame of another: pieces of three letters.

    Hugging Face's own need files that this test has not.
    """

    def __init__(self, start, end, pad, context_length, clean=False):
        self.frame, self.context_length = (start, end, pad), context_length
        self.clean, self.tokenizer = clean, self
        self.pad_token_id = pad

    def __call__(self, texts, context_length=None):
        start, end, pad = self.frame
        rows = []
        for text in texts:
            if self.clean:  # as SigLIP's, which drops the full stop
                text = text.replace('.', '')
            pieces = [
                word[i:i + 3] for word in text.replace('.', ' .').split()
                for i in range(0, len(word), 3)
            ]
            ids = [200 + sum(map(ord, piece)) % 300 for piece in pieces]
            row = [*start, *ids][:context_length - 1] + [end]
            rows.append(row + [pad] * (context_length - len(row)))
        return torch.tensor(rows)


def families():
    """Text settings of open_clip's architectures, each once."""
    found = {}
    for path in Path(open_clip.__file__).parent.glob('model_configs/*.json'):
        text = json.loads(path.read_text())['text_cfg']
        # Towers of `transformers` hold no text transformer of open_clip.
        if 'hf_model_name' not in text:
            name = text.get('hf_tokenizer_name')
            if name:
                text['hf_tokenizer_name'] = next(k for k in FRAMES
                                                 if k in name)
            found.setdefault(tuple(text.get(key) for key in KEYS), path.stem)
    return [pytest.param(dict(zip(KEYS, k)), id=v) for k, v in found.items()]


def make_tower(folder, monkeypatch, text):
    """A random tower with such settings."""
    text = {k: v for k, v in text.items() if v is not None}
    name = text.pop('hf_tokenizer_name', None)
    monkeypatch.setitem(
        tiny_clip.VARIANTS, 'family',
        (text, dict(custom_text=name is not None or 'embed_cls' in text)))
    tiny_clip.save_model(folder, 'family')
    tower = TextTower(f'local-dir:{folder}')
    if name is not None:
        tower.tokenizer = Words(
            *FRAMES[name], text['context_length'], clean='SigLIP' in name)
    tower.context_length = text['context_length']
    return tower


@pytest.fixture
def learner(make_embeddings, monkeypatch):
    """Make a learner whose tower is a given one, in stage 2."""

    def make(tower, **options):
        monkeypatch.setattr(context_prompt_learner, 'load_tower',
                            lambda *_: tower)
        file = make_embeddings(3, tower.dim, tuple(PHRASES))
        provider = ContextPromptLearner(
            dict(type='ClassEmbeddings', file=file),
            3,
            'family',
            token_dim=tower.token_dim,
            vocabulary=PHRASES,
            **options)
        provider.train().start_learning()
        return provider

    return make


@pytest.mark.parametrize('text', families())
def test_context_of_words_is_the_sentence(tmp_path, monkeypatch, learner,
                                          text):
    """Words in the places of the context give what the sentence gives."""
    tower = make_tower(tmp_path / 'clip', monkeypatch, text)
    number = tower.find_word_tokens(['go to'
                                     ]) if not text['embed_cls'] else None
    if number is None:  # CoCa pools a token of its own
        with pytest.raises(TextTowerError, match='takes no soft prompts'):
            learner(tower, n_ctx=2)
        return
    count = number[2][0]
    sentences = [f'go to {phrase}.' for phrase in PHRASES.values()]
    expected = F.normalize(tower.encode_text(sentences), dim=1)
    # These towers tell such sentences apart.
    assert (expected[0] - expected[1]).abs().max() > .01
    provider = learner(tower, n_ctx=count, init='go to')
    torch.testing.assert_close(provider(), expected, atol=1e-5, rtol=0)


def test_long_prompts_leave_room_for_the_end(tmp_path, monkeypatch, learner):
    """SigLIP's end token is padding, and the last place is what is pooled."""
    text = dict(
        context_length=16,
        pool_type='last',
        no_causal_mask=True,
        hf_tokenizer_name='SigLIP')
    tower = make_tower(tmp_path / 'clip', monkeypatch, text)
    longest = max(tower.find_word_tokens(list(PHRASES.values()))[2])
    fits = learner(tower, n_ctx=15 - longest)
    assert fits.prompts[0][:, -1].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="'traffic light' has 6 tokens and "):
        learner(tower, n_ctx=16 - longest)


def test_other_frames_are_refused(tmp_path, monkeypatch, learner):
    tower = make_tower(tmp_path / 'clip', monkeypatch,
                       dict(context_length=77, hf_tokenizer_name='SigLIP'))
    inner = tower.tokenizer

    def clips(texts, context_length=None):
        # A class token behind the padding, as the mode 'clips' puts it.
        ids = inner(texts, context_length)
        ids[:, -1] = 7
        return ids

    clips.tokenizer, clips.tokenizer_mode = inner, 'clips'
    tower.tokenizer = clips
    with pytest.raises(TextTowerError, match='more than the words'):
        learner(tower, n_ctx=2)
