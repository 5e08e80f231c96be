# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Bring a checkpoint of the EBSeg authors into the form of this package.

OUT holds what they trained and the text of the classes of COCO-Stuff, encoded
from the bare class names by the checkpoint's own text tower. Their frozen CLIP
and SAM are those of open_clip and timm, and left out; with --towers they are
written beside OUT, as OUT's name with _clip.safetensors and _sam.safetensors,
for machines without a network. Every key of the checkpoint must be known and
every key that is needed must be there; nothing is written else.
"""
import argparse
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

VARIANTS = ('vit-b16', 'vit-l14-336')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help="the authors' file")
    parser.add_argument('--out', type=Path, help='checkpoint to write, *.pth')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--model', choices=VARIANTS, required=True, help='which CLIP it has')
    parser.add_argument(
        '--embeddings',
        help='embeddings file of the 171 classes to take in place of what its '
        'text tower makes of their names, which takes minutes')
    parser.add_argument('--text', dest='old_text', help=argparse.SUPPRESS)
    parser.add_argument(
        '--towers', action='store_true', help='write CLIP and SAM too')
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    if args.out.suffix != '.pth':
        parser.error(f'--out must end in .pth, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    for path in out_paths(args.out).values():
        if path.exists():
            parser.error(f'{path} exists; remove it or write elsewhere')
    return args


def out_paths(out: Path) -> Dict[str, Path]:
    """What may be written."""
    return dict(
        model=out,
        **{
            part: out.with_name(f'{out.stem}_{part}.safetensors')
            for part in ('clip', 'sam')
        })


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from safetensors.torch import save, save_file
from torch import Tensor

import mmseg_textkd
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.utils.arguments import warn_renamed
from mmseg_textkd.utils.checkpoint import checkpoint_bytes, load_file
from mmseg_textkd.utils.io import write_files

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/ebseg'
TEXT = 'decode_head.text.trained.class_embeddings'
State = Dict[str, Tensor]
LAYER = r'sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.'
PIXELS, MASKS = (rf'sem_seg_head\.{p}\.'
                 for p in ('pixel_decoder', 'predictor'))
# Their keys, and what becomes of them: (part, key), or several of these.
RULES: List[Tuple[str, List[Tuple[str, str]]]] = [
    # Weights of classes in the loss; a mask that open_clip makes itself.
    (r'criterion\.empty_weight|ov_classifier\.attn_mask', []),
    (r'clip_visual_extractor\.positional_embedding',
     [('model', 'image_encoder.positional_embedding'),
      ('clip', 'visual.positional_embedding')]),
    (r'clip_(?:visual_extractor|rec_head)\.resblocks\.(.*)',
     [('clip', r'visual.transformer.resblocks.\1')]),
    (r'clip_(?:visual_extractor|rec_head)\.(.*)', [('clip', r'visual.\1')]),
    (r'ov_classifier\.bg_embed', [('model', 'decode_head.no_object')]),
    (r'ov_classifier\.(.*)', [('clip', r'\1')]),
    (r'backbone\.pos_embed', [('model', 'backbone.positional_embedding'),
                              ('sam', 'pos_embed')]),
    (r'backbone\.(.*)', [('sam', r'\1')]),
    (r'sem_seg_head\.clip_fusion_layers\.(\d)\.0\.(.*)',
     [('model', r'neck.clip_norm.\1.\2')]),
    (r'sem_seg_head\.clip_fusion_layers\.(\d)\.1\.(.*)',
     [('model', r'neck.clip_conv.\1.\2')]),
    (PIXELS + r'transformer\.level_embed', [('model', 'neck.level_embed')]),
    # From the coarsest map to the finest of three.
    *((PIXELS + rf'input_proj\.{i}\.{j}\.(.*)', [
        ('model', rf'neck.lateral.{3 - i}.{name}.\1')
    ]) for i in range(3) for j, name in enumerate(('conv', 'gn'))),
    (PIXELS + r'adapter_1\.norm\.(.*)', [('model', r'neck.lateral.0.gn.\1')]),
    (PIXELS + r'adapter_1\.(.*)', [('model', r'neck.lateral.0.conv.\1')]),
    (PIXELS + r'layer_1\.norm\.(.*)', [('model', r'neck.smooth.gn.\1')]),
    (PIXELS + r'layer_1\.(.*)', [('model', r'neck.smooth.conv.\1')]),
    (PIXELS + r'mask_features\.(.*)', [('model', r'neck.pixel_conv.\1')]),
    *((LAYER + rf'{theirs}\.(.*)', [('model', rf'neck.{ours}.\2')])
      for theirs, ours in {
          r'self_attn\.value_proj': r'attention.\1.value',
          r'self_attn\.sampling_offsets': r'attention.\1.offsets',
          r'self_attn\.attention_weights': r'attention.\1.weights',
          r'self_attn\.output_proj': r'attention.\1.out',
          'norm1': r'attention.\1.norm',
          'linear1': r'feedforward.\1.layers.0',
          'linear2': r'feedforward.\1.layers.2',
          'norm2': r'feedforward.\1.norm',
      }.items()),
    *((MASKS + rf'{theirs}\.(.*)', [('model', rf'decode_head.decoder.{ours}')])
      for theirs, ours in {
          'query_feat': r'query.\1',
          'query_embed': r'query_position.\1',
          'level_embed': r'level_embed.\1',
          'decoder_norm': r'norm.\1',
          r'transformer_self_attention_layers\.(\d)\.self_attn':
          r'self_attention.\1.attention.\2',
          r'transformer_self_attention_layers\.(\d)\.norm':
          r'self_attention.\1.norm.\2',
          r'transformer_cross_attention_layers\.(\d)\.multihead_attn':
          r'cross_attention.\1.attention.\2',
          r'transformer_cross_attention_layers\.(\d)\.norm':
          r'cross_attention.\1.norm.\2',
          r'transformer_ffn_layers\.(\d)\.linear1':
          r'feedforward.\1.layers.0.\2',
          r'transformer_ffn_layers\.(\d)\.linear2':
          r'feedforward.\1.layers.2.\2',
          r'transformer_ffn_layers\.(\d)\.norm': r'feedforward.\1.norm.\2',
      }.items()),
    # Perceptrons, which have a ReLU after each layer but the last.
    *((MASKS + rf'{theirs}\.layers\.{i}\.(.*)', [
        ('model', rf'decode_head.{ours}.{2 * i}.\1')
    ]) for theirs, ours in {
        'mask_embed': 'decoder.mask_embed',
        'mask_embed1': 'embedder.embed',
        'attn_proj': 'embedder.bias',
    }.items() for i in range(3)),
    (MASKS + r'pool_proj\.(.*)', [('model', r'decode_head.embedder.pool.\1')]),
    (MASKS + r'logit_scale', [('model', 'decode_head.embedder.length')]),
    (MASKS + r'bias_scaling\.(.*)', [('model',
                                      r'decode_head.embedder.bias_scale.\1')]),
]


def read(path: Path) -> State:
    """Read a checkpoint of Detectron2, of which ``model`` counts."""
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    saved = load_file(path)
    state = saved.get('model', saved) if isinstance(saved, dict) else saved
    if not isinstance(state, dict):
        raise ValueError(f'{path} holds no weights but {type(state)}.')
    others = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if others:
        raise ValueError(f'{path} holds what is no tensor: {_some(others)}')
    return state


def split(state: State, first_block: int) -> Tuple[Dict[str, State], List]:
    """Give their keys our names.

    Args:
        state (dict[str, Tensor]): Their weights.
        first_block (int): Number of CLIP's blocks before embedding B begins;
            theirs are counted anew from there.

    Returns:
        tuple[dict[str, dict], list[str]]: Weights of ``model``, ``clip`` and
        ``sam``, and the keys that are of no use.

    Raises:
        ValueError: If a key is unknown, or a weight that is there twice is
            not the same.
    """
    parts: Dict[str, State] = defaultdict(dict)
    dropped, unknown = [], []
    for key, value in state.items():
        for pattern, targets in RULES:
            match = re.fullmatch(pattern, key)
            if match:
                break
        else:
            unknown.append(key)
            continue
        if not targets:
            dropped.append(key)
        for part, template in targets:
            name = match.expand(template)
            if part == 'clip':
                name = re.sub(r'attn\.qkv\.', 'attn.in_proj_', name)
                name = re.sub(r'attn\.proj\.', 'attn.out_proj.', name)
            if part == 'sam':
                name = name.replace('mlp.lin', 'mlp.fc')
            if key.startswith('clip_rec_head.'):
                name = re.sub(r'(resblocks)\.(\d+)',
                              lambda m: f'{m[1]}.{int(m[2]) + first_block}',
                              name)
            twin = parts[part].get(name)
            if twin is not None and not torch.equal(twin, value):
                raise ValueError(f'{key} is there under another name with '
                                 'other values.')
            parts[part][name] = value
    nothing = parts['model'].get('decode_head.no_object')
    if nothing is not None:
        parts['model']['decode_head.no_object'] = nothing.flatten()
    if unknown:
        raise ValueError('keys that EBSeg does not have: ' + _some(unknown))
    return parts, dropped


def compare(part: str, found: State, wanted: State) -> None:
    """Require keys and shapes to be those of the network they are for."""
    missing = wanted.keys() - found.keys()
    surplus = found.keys() - wanted.keys()
    wrong = [
        f'{k} {tuple(found[k].shape)} instead of {tuple(v.shape)}'
        for k, v in wanted.items() if k in found and found[k].shape != v.shape
    ]
    problems = [
        f'{what}: {_some(sorted(keys))}'
        for what, keys in (('missing', missing), ('surplus', surplus),
                           ('of another shape', wrong)) if keys
    ]
    if problems:
        raise ValueError(f'The {part} of the checkpoint does not fit, by the '
                         'names of this package: ' + '; '.join(problems))


def expected(cfg: Config) -> Dict[str, State]:
    """Keys and shapes of our model and of the towers, without weights."""
    import open_clip
    import timm
    model = MODELS.build(cfg.model).state_dict()
    model.pop(TEXT)
    with torch.device('meta'):
        clip = open_clip.create_model(
            cfg.model.image_encoder.model, device='meta')
        sam = timm.create_model('samvit_base_patch16', num_classes=0)
    return dict(
        model=model,
        clip=clip.state_dict(),
        sam={
            k: v
            for k, v in sam.state_dict().items() if not k.startswith('neck.')
        })


def check_variant(path: Path, state: State, wanted: State, model: str) -> None:
    """Tell at once if a checkpoint is of the other variant, or of none."""
    key = 'clip_visual_extractor.proj'
    shape = tuple(wanted['visual.proj'].shape)
    if key not in state:
        raise ValueError(f'{path} has no {key}: it is no EBSeg. Its keys: '
                         f'{_some(list(state))}')
    if tuple(state[key].shape) != shape:
        raise ValueError(
            f'{path} is of another CLIP than {model}: {key} has shape '
            f'{tuple(state[key].shape)} instead of {shape}.')


def encode(clip: State, architecture: str, names: Sequence[str]) -> Tensor:
    """Encode class names by the text tower of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / 'clip.safetensors')
        save_file({k: v.contiguous() for k, v in clip.items()}, file)
        tower = dict(model=architecture, pretrained=file)
        return encode_classes(
            list(names), tower, 'vild', progress=True).vectors


def convert(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    init_default_scope('mmseg')
    file = f'ebseg_{args.model}_4xb4-120k_coco-stuff164k-640x640.py'
    cfg = Config.fromfile(CONFIGS / file)
    meta = DATASETS.get(cfg.train_dataloader.dataset.type).METAINFO
    architecture = f'{cfg.model.image_encoder.model}-quickgelu'
    state = read(args.checkpoint)
    wanted = expected(cfg)
    check_variant(args.checkpoint, state, wanted['clip'], args.model)
    parts, dropped = split(state, cfg.model.decode_head.attention_from)
    for part, keys in wanted.items():
        compare(part, parts[part], keys)
    if args.embeddings:
        text = TextEmbeddings.load(args.embeddings)
        text.check_names(meta['classes'], where='COCO-Stuff')
        text = text.vectors
    else:
        print("encoding the classes' names")
        text = encode(parts['clip'], architecture, meta['classes'])
    parts['model'][TEXT] = text
    checkpoint = dict(
        state_dict=parts['model'],
        meta=dict(
            dataset_meta={k: meta[k]
                          for k in ('classes', 'palette')},
            converted_from=args.checkpoint.name,
            mmseg_textkd_version=mmseg_textkd.__version__))
    paths = out_paths(args.out)
    files = {args.out: checkpoint_bytes(checkpoint)}
    if args.towers:
        for part in ('clip', 'sam'):
            files[paths[part]] = save({
                k: v.contiguous()
                for k, v in parts[part].items()
            })
    write_files(files)
    print(f'{len(state)} keys: {len(wanted["model"])} used, '
          f'{len(wanted["clip"])} of CLIP, {len(wanted["sam"])} of SAM, of '
          f'no use {dropped}')
    print(f'wrote {", ".join(map(str, files))} for configs/ebseg/{file}')
    if args.towers:
        print('--cfg-options model.image_encoder.model=' + architecture,
              f'model.image_encoder.pretrained={paths["clip"]}',
              f'model.backbone.pretrained={paths["sam"]}')


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f' and {len(names) - 8} more' if len(names) > 8 else ''
    return ', '.join(map(str, names[:8])) + more


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out', text='--embeddings')
    args.embeddings = args.embeddings or args.old_text
    try:
        convert(args)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
