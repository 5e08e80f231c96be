# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Learned context in the prompts of every kind of text tower."""
import json
import re
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
            # As SigLIP's, which drops the full stop.
            text = text.replace('.', '' if self.clean else ' .')
            ids = [
                200 + sum(map(ord, piece)) % 300
                for piece in re.findall(r'\S{1,3}', text)
            ]
            row = [*start, *ids][:context_length - 1] + [end]
            rows.append(row + [pad] * (context_length - len(row)))
        return torch.tensor(rows)


def families():
    """Text settings of open_clip's architectures, each once."""
    found = {}
    for path in Path(open_clip.__file__).parent.glob('model_configs/*.json'):
        text = json.loads(path.read_text())['text_cfg']
        name = text.get('hf_tokenizer_name')
        # Towers of `transformers` hold no text transformer of open_clip.
        if 'hf_model_name' in text:
            continue
        if name:
            text['hf_tokenizer_name'] = next(k for k in FRAMES if k in name)
        found.setdefault(tuple(text.get(key) for key in KEYS), path.stem)
    return [pytest.param(dict(zip(KEYS, k)), id=v) for k, v in found.items()]


@pytest.fixture
def make_tower(tmp_path, monkeypatch):
    """Make a random tower with such settings."""

    def make(**text):
        text = {k: v for k, v in text.items() if v is not None}
        name = text.pop('hf_tokenizer_name', None)
        model = dict(custom_text=name is not None or 'embed_cls' in text)
        monkeypatch.setitem(tiny_clip.VARIANTS, 'family', (text, model))
        tiny_clip.save_model(tmp_path / 'clip', 'family')
        tower = TextTower(f'local-dir:{tmp_path}/clip')
        if name is not None:
            tower.tokenizer = Words(
                *FRAMES[name], text['context_length'], clean='SigLIP' in name)
        tower.context_length = text['context_length']
        return tower

    return make


@pytest.fixture
def learner(make_embeddings, monkeypatch):
    """Make a learner whose tower is a given one, in stage 2."""

    def make(tower, **options):
        monkeypatch.setattr(context_prompt_learner, 'load_tower',
                            lambda *_: tower)
        file = make_embeddings(3, tower.dim, tuple(PHRASES))
        text = dict(type='ClassEmbeddings', file=file)
        options.update(token_dim=tower.token_dim, vocabulary=PHRASES)
        provider = ContextPromptLearner(text, 3, 'family', **options)
        provider.train().start_learning()
        return provider

    return make


@pytest.mark.parametrize('text', families())
def test_context_of_words_is_the_sentence(make_tower, learner, text):
    """Words in the places of the context give what the sentence gives."""
    tower = make_tower(**text)
    if text['embed_cls']:  # CoCa pools a token of its own
        with pytest.raises(TextTowerError, match='takes no soft prompts'):
            learner(tower, n_ctx=2)
        return
    sentences = [f'go to {phrase}.' for phrase in PHRASES.values()]
    expected = F.normalize(tower.encode_text(sentences), dim=1)
    # These towers tell such sentences apart.
    assert (expected[0] - expected[1]).abs().max() > .01
    count = tower.find_word_tokens(['go to'])[2][0]
    provider = learner(tower, n_ctx=count, init='go to')
    torch.testing.assert_close(provider(), expected, atol=1e-5, rtol=0)


def test_long_prompts_leave_room_for_the_end(make_tower, learner):
    """SigLIP's end token is padding, and the last place is what is pooled."""
    text = dict(context_length=16, pool_type='last', no_causal_mask=True)
    tower = make_tower(**text, hf_tokenizer_name='SigLIP')
    longest = max(tower.find_word_tokens(list(PHRASES.values()))[2])
    fits = learner(tower, n_ctx=15 - longest)
    assert fits.prompts[0][:, -1].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="'traffic light' has 6 tokens and "):
        learner(tower, n_ctx=16 - longest)
    # Other frames are refused.
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
