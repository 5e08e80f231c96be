# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Convert a checkpoint of TextKD's authors.

CHECKPOINT is one of github.com/ChiaYi-LIN/mmsegmentation (a fork of
MMSegmentation 0.x), CONFIG the config of the same network here, of
configs/textkd: score map or score map before the decoder, stage 1 or stage 2.
Every key is accounted for, and OUT loads strictly into the network of CONFIG.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the network, here')
    parser.add_argument('checkpoint', type=Path, help="the authors'")
    parser.add_argument('--out', type=Path, help='checkpoint to write, *.pth')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
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
    if args.out.suffix != '.pth':
        parser.error(f'--out must end in .pth, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    if args.out.exists():
        parser.error(f'{args.out} exists; remove it or write elsewhere')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmseg_textkd
from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.weights import import_open_clip
from mmseg_textkd.models import TextKD
from mmseg_textkd.models.text_providers import ContextPromptLearner
from mmseg_textkd.text import Vocabulary
from mmseg_textkd.utils.arguments import explain, read_config, warn_renamed
from mmseg_textkd.utils.checkpoint import (build_network, checkpoint_bytes,
                                           load_strictly, read_checkpoint)
from mmseg_textkd.utils.io import write_files

TEXT = 'score_map.text.'
ENCODER = 'backbone.text_encoder.'
# Theirs was trained with QuickGELU; open_clip's plain name means GELU.
ARCHITECTURE = 'RN50-quickgelu'
# The order of their classes where it is not that of the data set here.
CAMVID = ('Bicyclist', 'Building', 'Car', 'Column_Pole', 'Fence', 'Pedestrian',
          'Road', 'Sidewalk', 'SignSymbol', 'Sky', 'Tree')


def words_of(cfg: Config) -> List[str]:
    """Get the words of the classes, in the order of the data set.

    Args:
        cfg (Config): Config of the network.

    Returns:
        list[str]: One for each class.
    """
    text = cfg.model.score_map.text
    text = text.get('embeddings', text)
    names = Vocabulary.from_spec(text.classes).names
    words = Vocabulary.from_spec(text.build.vocabulary)
    known = dict(zip(words.names, words.phrases))
    return [known[name][0] for name in names]


def reorder(state: Dict[str, Tensor],
            order: Sequence[int]) -> Dict[str, Tensor]:
    """Bring the classes into another order.

    Args:
        state (dict[str, Tensor]): The authors' weights by name.
        order (Sequence[int]): Number, with them, of each class here.

    Returns:
        dict[str, Tensor]: Weights by the same names. The score map, the last
        of the input of three convolutions, is reordered when it is split.
    """
    rows = ('.conv_seg.weight', '.conv_seg.bias', 'backbone.text_embeddings',
            'backbone.label_texts')

    def has_classes(name: str, value: Tensor) -> bool:
        # Not the boundary head, of two classes, nor contexts of all classes.
        if value.shape[:1] != (len(order), ):
            return False
        return name.endswith(rows) or (name == 'backbone.contexts'
                                       and value.dim() == 3)

    return {
        k: v[list(order)] if has_classes(k, v) else v
        for k, v in state.items()
    }


def convert(state: Dict[str, Tensor], model: TextKD,
            words: Sequence[str]) -> Dict[str, Tensor]:
    """Rename the weights, and split those that read the score map.

    Args:
        state (dict[str, Tensor]): The authors' weights by name.
        model (TextKD): The network here.
        words (Sequence[str]): The word of each class, in the order of the
            data set here.

    Returns:
        dict[str, Tensor]: Weights by their name here.

    Raises:
        ValueError: If a key that is needed is missing, or one that reads the
            score map has another width.
    """
    order = list(range(len(words)))
    if set(words) == set(CAMVID):
        order = [CAMVID.index(word) for word in words]
    state = reorder(state, order)
    new: Dict[str, Tensor] = {}
    for key, conv in model.score_map.convs.items():
        name = f'{key.replace("/", ".")}.weight'
        if name not in state:
            raise ValueError(f'the checkpoint has no {name}.')
        number, wide = conv.in_channels, state.pop(name)
        own = model.get_submodule(name[:-len('.weight')]).in_channels
        if wide.shape[1] != own + number:
            raise ValueError(
                f'{name} reads {wide.shape[1]} channels, not {own} and a '
                f'score map of {number} classes: the config is of another '
                'variant (score map before the decoder or not), or for other '
                'classes.')
        new[name] = wide[:, :own]
        new[f'score_map.convs.{key}.weight'] = wide[:, own:][:, order]
    text = {k: v for k, v in state.items() if k.startswith(ENCODER)}
    text.update({
        k: state[k]
        for k in ('backbone.text_embeddings', 'backbone.contexts',
                  'backbone.label_texts') if k in state
    })
    new.update({k: v for k, v in state.items() if k not in text})
    new.update(_convert_text(text, model.score_map.text, words))
    return new


def _convert_text(text: Dict[str, Tensor], provider: nn.Module,
                  words: Sequence[str]) -> Dict[str, Tensor]:
    """The weights of the text provider."""
    contexts = text.get('backbone.contexts')
    if isinstance(provider, ContextPromptLearner) != (contexts is not None):
        stage = 1 if contexts is None else 2
        raise ValueError(
            f'the checkpoint is one of stage {stage}; take the config of '
            'that stage (`-stage2` in its name, or not).')
    if contexts is None:
        if 'backbone.text_embeddings' not in text:
            raise ValueError('the checkpoint has no backbone.text_embeddings.')
        vectors = F.normalize(text['backbone.text_embeddings'].float(), dim=1)
        return {f'{TEXT}class_embeddings': vectors}
    if contexts.shape != provider.context.shape:
        raise ValueError(
            f'the contexts have shape {tuple(contexts.shape)}, but those of '
            f'the config {tuple(provider.context.shape)}: set '
            '`context_length` and `class_specific`.')
    with torch.no_grad():
        provider.context.copy_(contexts)
    tower = _load_tower(text)
    length = text['backbone.label_texts'].shape[1]
    ids = tower.tokenize(words)[:, :length]
    if not torch.equal(ids, text['backbone.label_texts'].long()):
        raise ValueError(
            f"the checkpoint's class names are not {words}: the config is for "
            'other classes, another order or other words.')
    return {
        f'{TEXT}class_embeddings': provider.encode_phrases(tower, words),
        f'{TEXT}context': contexts,
        f'{TEXT}started': torch.ones((), dtype=torch.bool)
    }


def _load_tower(text: Dict[str, Tensor]) -> TextTower:
    """Make a frozen tower of the text encoder that the checkpoint holds."""
    open_clip = import_open_clip()
    clip = open_clip.create_model(ARCHITECTURE)
    state = clip.state_dict()
    for key, value in text.items():
        if not key.startswith(ENCODER):
            continue
        name = key[len(ENCODER):]
        if name not in state:
            raise ValueError(f'{key} is no weight of a text encoder of CLIP.')
        if name == 'positional_embedding':
            # Cut to the length of their prompts; the rest is not used.
            state[name][:len(value)] = value
        else:
            state[name] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'clip.pth')
        torch.save(state, path)
        return TextTower(ARCHITECTURE, str(path))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    try:
        cfg = read_config(args.config, args.cfg_options)
        init_default_scope(cfg.get('default_scope') or 'mmseg')
        theirs = read_checkpoint(args.checkpoint)['state_dict']
        model = build_network(cfg.model)
        if not isinstance(model, TextKD):
            raise ValueError(f'{args.config} is not the config of a TextKD.')
        state = convert(theirs, model, words_of(cfg))
        load_strictly(model, state, args.checkpoint)
        meta = dict(
            converted_from=args.checkpoint.name,
            mmseg_textkd_version=mmseg_textkd.__version__)
        write_files({
            args.out:
            checkpoint_bytes(dict(state_dict=model.state_dict(), meta=meta))
        })
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f'Error: {explain(error)}')
    split, dropped = _account(theirs, state)
    print(f'wrote {args.out}: {len(theirs)} keys of theirs, of which '
          f'{len(split)} were split ({", ".join(split)}) and {len(dropped)} '
          'are not needed any more (the frozen text encoder and the tokens '
          'of the names)')


def _account(theirs: Dict[str, Tensor],
             ours: Dict[str, Tensor]) -> Tuple[List[str], List[str]]:
    """Keys that were split, and keys that are not in the result."""
    split = [
        k for k, v in theirs.items() if k in ours and v.shape != ours[k].shape
    ]
    dropped = [
        k for k in theirs
        if k.startswith(ENCODER) or k == 'backbone.label_texts'
    ]
    return split, dropped


if __name__ == '__main__':
    main()
