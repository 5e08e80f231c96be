# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checkpoints of TextKD's authors: names, widths, order of the classes."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config
from tool_modules import load_tool

TOOL = load_tool('model_converters/textkd_authors2mmseg.py')
NAME = 'textkd_stdc1_in1k-pre_rn50-score-map{}_1xb16-10k_camvid-720x960.py'
TEXT = 'backbone.text_embeddings'
READERS = {'backbone.conv_avg.conv', 'backbone.arms.0.conv_layer.conv'}
K = 11


def model_of(kind=''):
    """The network here, without pre-trained weights."""
    cfg = copy.deepcopy(load_config(CONFIGS / 'textkd' / NAME.format(kind)))
    cfg.model.backbone.backbone_cfg.pop('init_cfg', None)
    return cfg, MODELS.build(cfg.model).eval()


def theirs_of(model):
    """A random checkpoint, by their names and in their order."""
    torch.manual_seed(0)
    state = {
        k: torch.rand(v.shape) + 0.5 if 'running_var' in k else v.clone()
        for k, v in model.state_dict().items()
        if not k.startswith('score_map.')
    }
    for name in READERS:
        key = f'{name}.weight'
        extra = torch.randn(len(state[key]), K, *state[key].shape[2:]) * 0.1
        state[key] = torch.cat([state[key], extra], dim=1)
    return {**state, TEXT: torch.randn(K, 1024)}


def run_theirs(state, model, image):
    """Their network: the stock class, wider, on concatenated features."""
    cfg = load_config(CONFIGS / 'textkd' / NAME.format('')).model
    wide = MODELS.build(dict(cfg.backbone,
                             last_in_channels=(1024 + K, 512))).eval()
    text = F.normalize(state.pop(TEXT), dim=1)
    wide.load_state_dict({
        k[len('backbone.'):]: v
        for k, v in state.items() if k.startswith('backbone.')
    })

    def concatenate(module, args, output):
        scores = torch.einsum('nchw,kc->nkhw', F.normalize(output[-1]), text)
        return (*output[:-1], torch.cat([output[-1], scores], dim=1))

    wide.backbone.register_forward_hook(concatenate)
    head = MODELS.build(cfg.decode_head).eval()
    head.load_state_dict({
        k[len('decode_head.'):]: v
        for k, v in state.items() if k.startswith('decode_head.')
    })
    with torch.no_grad():
        return head(wide(image))


def test_predictions_are_theirs_in_the_order_of_the_data_set():
    cfg, model = model_of()
    state = theirs_of(model)
    words = TOOL.words_of(cfg)
    assert words[:5] == ['Sky', 'Building', 'Column_Pole', 'Road', 'Sidewalk']
    model.load_state_dict(TOOL.convert(state, model, words), strict=True)
    image = torch.randn(1, 3, 128, 192)
    expected = run_theirs(dict(state), model, image)
    order = [TOOL.CAMVID.index(word) for word in words]
    with torch.no_grad():
        found = model(image, mode='tensor')
    torch.testing.assert_close(found, expected[:, order], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_other_checkpoints_are_refused(tmp_path, capsys):
    cfg, model = model_of()
    state, words = theirs_of(model), TOOL.words_of(cfg)
    narrow = dict(state)
    narrow['backbone.conv_avg.conv.weight'] = torch.zeros(128, 1024, 1, 1)
    with pytest.raises(ValueError, match='reads 1024 channels, not 1024 and'):
        TOOL.convert(narrow, model, words)
    with pytest.raises(ValueError, match='no backbone.text_embeddings'):
        TOOL.convert({
            k: v
            for k, v in state.items() if k != TEXT
        }, model, words)
    with pytest.raises(ValueError, match='one of stage 2'):
        TOOL.convert({
            **state, 'backbone.contexts': torch.zeros(K, 11, 512)
        }, model, words)
    # Surplus keys, through the tool: nothing is written.
    path, out = tmp_path / 'theirs.pth', tmp_path / 'out.pth'
    torch.save(dict(state_dict={**state, 'neck.weight': state[TEXT]}), path)
    config = str(CONFIGS / 'textkd' / NAME.format(''))
    with pytest.raises(SystemExit, match='neck.weight'):
        TOOL.main([config, str(path), str(out)])
    torch.save(dict(state_dict=state), path)
    TOOL.main([config, str(path), str(out)])
    assert 'split (backbone.' in capsys.readouterr().out
    assert 'score_map.text.class_embeddings' in torch.load(
        out, weights_only=True)['state_dict']


@pytest.mark.slow
def test_stage_2_with_its_own_text_encoder():
    """Real shapes; random weights of CLIP's RN50 text encoder."""
    import open_clip
    cfg, model = model_of('-stage2')
    state, words = theirs_of(model), TOOL.words_of(cfg)
    del state[TEXT]
    torch.manual_seed(0)
    clip = open_clip.create_model('RN50-quickgelu')
    parts = ('transformer', 'token_embedding', 'ln_final', 'text_projection')
    state.update({
        f'backbone.text_encoder.{name}': value
        for name, value in clip.state_dict().items() if name.startswith(parts)
    })
    state['backbone.text_encoder.positional_embedding'] = (
        clip.positional_embedding.detach()[:16])
    tokens = open_clip.SimpleTokenizer(context_length=5)(list(TOOL.CAMVID))
    contexts = torch.randn(K, 11, 512)
    state.update({
        'backbone.contexts': contexts,
        'backbone.label_texts': tokens.float()
    })
    converted = TOOL.convert(state, model, words)
    model.load_state_dict(converted, strict=True)
    order = [TOOL.CAMVID.index(word) for word in words]
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
    torch.testing.assert_close(
        converted['score_map.text.class_embeddings'],
        expected,
        rtol=1e-4,
        atol=1e-5)
    state['backbone.label_texts'] = tokens[list(range(1, K)) + [0]].float()
    with pytest.raises(ValueError, match='class names are not'):
        TOOL.convert(state, model, words)
