# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The converter, on checkpoints that have the authors' keys and shapes.

``published_keys.json`` lists them: those of slonetime/EBSeg @f61977d with
open_clip_torch 2.20.0, built at its two configurations. ``{0-8}`` stands for
the numbers 0 to 8.
"""
import json
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config
from processes import ROOT

from mmseg_textkd.text import TextEmbeddings

TOOL = runpy.run_path(f'{ROOT}/tools/model_converters/ebseg2mmseg.py')
FACTS = json.loads(
    Path(__file__).with_name('published_keys.json').read_text('utf-8'))
TEXT = 'decode_head.text.trained.class_embeddings'
CONFIG = 'ebseg/ebseg_{}_4xb4-120k_coco-stuff164k-640x640.py'
WIDTH = {'vit-b16': 512, 'vit-l14-336': 768}


def published(model):
    """Weights of each key, all of one value: the file stays small."""
    shapes = {}
    for pattern, shape in {**FACTS['both'], **FACTS[model]}.items():
        numbers = re.search(r'\{(.*?)\}', pattern)
        for part in numbers[1].split(',') if numbers else ['0']:
            first, _, last = part.partition('-')
            for i in range(int(first), int(last or first) + 1):
                shapes[re.sub(r'\{.*?\}', str(i), pattern)] = shape
    # What is there twice is equal.
    return {
        key:
        torch.tensor(1. if 'clip_' in key else float(number)).expand(
            shapes[key])
        for number, key in enumerate(sorted(shapes))
    }


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Get a function that converts weights with the tool's command line."""
    names = tuple(DATASETS.get('COCOStuffDataset').METAINFO['classes'])
    monkeypatch.chdir(tmp_path)
    for width in WIDTH.values():
        vectors = F.normalize(torch.randn(171, width), dim=1)
        TextEmbeddings(vectors, names).save(f'{width}.safetensors')

    def run(saved, model='vit-b16'):
        torch.save(saved, 'theirs.pth')
        argv = ['theirs.pth', 'ours.pth', '--model', model]
        TOOL['main'](argv + ['--embeddings', f'{WIDTH[model]}.safetensors'])
        return torch.load('ours.pth', weights_only=True)

    return run


# Which of their weights becomes which of ours.
PIXELS = 'sem_seg_head.pixel_decoder.'
MASKS = 'sem_seg_head.predictor.'
KEYS = [
    line.split() for line in f'''
image_encoder.positional_embedding clip_visual_extractor.positional_embedding
backbone.positional_embedding backbone.pos_embed
decode_head.no_object ov_classifier.bg_embed
neck.lateral.0.conv.weight {PIXELS}adapter_1.weight
neck.lateral.1.conv.bias {PIXELS}input_proj.2.0.bias
neck.lateral.3.gn.weight {PIXELS}input_proj.0.1.weight
neck.attention.5.offsets.bias
  {PIXELS}transformer.encoder.layers.5.self_attn.sampling_offsets.bias
neck.feedforward.2.layers.2.weight
  {PIXELS}transformer.encoder.layers.2.linear2.weight
decode_head.decoder.cross_attention.8.attention.in_proj_weight
  {MASKS}transformer_cross_attention_layers.8.multihead_attn.in_proj_weight
decode_head.embedder.embed.4.weight {MASKS}mask_embed1.layers.2.weight
decode_head.embedder.bias.2.bias {MASKS}attn_proj.layers.1.bias
decode_head.embedder.length {MASKS}logit_scale
'''.replace('\n  ', ' ').strip().splitlines()
]


@pytest.mark.parametrize('model', WIDTH)
def test_every_key_is_accounted_for(convert, tmp_path, capsys, model):
    theirs = published(model)
    assert len(theirs) == dict(zip(WIDTH, (800, 944)))[model]
    ours = convert(dict(model=theirs, iteration=119999), model)
    assert not list(tmp_path.glob('*_clip*'))
    said = capsys.readouterr().out
    assert "['criterion.empty_weight', 'ov_classifier.attn_mask']" in said
    state, meta = ours['state_dict'], ours['meta']
    assert len(meta['dataset_meta']['classes']) == 171
    net = MODELS.build(load_config(CONFIGS / CONFIG.format(model)).model)
    net.load_state_dict(state, strict=True)
    # By value.
    for own, their in KEYS:
        assert state[own].flatten()[0] == theirs[their].flatten()[0], own
    # No weight of theirs is used for two of ours.
    others = re.compile(f'clip|image_encoder|{TEXT}')
    used = [
        v.flatten()[0].item() for k, v in state.items() if not others.search(k)
    ]
    assert len(used) == len(set(used))


@pytest.fixture(scope='module')
def wanted():
    """Keys and shapes of what a checkpoint is split into."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        return TOOL['expected'](
            load_config(CONFIGS / CONFIG.format('vit-b16')))


def test_towers_are_open_clips_and_timms(wanted):
    theirs = published('vit-b16')
    for number, key in enumerate(k for k in theirs if 'clip_' in k):
        if 'ln_post' not in key and '.proj' not in key:
            theirs[key] = torch.tensor(float(number)).expand(theirs[key].shape)
    parts, _ = TOOL['split'](theirs, 9)
    for part in ('clip', 'sam'):
        TOOL['compare'](part, parts[part], wanted[part])
    own, blocks = {**parts['clip'], **parts['sam']}, 'visual.transformer.'
    pairs = [
        (f'{blocks}resblocks.1.attn.in_proj_weight',
         'clip_visual_extractor.resblocks.1.attn.in_proj_weight'),
        (f'{blocks}resblocks.2.attn.in_proj_bias',
         'clip_visual_extractor.resblocks.2.attn.qkv.bias'),
        (f'{blocks}resblocks.10.mlp.c_fc.weight',
         'clip_rec_head.resblocks.1.mlp.c_fc.weight'),
        ('token_embedding.weight', 'ov_classifier.token_embedding.weight'),
        ('blocks.3.mlp.fc1.bias', 'backbone.blocks.3.mlp.lin1.bias'),
    ]
    for name, their in pairs:
        assert torch.equal(own[name], theirs[their]), name


QUERIES = 'sem_seg_head.predictor.query_feat.weight'


@each_case('change, message', [
    (lambda s: s.pop('sem_seg_head.predictor.logit_scale'),
     'missing: decode_head.embedder.length'),
    (lambda s: s.pop('backbone.blocks.7.attn.rel_pos_h'),
     'missing: blocks.7.attn.rel_pos_h'),
    (lambda s: s.update(prompt=torch.zeros(3)), 'does not have: prompt'),
    (lambda s: s.update({QUERIES: s[QUERIES][:50]}),
     r'decoder.query.weight \(50, 256\) instead of \(100, 256\)'),
    (lambda s: s.update({'clip_rec_head.proj': s['clip_rec_head.proj'] + 1}),
     'is there under another name'),
])
def test_what_does_not_fit_is_refused(wanted, change, message):
    state = published('vit-b16')
    change(state)
    with pytest.raises(ValueError, match=message):
        parts, _ = TOOL['split'](state, 9)
        for part, keys in wanted.items():
            TOOL['compare'](part, parts[part], keys)


def test_another_variant_or_code_is_refused(convert, tmp_path):
    whole = published('vit-b16')
    short = dict(whole)
    del short['sem_seg_head.predictor.decoder_norm.bias']
    cases = [
        (short, 'vit-b16', 'missing: decode_head.decoder.norm'),
        (dict(weight=torch.zeros(3)), 'vit-b16', 'is no EBSeg'),
        (whole, 'vit-l14-336', 'another CLIP than vit-l14-336'),
        (dict(model=dict(whole, epoch=3)), 'vit-b16', 'no tensor: epoch'),
        # A pickle that would call a function of ours.
        (dict(model=whole, hook=Path('x')), 'vit-b16', 'not safe to read'),
    ]
    for saved, model, message in cases:
        with pytest.raises(SystemExit, match=message):
            convert(saved, model)
    (tmp_path / 'theirs.pth').write_bytes(pickle.dumps('text')[:-3])
    argv = ['theirs.pth', 'ours.pth', '--model', 'vit-b16']
    with pytest.raises(SystemExit, match='damaged'):
        TOOL['main'](argv)
    assert not list(tmp_path.glob('ours*'))
    (tmp_path / 'ours.pth').write_text('mine')
    with pytest.raises(SystemExit):
        TOOL['main'](argv)
    assert (tmp_path / 'ours.pth').read_text() == 'mine'
