# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Turn a checkpoint of LSeg's authors into one of MMSegmentation.

CHECKPOINT is a Lightning checkpoint of https://github.com/isl-org/lang-seg:
`demo_e200.ckpt` and the like, or one of the zero-shot part (PASCAL-5i,
COCO-20i, FSS-1000). CONFIG is the config in configs/lseg of the same network;
its words are encoded with the CLIP in CHECKPOINT. Every weight must be known:
used, of that CLIP, or one that their network does not use. Else nothing is
written.
"""
import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

# OpenAI's, with its QuickGELU.
ARCHITECTURE = 'ViT-B-32-quickgelu'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the same network')
    parser.add_argument(
        'checkpoint', type=Path, help='checkpoint of the authors, *.ckpt')
    parser.add_argument('--out', type=Path, help='checkpoint to write, *.pth')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--clip',
        type=Path,
        help='write the CLIP in CHECKPOINT too, *.safetensors, to encode '
        f'other words with: --model {ARCHITECTURE} --pretrained CLIP')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    if args.clip and args.clip.suffix != '.safetensors':
        parser.error(f'--clip must end in .safetensors: {args.clip}')
    for path in filter(None, (args.out, args.clip)):
        if path.exists():
            parser.error(f'{path} exists; remove it or write to another file')
        if not path.absolute().parent.is_dir():
            parser.error(f'there is no folder {path.absolute().parent}')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.weights import import_open_clip
from mmseg_textkd.models import LSegDPTHead
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.text.vocabulary import Vocabulary
from mmseg_textkd.utils.arguments import explain, read_config, warn_renamed
from mmseg_textkd.utils.checkpoint import (checkpoint_bytes, load_strictly,
                                           read_checkpoint)
from mmseg_textkd.utils.io import write_files

NET, CLIP = 'net.', 'clip_pretrained.'
# Lightning writes down the classes of its callbacks. Only their names are
# read, nothing of Lightning is imported or called.
CALLBACKS = [
    f'pytorch_lightning.callbacks.{name}'
    for name in ('model_checkpoint.ModelCheckpoint',
                 'lr_monitor.LearningRateMonitor',
                 'early_stopping.EarlyStopping')
]
# What their forward pass does not go through.
UNUSED = re.compile(r'pretrained\.model\.(norm|head)\.|'
                    r'scratch\.refinenet4\.resConfUnit1\.')
# In this order; a pattern must match from the start of a name.
RENAMES: List[Tuple[str, str]] = [
    (pattern, replacement) for pattern, replacement in (
        (r'pretrained\.model\.patch_embed\.proj\.',
         'backbone.patch_embed.projection.'),
        (r'pretrained\.model\.blocks\.(\d+)\.norm([12])\.',
         r'backbone.layers.\1.ln\2.'),
        (r'pretrained\.model\.blocks\.(\d+)\.attn\.qkv\.',
         r'backbone.layers.\1.attn.attn.in_proj_'),
        (r'pretrained\.model\.blocks\.(\d+)\.attn\.proj\.',
         r'backbone.layers.\1.attn.attn.out_proj.'),
        (r'pretrained\.model\.blocks\.(\d+)\.mlp\.fc1\.',
         r'backbone.layers.\1.ffn.layers.0.0.'),
        (r'pretrained\.model\.blocks\.(\d+)\.mlp\.fc2\.',
         r'backbone.layers.\1.ffn.layers.1.'),
        (r'pretrained\.model\.(cls_token|pos_embed)$', r'backbone.\1'),
        # torchvision's ResNet, whose first stage they join with the stem.
        (r'pretrained\.layer1\.0\.', 'backbone.conv1.'),
        (r'pretrained\.layer1\.1\.', 'backbone.bn1.'),
        (r'pretrained\.layer1\.4\.', 'backbone.layer1.'),
        (r'pretrained\.layer([234])\.', r'backbone.layer\1.'),
        (r'scratch\.head1\.', 'decode_head.conv_seg.projection.conv.'),
    )
]


class _Callback:
    """Stands in for a class of Lightning that is only named."""


def read_lightning(path: Path) -> Dict[str, Tensor]:
    """Read the weights of a Lightning checkpoint of lang-seg.

    Args:
        path (Path): The file.

    Returns:
        dict[str, Tensor]: Weights of its ``net``, by their names in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds more than tensors and plain values, or no
            weights of lang-seg.
    """
    allow = getattr(torch.serialization, 'safe_globals', None)
    if allow is None:  # before torch 2.5
        state = read_checkpoint(path)['state_dict']
    else:
        with allow([(_Callback, name) for name in CALLBACKS]):
            state = read_checkpoint(path)['state_dict']
    others = [name for name in state if not name.startswith(NET)]
    if others:
        raise ValueError(
            f'{path} is no checkpoint of lang-seg, whose weights are all '
            f'named {NET}*: it has {others[:5]}.')
    return {name[len(NET):]: value for name, value in state.items()}


def rename(name: str) -> Optional[str]:
    """Give one of their weights its name in MMSegmentation.

    Args:
        name (str): Name in their network.

    Returns:
        str, optional: The name; None if it is none of their network.
    """
    for pattern, replacement in RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    head = 'decode_head.'
    part = re.fullmatch(r'scratch\.layer([1-4])_rn\.(.+)', name)
    if part:
        return f'{head}convs.{int(part[1]) - 1}.conv.{part[2]}'
    part = re.fullmatch(r'scratch\.refinenet([1-4])\.(.+)', name)
    if part:
        # Ours are in the order of the forward pass.
        inner = re.sub(r'^out_conv\.', 'project.conv.', part[2])
        inner = re.sub(r'^resConfUnit([12])\.conv([12])\.',
                       r'res_conv_unit\1.conv\2.conv.', inner)
        inner = re.sub(r'^resConfUnit([12])\.bn([12])\.',
                       r'res_conv_unit\1.conv\2.bn.', inner)
        return f'{head}fusion_blocks.{4 - int(part[1])}.{inner}'
    part = re.fullmatch(r'pretrained\.act_postprocess([1-4])\.(.+)', name)
    if part:
        number, blocks = int(part[1]) - 1, f'{head}reassemble_blocks.'
        for theirs, ours in (('0.project.0.', f'readout_projects.{number}.0.'),
                             ('3.', f'projects.{number}.conv.'),
                             ('4.', f'resize_layers.{number}.')):
            if part[2].startswith(theirs):
                return blocks + ours + part[2][len(theirs):]
    return None


def convert_weights(theirs: Dict[str, Tensor],
                    model: nn.Module) -> Tuple[Dict[str, Tensor], List[str]]:
    """Give all of their weights but CLIP's our names.

    Args:
        theirs (dict[str, Tensor]): Weights by their names.
        model (nn.Module): Our network.

    Returns:
        tuple[dict[str, Tensor], list[str]]: Weights by our names, those of
        the text left out, and the names that are not used.

    Raises:
        ValueError: If there are names that are not known, or spatial
            regularization on one side only.
    """
    head = model.decode_head
    ours: Dict[str, Tensor] = {}
    dropped, unknown = [], []
    block = 'scratch.head_block.depthwise.depthwise.'
    blocks = head.text_branch.regularization
    depth = 0 if blocks is None else blocks.depth
    if (f'{block}weight' in theirs) != bool(depth):
        raise ValueError(
            'the checkpoint has a spatial regularization block '
            f'({block}weight), but the config none; its kind, depth and '
            'activation are in no checkpoint: give them as `model.decode_head.'
            'text_branch.regularization`.' if not depth else
            'the config has spatial regularization, but the checkpoint has '
            f'no {block}weight.')
    for name, value in theirs.items():
        if name.startswith(CLIP):
            continue
        if UNUSED.match(name):
            dropped.append(name)
        elif name.startswith(block):
            # All of their blocks share one kernel.
            kind = name[len(block):]
            shape = (depth, 3, 3) if kind == 'weight' else (depth, )
            ours[f'decode_head.conv_seg.regularization.{kind}'] = (
                value.reshape(shape[1:]).expand(shape).clone())
        else:
            own = rename(name)
            if own is None:
                unknown.append(name)
            else:
                ours[own] = value
    if unknown:
        raise ValueError(
            f'{len(unknown)} weight(s) are of no network of lang-seg that is '
            f'known: {unknown[:10]}')
    return ours, dropped


def encode_words(theirs: Dict[str, Tensor], text: dict,
                 folder: str) -> Tuple[Tensor, List[str], bytes]:
    """Encode the words of a config with the CLIP of a checkpoint.

    Args:
        theirs (dict[str, Tensor]): Weights by their names.
        text (dict): Config of the text.
        folder (str): Folder for a moment.

    Returns:
        tuple: Vectors (K, D), names of the classes, and the CLIP as a
        safetensors file.

    Raises:
        ValueError: If it is another CLIP, or ``text`` has no ``build``.
    """
    build = text.get('build')
    if not build:
        raise ValueError('the text of the config has no `build`, which says '
                         'what words to encode.')
    clip = {
        name[len(CLIP):]: value.contiguous()
        for name, value in theirs.items() if name.startswith(CLIP)
    }
    open_clip = import_open_clip()
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # nothing is copied: it is compared
        expected = open_clip.create_model(ARCHITECTURE, device='meta')
        try:
            load_strictly(expected, clip, Path(f'{CLIP}*'))
        except ValueError as error:
            raise ValueError('the checkpoint has another CLIP than '
                             f'{ARCHITECTURE}. {error}') from error
    data = to_safetensors(clip)
    path = Path(folder) / 'clip.safetensors'
    path.write_bytes(data)
    tower = TextTower(ARCHITECTURE, str(path))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # their words of two classes are alike
        record = encode_classes(build['vocabulary'], tower,
                                build.get('templates') or 'vild')
    if text.get('classes'):
        # A config that MMEngine has dumped has its dicts sorted.
        record.check_names(
            Vocabulary.from_spec(text['classes']).names,
            'the classes of the config')
    return record.vectors, list(record.names), data


def convert(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    cfg = read_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    theirs = read_lightning(args.checkpoint)
    cfg.model.backbone.pop('init_cfg', None)
    cfg.model.decode_head.norm_cfg.type = 'BN'
    model = MODELS.build(cfg.model)
    if not isinstance(model.decode_head, LSegDPTHead):
        raise ValueError(f'{args.config} has no LSegDPTHead; give one of the '
                         'configs of LSeg as published.')
    ours, dropped = convert_weights(theirs, model)
    text = 'decode_head.conv_seg.text.class_embeddings'
    scale = 'decode_head.conv_seg.scale.log_scale'
    # Not theirs: the first, NaN until then, is made below; the second they
    # do not learn.
    own = {key: model.state_dict()[key].nan_to_num() for key in (text, scale)}
    load_strictly(model, dict(ours, **own), args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        vectors, names, clip = encode_words(theirs, cfg.model.decode_head.text,
                                            folder)
    model.decode_head.text_branch.text.fill(vectors)
    meta = dict(
        dataset_meta=dict(classes=tuple(names)),
        lseg_checkpoint=args.checkpoint.name)
    checkpoint = dict(state_dict=model.state_dict(), meta=meta)
    files = {args.out: checkpoint_bytes(checkpoint)}
    if args.clip:
        files[args.clip] = clip
    write_files(files)
    of_clip = sum(name.startswith(CLIP) for name in theirs)
    print(f'{len(theirs)} weights: {len(ours)} used, {of_clip} of CLIP '
          f'(encoded {len(names)} classes), {len(dropped)} that their network '
          f'does not use:\n  {", ".join(dropped)}\nwrote '
          f'{", ".join(map(str, files))}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    try:
        convert(args)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
