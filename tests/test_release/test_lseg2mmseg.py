# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checkpoints of LSeg's authors in MMSegmentation.

``lseg_keys.json`` has the names and shapes of their checkpoints (facts): as
isl-org/lang-seg @bb00b21 builds them, ``{0-3}`` for each number of a range.
"""
import copy
import json
import os.path as osp
import pickle
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config
from processes import TOOLS
from tool_modules import load_tool

from mmseg_textkd.clip import TextTower
from mmseg_textkd.text.encode_classes import encode_classes

TOOL = osp.join(TOOLS, 'model_converters', 'lseg2mmseg.py')
KEYS = json.loads((Path(__file__).parent / 'lseg_keys.json').read_text())
NAMES = {
    'vit-l16': 'lseg_dpt_vit-l16_vit-b32_6xb1-808k_ade20k-480x480.py',
    'vit-b32': 'lseg_dpt_vit-b32_vit-b32_6xb1-808k_ade20k-480x480.py',
    'rn101': 'lseg_dpt_r101_vit-b32_pascal-5i-episodes-480x480.py',
}
WORDS = ['others', 'cat', 'dog']
BLOCK = 'scratch.head_block.depthwise.depthwise.'


def keys(network):
    """Names and shapes of a checkpoint, in `net.`."""
    both = {f'clip_pretrained.{k}': v for k, v in KEYS['clip'].items()}
    found = {}
    for name, shape in {**KEYS[network], **both}.items():
        part = re.search(r'\{(\d+)-(\d+)\}', name)
        numbers = range(int(part[1]), int(part[2]) + 1) if part else ['']
        for number in numbers:
            own = name.replace(part[0], str(number)) if part else name
            found[own] = shape
    return found


def shrink(size):
    """A sixteenth of what is a width."""
    kept = (77, 145, 577, 49408)  # words of a sentence, places, words known
    return size if size < 64 or size in kept else size // 16


def checkpoint(network, **changes):
    """A random one, sixteen times as narrow; what Lightning adds, too."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in keys(network).items():
        shape = [shrink(size) for size in shape]
        if name.endswith('num_batches_tracked'):
            value = torch.tensor(3)
        else:
            value = .2 * torch.randn(shape, generator=generator)
            if name.endswith('running_var'):
                value = value.abs() + .5
        state[f'net.{name}'] = value
    state.update(changes)
    return {
        'epoch': 200,
        'pytorch-lightning_version': '1.4.9',
        'state_dict': state,
        'optimizer_states': [],
        'lr_schedulers': [],
    }


def config(network):
    cfg = copy.deepcopy(load_config(CONFIGS / 'lseg' / NAMES[network]))
    backbone, head = cfg.model.backbone, cfg.model.decode_head
    for key in ('in_channels', 'post_process_channels'):
        head[key] = [shrink(size) for size in head[key]]
    head.channels = 16
    if network == 'rn101':
        backbone.update(base_channels=4, stem_channels=4)
    else:
        width = shrink(backbone.embed_dims)
        backbone.embed_dims = head.embed_dims = width
    head.text.update(dim=32)
    if head.type == 'LSegEpisodeHead':
        head.text.num_classes = len(WORDS)
    else:
        head.num_classes = len(WORDS)
    head.text.classes = WORDS
    head.text.build.vocabulary = WORDS
    return cfg


@pytest.fixture(scope='module')
def small_clip(tmp_path_factory):
    """Name of an architecture like CLIP ViT-B/32 and as narrow."""
    folder = tmp_path_factory.mktemp('architecture')
    cfg = open_clip.get_model_config('ViT-B-32-quickgelu')
    cfg.update(embed_dim=32)
    cfg['vision_cfg'].update(width=48, head_width=4)
    cfg['text_cfg'].update(width=32)
    (folder / 'LSeg-test.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(folder)
    return 'LSeg-test'


@pytest.fixture
def convert(small_clip, tmp_path, monkeypatch, capsys):
    """Convert a checkpoint; return what was written, or the message."""
    tool = load_tool('model_converters/lseg2mmseg.py')
    monkeypatch.setattr(tool, 'ARCHITECTURE', small_clip)

    def run(network, content, *options, cfg=None):
        path, source = tmp_path / 'config.py', tmp_path / 'theirs.ckpt'
        (cfg or config(network)).dump(path)
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            torch.save(content, source)
        out = tmp_path / 'out.pth'
        before = set(tmp_path.iterdir())
        try:
            tool.main([str(path), str(source), str(out), *options])
        except SystemExit as error:
            assert set(tmp_path.iterdir()) == before  # nothing is written
            return str(error.code)
        return torch.load(out, weights_only=True), capsys.readouterr().out

    return run


@pytest.mark.parametrize('network', NAMES)
def test_every_weight_of_the_real_size_has_its_place(monkeypatch, network):
    """Names and shapes of the config's network, none missing, none over."""
    tool = load_tool('model_converters/lseg2mmseg.py')
    cfg = load_config(CONFIGS / 'lseg' / NAMES[network]).model
    cfg = copy.deepcopy(cfg)
    cfg.backbone.pop('init_cfg', None)
    # MMSegmentation's ViT looks at numbers of it.
    monkeypatch.setattr(torch, 'linspace',
                        partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        model = MODELS.build(cfg)
        theirs = {k: torch.empty(v) for k, v in keys(network).items()}
    ours, dropped = tool.convert_weights(theirs, model)
    expected = {
        k: v.shape
        for k, v in model.state_dict().items()
        if not k.endswith(('class_embeddings', 'log_scale'))
    }
    assert {k: v.shape for k, v in ours.items()} == expected
    clip = [k for k in theirs if k.startswith('clip_pretrained.')]
    assert len(theirs) == len(ours) + len(dropped) + len(clip)
    of_vit = 4 if network.startswith('vit') else 0  # last norm, classifier
    assert len(dropped) == 12 + of_vit
    # And the CLIP is the one that open_clip knows by this name.
    with torch.device('meta'):
        known = open_clip.create_model(
            tool.ARCHITECTURE, device='meta').state_dict()
    assert {
        k: list(v.shape)
        for k, v in known.items()
    } == {
        k[len('clip_pretrained.'):]: keys(network)[k]
        for k in clip
    }


def test_weights_of_equal_shape_are_not_mistaken():
    """As whole predictions were compared with those of their code."""
    rename = load_tool('model_converters/lseg2mmseg.py').rename
    blocks, fusion = 'decode_head.reassemble_blocks.', 'decode_head.fusion_'
    for theirs, ours in {
            'scratch.layer4_rn.weight': 'decode_head.convs.3.conv.weight',
            # The deepest map comes first in ours.
            'scratch.refinenet4.resConfUnit2.conv1.weight':
            f'{fusion}blocks.0.res_conv_unit2.conv1.conv.weight',
            'scratch.refinenet1.resConfUnit1.bn2.running_var':
            f'{fusion}blocks.3.res_conv_unit1.conv2.bn.running_var',
            'scratch.refinenet2.out_conv.bias':
            f'{fusion}blocks.2.project.conv.bias',
            'pretrained.act_postprocess2.0.project.0.weight':
            f'{blocks}readout_projects.1.0.weight',
            'pretrained.act_postprocess1.3.bias':
            f'{blocks}projects.0.conv.bias',
            'pretrained.act_postprocess4.4.weight':
            f'{blocks}resize_layers.3.weight',
            'pretrained.model.blocks.11.norm2.weight':
            'backbone.layers.11.ln2.weight',
            'pretrained.model.blocks.0.attn.qkv.bias':
            'backbone.layers.0.attn.attn.in_proj_bias',
            'pretrained.model.blocks.0.mlp.fc2.weight':
            'backbone.layers.0.ffn.layers.1.weight',
            'pretrained.layer1.1.running_mean': 'backbone.bn1.running_mean',
            'pretrained.layer1.4.2.conv3.weight':
            'backbone.layer1.2.conv3.weight',
            'pretrained.layer3.0.downsample.0.weight':
            'backbone.layer3.0.downsample.0.weight',
            'auxlayer.0.weight': None,
    }.items():
        assert rename(theirs) == ours


@pytest.mark.parametrize('network', ['vit-b32', 'rn101'])
def test_a_checkpoint_becomes_a_network(convert, small_clip, tmp_path,
                                        network):
    content = checkpoint(network)
    found, said = convert(network, content, '--clip',
                          str(tmp_path / 'clip.safetensors'))
    state = found['state_dict']
    assert found['meta']['dataset_meta']['classes'] == tuple(WORDS)
    cfg = config(network).model
    cfg.backbone.pop('init_cfg', None)
    cfg.decode_head.norm_cfg.type = 'BN'
    if network == 'rn101':
        cfg.backbone.norm_cfg.type = 'BN'
    model = MODELS.build(cfg).eval()
    model.load_state_dict(state, strict=True)
    # The words, in the CLIP of the checkpoint, which encodes others too.
    tower = TextTower(small_clip, str(tmp_path / 'clip.safetensors'))
    vectors = encode_classes(WORDS, tower, 'none').vectors
    torch.testing.assert_close(model.decode_head.text_branch.text(), vectors)
    theirs = content['state_dict']
    head1 = theirs['net.scratch.head1.weight']
    assert torch.equal(state['decode_head.conv_seg.projection.conv.weight'],
                       head1)
    used = len(state) - 2
    assert f'{len(theirs)} weights: {used} used' in said
    assert 'scratch.refinenet4.resConfUnit1.conv1.weight' in said


def test_blocks_share_a_kernel(convert):
    weight = torch.arange(9.).view(1, 1, 3, 3)
    changes = {f'net.{BLOCK}weight': weight, f'net.{BLOCK}bias': torch.ones(1)}
    cfg = config('vit-b32')
    content = checkpoint('vit-b32', **changes)
    assert 'give them as `model.decode_head' in convert('vit-b32', content)
    cfg.model.decode_head.text_branch.regularization = dict(
        kind='bottleneck', depth=2)
    assert f'has no {BLOCK}weight' in convert(
        'vit-b32', checkpoint('vit-b32'), cfg=cfg)
    state = convert('vit-b32', content, cfg=cfg)[0]['state_dict']
    name = 'decode_head.conv_seg.regularization.'
    assert torch.equal(state[f'{name}weight'], weight[0].expand(2, 3, 3))
    assert state[f'{name}bias'].tolist() == [1, 1]


def without(content, name):
    del content['state_dict'][name]
    return content


def harmful():
    """A pickle that would run code."""

    class Harmful:

        def __reduce__(self):
            return print, ('run', )

    return pickle.dumps(dict(state_dict=Harmful()))


def test_what_is_refused(convert, capsys):
    cases = [
        (checkpoint('vit-l16'), 'backbone.layers.12'),
        (checkpoint('rn101'), 'backbone.conv1.weight'),
        (without(checkpoint('vit-b32'), 'net.scratch.head1.bias'),
         '1 missing: decode_head.conv_seg.projection.conv.bias'),
        (checkpoint('vit-b32', **{'net.extra.weight': torch.ones(1)}),
         "1 weight(s) are of no network of lang-seg that is known: "
         "['extra.weight']"),
        (checkpoint('vit-b32',
                    **{'net.scratch.head1.weight': torch.ones(48, 16, 1, 1)}),
         '(48, 16, 1, 1) instead of (32, 16, 1, 1)'),
        (checkpoint(
            'vit-b32',
            **{'net.clip_pretrained.text_projection':
               torch.ones(48, 32)}), 'another CLIP than LSeg-test'),
        (dict(state_dict={'backbone.a': torch.ones(1)}),
         "all named net.*: it has ['backbone.a']"),
        (dict(state_dict={}), 'has no weights'),
        (harmful(), 'not safe to read'),
        (b'no checkpoint at all', 'is no checkpoint'),
    ]
    for content, message in cases:
        assert message in convert('vit-b32', content), message
    assert 'run' not in capsys.readouterr().out


def test_lightnings_callbacks_are_names_and_no_more(convert, tmp_path):
    """Lightning 1.4 keys their states by class."""
    content = checkpoint('rn101')
    torch.save(content, tmp_path / 'plain.ckpt')
    name = 'pytorch_lightning.callbacks.model_checkpoint'

    class Named(dict):
        pass

    Named.__module__, Named.__qualname__ = name, 'ModelCheckpoint'
    Named.__name__ = 'ModelCheckpoint'
    import sys
    import types
    module = types.ModuleType(name)
    module.ModelCheckpoint = Named
    parents = ('pytorch_lightning', 'pytorch_lightning.callbacks', name)
    try:
        for parent in parents:
            sys.modules[parent] = module
        content['callbacks'] = {Named: dict(best_model_path='a')}
        torch.save(content, tmp_path / 'theirs.ckpt')
    finally:
        for parent in parents:
            del sys.modules[parent]
    data = (tmp_path / 'theirs.ckpt').read_bytes()
    found, _ = convert('rn101', data)
    assert len(found['state_dict']) > 300
    assert 'pytorch_lightning' not in sys.modules
