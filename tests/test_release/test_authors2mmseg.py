# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checkpoints of LSeg's and TextKD's authors in MMSegmentation.

``lseg_keys.json`` has the names and shapes of LSeg's checkpoints (facts): as
isl-org/lang-seg @bb00b21 builds them, ``{0-3}`` for each number of a range.
"""
import json
import pickle
import re
import sys
import types
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config
from tool_modules import call, fails, load_tool

from mmseg_textkd.clip import TextTower
from mmseg_textkd.text.encode_classes import encode_classes

TOOL = load_tool('model_converters/lseg2mmseg.py')
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
        first, last = map(int, part.groups()) if part else (0, 0)
        for number in range(first, last + 1):
            found[re.sub(r'\{.*\}', str(number), name)] = shape
    return found


def shrink(size):
    """A sixteenth of what is a width."""
    kept = (77, 145, 577, 49408)  # words of a sentence, places, words known
    return size if size < 64 or size in kept else size // 16


def checkpoint(network, **changes):
    """A random one, sixteen times as narrow; ``None`` leaves out."""
    torch.manual_seed(0)
    state = {}
    for name, shape in keys(network).items():
        value = .2 * torch.randn([shrink(size) for size in shape])
        if name.endswith('running_var'):
            value = value.abs() + .5
        elif name.endswith('num_batches_tracked'):
            value = torch.tensor(3)
        state[f'net.{name}'] = value
    state = {k: v for k, v in (state | changes).items() if v is not None}
    theirs = dict(epoch=200, optimizer_states=[], lr_schedulers=[])
    theirs['pytorch-lightning_version'] = '1.4.9'
    return dict(theirs, state_dict=state)


def config(network):
    cfg = load_config(CONFIGS / 'lseg' / NAMES[network])
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
    episodes = head.type == 'LSegEpisodeHead'
    (head.text if episodes else head).num_classes = len(WORDS)
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
    monkeypatch.setattr(TOOL, 'ARCHITECTURE', small_clip)

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
            call(TOOL, path, source, out, *options)
        except SystemExit as error:
            assert set(tmp_path.iterdir()) == before  # nothing is written
            return str(error.code)
        return torch.load(out, weights_only=True), capsys.readouterr().out

    return run


@pytest.mark.parametrize('network', NAMES)
def test_every_weight_of_the_real_size_has_its_place(monkeypatch, network):
    """Names and shapes of the config's network, none missing, none over."""
    cfg = load_config(CONFIGS / 'lseg' / NAMES[network]).model
    cfg.backbone.pop('init_cfg', None)
    # MMSegmentation's ViT looks at numbers of it.
    monkeypatch.setattr(torch, 'linspace',
                        partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        model = MODELS.build(cfg)
        theirs = {k: torch.empty(v) for k, v in keys(network).items()}
    ours, dropped = TOOL.convert_weights(theirs, model)
    assert {
        k: v.shape
        for k, v in ours.items()
    } == {
        k: v.shape
        for k, v in model.state_dict().items()
        if not k.endswith(('class_embeddings', 'log_scale'))
    }
    clip = {k: v for k, v in keys(network).items() if k[:5] == 'clip_'}
    assert len(theirs) == len(ours) + len(dropped) + len(clip)
    of_vit = 4 if network.startswith('vit') else 0  # last norm, classifier
    assert len(dropped) == 12 + of_vit
    # And the CLIP is the one that open_clip knows by this name.
    with torch.device('meta'):
        known = open_clip.create_model(TOOL.ARCHITECTURE, device='meta')
    known = known.state_dict().items()
    assert clip == {f'clip_pretrained.{k}': list(v.shape) for k, v in known}


# Names of theirs and ours.
RENAMED = '''
scratch.layer4_rn.weight  convs.3.conv.weight
scratch.refinenet4.resConfUnit2.conv1.weight
  fusion_blocks.0.res_conv_unit2.conv1.conv.weight
scratch.refinenet1.resConfUnit1.bn2.running_var
  fusion_blocks.3.res_conv_unit1.conv2.bn.running_var
scratch.refinenet2.out_conv.bias  fusion_blocks.2.project.conv.bias
pretrained.act_postprocess2.0.project.0.weight
  reassemble_blocks.readout_projects.1.0.weight
pretrained.act_postprocess1.3.bias  reassemble_blocks.projects.0.conv.bias
pretrained.act_postprocess4.4.weight
  reassemble_blocks.resize_layers.3.weight
pretrained.model.blocks.11.norm2.weight  layers.11.ln2.weight
pretrained.model.blocks.0.attn.qkv.bias  layers.0.attn.attn.in_proj_bias
pretrained.model.blocks.0.mlp.fc2.weight  layers.0.ffn.layers.1.weight
pretrained.layer1.1.running_mean  bn1.running_mean
pretrained.layer1.4.2.conv3.weight  layer1.2.conv3.weight
pretrained.layer3.0.downsample.0.weight  layer3.0.downsample.0.weight
'''.split()


def test_weights_of_equal_shape_are_not_mistaken():
    """As whole predictions were compared with those of their code."""
    for theirs, ours in zip(RENAMED[::2], RENAMED[1::2], strict=True):
        # The deepest map comes first in ours.
        head = re.match('convs|fusion|reassemble', ours)
        part = 'decode_head' if head else 'backbone'
        assert TOOL.rename(theirs) == f'{part}.{ours}'
    assert TOOL.rename('auxlayer.0.weight') is None


@pytest.mark.parametrize('network', ['vit-b32', 'rn101'])
def test_a_checkpoint_becomes_a_network(convert, small_clip, tmp_path,
                                        network):
    content, clip = checkpoint(network), str(tmp_path / 'clip.safetensors')
    found, said = convert(network, content, '--clip', clip)
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
    vectors = encode_classes(WORDS, TextTower(small_clip, clip),
                             'none').vectors
    torch.testing.assert_close(model.decode_head.text_branch.text(), vectors)
    theirs = content['state_dict']
    weight = state['decode_head.conv_seg.projection.conv.weight']
    assert torch.equal(weight, theirs['net.scratch.head1.weight'])
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


class Harmful:
    """Its pickle would run code."""

    def __reduce__(self):
        return print, ('run', )


def test_what_is_refused(convert, capsys):
    for name, value, message in [
        ('scratch.head1.bias', None,
         '1 missing: decode_head.conv_seg.projection.conv.bias'),
        ('extra.weight', torch.ones(1), '1 weight(s) are of no network of '
         "lang-seg that is known: ['extra.weight']"),
        ('scratch.head1.weight', torch.ones(48, 16, 1, 1),
         '(48, 16, 1, 1) instead of (32, 16, 1, 1)'),
        ('clip_pretrained.text_projection', torch.ones(48, 32),
         'another CLIP than LSeg-test'),
    ]:
        content = checkpoint('vit-b32', **{f'net.{name}': value})
        assert message in convert('vit-b32', content), message
    foreign = {'backbone.a': torch.ones(1)}
    for content, message in [
        (checkpoint('vit-l16'), 'backbone.layers.12'),
        (checkpoint('rn101'), 'backbone.conv1.weight'),
        (dict(state_dict=foreign), "all named net.*: it has ['backbone.a']"),
        (dict(state_dict={}), 'has no weights'),
        (pickle.dumps(dict(state_dict=Harmful())), 'not safe to read'),
        (b'no checkpoint at all', 'is no checkpoint'),
    ]:
        assert message in convert('vit-b32', content), message
    assert 'run' not in capsys.readouterr().out


def test_lightnings_callbacks_are_names_and_no_more(convert, tmp_path,
                                                    monkeypatch):
    """Lightning 1.4 keys their states by class."""
    content, path = checkpoint('rn101'), tmp_path / 'callbacks.ckpt'
    name = 'pytorch_lightning.callbacks.model_checkpoint'
    module = types.ModuleType(name)
    Named = type('ModelCheckpoint', (dict, ), dict(__module__=name))
    module.ModelCheckpoint = Named
    content['callbacks'] = {Named: dict(best_model_path='a')}
    with monkeypatch.context() as patch:
        for parent in ('pytorch_lightning', 'pytorch_lightning.callbacks',
                       name):
            patch.setitem(sys.modules, parent, module)
        torch.save(content, path)
    found, _ = convert('rn101', path.read_bytes())
    assert len(found['state_dict']) > 300
    assert 'pytorch_lightning' not in sys.modules


TEXTKD = load_tool('model_converters/textkd_authors2mmseg.py')
TEXTKD_NAME = ('textkd_stdc1_in1k-pre_rn50-score-map{}_1xb16-10k_camvid-'
               '720x960.py')
TEXT = 'backbone.text_embeddings'
READERS = {'backbone.conv_avg.conv', 'backbone.arms.0.conv_layer.conv'}
K = 11


def model_of(kind=''):
    """The network here, without pre-trained weights."""
    cfg = load_config(CONFIGS / 'textkd' / TEXTKD_NAME.format(kind))
    cfg.model.backbone.backbone_cfg.pop('init_cfg', None)
    return cfg, MODELS.build(cfg.model).eval()


def theirs_of(model):
    """A random checkpoint, by their names and in their order."""
    torch.manual_seed(0)
    state = {
        k: torch.rand(v.shape) + 0.5 if 'running_var' in k else v.clone()
        for k, v in model.state_dict().items() if k[:6] != 'score_'
    }
    for name in READERS:
        key = f'{name}.weight'
        extra = torch.randn(len(state[key]), K, *state[key].shape[2:]) * 0.1
        state[key] = torch.cat([state[key], extra], dim=1)
    return {**state, TEXT: torch.randn(K, 1024)}


def run_theirs(state, model, image):
    """Their network: the stock class, wider, on concatenated features."""
    cfg = load_config(CONFIGS / 'textkd' / TEXTKD_NAME.format('')).model
    wide = MODELS.build(dict(cfg.backbone,
                             last_in_channels=(1024 + K, 512))).eval()
    text = F.normalize(state.pop(TEXT), dim=1)[..., None, None]
    head = MODELS.build(cfg.decode_head).eval()
    for part, prefix in ((wide, 'backbone.'), (head, 'decode_head.')):
        own = {k: v for k, v in state.items() if k.startswith(prefix)}
        part.load_state_dict({k[len(prefix):]: v for k, v in own.items()})

    def concatenate(module, args, output):
        scores = F.conv2d(F.normalize(output[-1]), text)
        return (*output[:-1], torch.cat([output[-1], scores], dim=1))

    wide.backbone.register_forward_hook(concatenate)
    with torch.no_grad():
        return head(wide(image))


def test_predictions_are_theirs_in_the_order_of_the_data_set():
    cfg, model = model_of()
    state = theirs_of(model)
    words = TEXTKD.words_of(cfg)
    assert words[:5] == ['Sky', 'Building', 'Column_Pole', 'Road', 'Sidewalk']
    model.load_state_dict(TEXTKD.convert(state, model, words), strict=True)
    image = torch.randn(1, 3, 128, 192)
    expected = run_theirs(dict(state), model, image)
    order = [TEXTKD.CAMVID.index(word) for word in words]
    with torch.no_grad():
        found = model(image, mode='tensor')
    torch.testing.assert_close(found, expected[:, order], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_other_checkpoints_are_refused(tmp_path, capsys):
    cfg, model = model_of()
    state, words = theirs_of(model), TEXTKD.words_of(cfg)
    narrow = torch.zeros(128, 1024, 1, 1)
    contexts = torch.zeros(K, 11, 512)
    for key, value, message in [
        ('backbone.conv_avg.conv.weight', narrow, 'reads 1024 channels, not '
         '1024 and'),
        (TEXT, None, 'no backbone.text_embeddings'),
        ('backbone.contexts', contexts, 'one of stage 2'),
    ]:
        bad = {k: v for k, v in {**state, key: value}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            TEXTKD.convert(bad, model, words)
    # Surplus keys, through the tool: nothing is written.
    path, out = tmp_path / 'theirs.pth', tmp_path / 'out.pth'
    torch.save(dict(state_dict={**state, 'neck.weight': state[TEXT]}), path)
    words = CONFIGS / 'textkd' / TEXTKD_NAME.format(''), path, out
    assert 'neck.weight' in fails(TEXTKD, capsys, *words)
    assert not out.exists()
    torch.save(dict(state_dict=state), path)
    call(TEXTKD, *words)
    assert 'split (backbone.' in capsys.readouterr().out
    written = torch.load(out, weights_only=True)['state_dict']
    assert 'score_map.text.class_embeddings' in written


@pytest.mark.slow
def test_stage_2_with_its_own_text_encoder():
    """Real shapes; random weights of CLIP's RN50 text encoder."""
    cfg, model = model_of('-stage2')
    state, words = theirs_of(model), TEXTKD.words_of(cfg)
    del state[TEXT]
    torch.manual_seed(0)
    clip = open_clip.create_model('RN50-quickgelu')
    parts = ('transformer', 'token_embedding', 'ln_final', 'text_projection')
    for name, value in clip.state_dict().items():
        if name.startswith(parts):
            state[f'backbone.text_encoder.{name}'] = value
    places = clip.positional_embedding.detach()[:16]
    state['backbone.text_encoder.positional_embedding'] = places
    tokens = open_clip.SimpleTokenizer(context_length=5)(list(TEXTKD.CAMVID))
    contexts = torch.randn(K, 11, 512)
    state['backbone.contexts'] = contexts
    state['backbone.label_texts'] = tokens.float()
    converted = TEXTKD.convert(state, model, words)
    model.load_state_dict(converted, strict=True)
    order = [TEXTKD.CAMVID.index(word) for word in words]
    assert torch.equal(model.score_map.text.context, contexts[order])
    # As they encode: vectors behind SOS, then the name, 16 tokens in all.
    ids = tokens[order]
    with torch.no_grad():
        x = clip.token_embedding(ids)
        x = torch.cat([x[:, :1], contexts[order], x[:, 1:]], dim=1)
        x = x + clip.positional_embedding[:16]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:16, :16])
        x = clip.ln_final(x)[torch.arange(K), ids.argmax(dim=1) + 11]
        expected = F.normalize(x @ clip.text_projection, dim=1)
    vectors = converted['score_map.text.class_embeddings']
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    state['backbone.label_texts'] = tokens[list(range(1, K)) + [0]].float()
    with pytest.raises(ValueError, match='class names are not'):
        TEXTKD.convert(state, model, words)
