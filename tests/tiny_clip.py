# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Small, randomly initialized open_clip models in ``local-dir:`` form."""

import gzip
import json
from pathlib import Path

import torch

MERGES = ('r o', 'ro a', 'roa d</w>', 'c a', 'ca r</w>', 's k', 'sk y</w>')
TEXT_CFG = dict(
    context_length=77,
    vocab_size=512 + len(MERGES) + 2,
    width=32,
    heads=4,
    layers=2)
EOS = TEXT_CFG['vocab_size'] - 1
# Name -> (changes of the text config, changes of the model config).
VARIANTS = {
    'clip': ({}, {}),
    'custom': ({}, dict(custom_text=True)),
    'eos': (dict(pool_type='eos', eos_id=EOS), dict(custom_text=True)),
    'wide_bias': (dict(width=48, proj_bias=True), dict(quick_gelu=True)),
    'no_proj': (dict(proj_type='none'), dict(custom_text=True)),
    'qk_norm': (dict(qk_norm=True), dict(custom_text=True)),
    'last': (dict(pool_type='last'), dict(custom_text=True)),
    'bidirectional': (dict(no_causal_mask=True), {}),
    'bidirectional_last': (dict(no_causal_mask=True,
                                pool_type='last'), dict(custom_text=True)),
    'cls': (dict(embed_cls=True, output_tokens=True), dict(custom_text=True)),
}


def save_model(folder: Path,
               variant: str,
               seed: int = 0,
               own_words: bool = True) -> None:
    """Write a random model as open_clip itself would read it.

    With words of its own it has a small vocabulary in a file, which keeps it
    small; else it has open_clip's.
    """
    import open_clip
    from safetensors.torch import save_file
    text, model = VARIANTS[variant]
    cfg = dict(
        embed_dim=24,
        vision_cfg=dict(
            image_size=32, layers=1, width=32, head_width=16, patch_size=16),
        text_cfg=dict(TEXT_CFG, **text),
        **model)
    if not own_words:
        cfg['text_cfg'].update(vocab_size=49408)
    torch.manual_seed(seed)
    build = dict(cfg)
    kind = open_clip.model.CustomTextCLIP if build.pop(
        'custom_text', False) else open_clip.model.CLIP
    clip = kind(**build)
    for parameter in clip.parameters():
        # open_clip's initial values make nearly the same vector of any text.
        parameter.data += .05 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    config = json.dumps(dict(model_cfg=cfg, preprocess_cfg={}))
    (folder / 'open_clip_config.json').write_text(config)
    save_file({
        k: v.contiguous()
        for k, v in clip.state_dict().items()
    }, folder / 'open_clip_model.safetensors')
    if not own_words:
        return
    with gzip.open(folder / 'bpe_vocab.txt.gz', 'wt') as file:
        file.write('\n'.join(['#version: 0.2', *MERGES]))


def open_clip_model(folder: Path) -> tuple:
    """The model and its tokenizer, by open_clip's own loading."""
    import open_clip
    name = f'local-dir:{folder}'
    bpe = str(folder / 'bpe_vocab.txt.gz')
    tokenizer = open_clip.get_tokenizer(name, bpe_path=bpe)
    return open_clip.create_model(name).eval(), tokenizer
