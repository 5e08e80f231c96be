# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Fold a trained text network into a checkpoint of the stock network.

Writes OUT and, beside it, its config: a stock config, dumped whole, into which
OUT loads strictly and with no plugin installed. Before anything is written
the folded network is compared with the trained one.

A checkpoint with no text, folded already or stock, is checked and written as
it is.

With --classes OUT predicts other words: a stock network with that many
classes. Where they are the classes of a data set of the config, its config
trains and tests on that data set, else it is for inference, or for a test on
data that are filled in.
"""
import argparse
import os.path as osp
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

# Of mmseg_textkd.models.new_words.
NEW_WORDS = ('unit', 'projected', 'ridge', 'raw')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the text network')
    parser.add_argument('checkpoint', type=Path, help='its checkpoint')
    parser.add_argument(
        '--out', type=Path, help='checkpoint to write, *.pth; beside it *.py')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--strip-auxiliary',
        action='store_true',
        help='leave out auxiliary heads, which only training needs')
    parser.add_argument(
        '--l2',
        choices=('keep', 'approximate'),
        help="for norm='l2', which does not fold: keep the norm (OUT needs "
        'the plugin), or fold with a mean length for all pixels (OUT '
        'predicts something else, and it is said how often)')
    parser.add_argument(
        '--num-images',
        type=int,
        default=10,
        help='images of test_dataloader to compare on, if they are there, '
        'and with `--l2 approximate` as many before (default: 10)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    words = parser.add_argument_group('other words')
    words.add_argument(
        '--classes',
        help='names with commas between them, or a vocabulary: a .txt or '
        '.json file, or a key such as camvid; auxiliary heads are left out')
    words.add_argument(
        '--embeddings',
        type=Path,
        help='embeddings file with the vectors of new words (default: the '
        'text tower of the training encodes them)')
    words.add_argument('--model', help='text model, if the config has none')
    words.add_argument('--tower', dest='old_tower', help=argparse.SUPPRESS)
    words.add_argument('--pretrained', help='tag or file of its weights')
    words.add_argument(
        '--new-words',
        choices=NEW_WORDS,
        help='how their vectors are used (default: that of the classifier: '
        'unit, or raw for cosines)')
    args = parser.parse_intermixed_args(argv)
    args.model = args.model or args.old_tower
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    if args.classes is None and (args.embeddings or args.model):
        parser.error('--embeddings and --model are for --classes')
    if args.num_images < 1:
        parser.error('--num-images must be at least 1')
    if args.out.suffix != '.pth':
        parser.error(f'--out must end in .pth, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    for path in (args.out, args.out.with_suffix('.py')):
        if path.exists():
            parser.error(f'{path} exists; remove it or write elsewhere')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import mmengine
import mmseg
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from torch import nn

import mmseg_textkd
from mmseg_textkd.apis.class_encoder import ClassEncoder
from mmseg_textkd.apis.drawing import palette_for
from mmseg_textkd.deploy import (fold_state_dict, mean_lengths, to_stock_cfg,
                                 verify)
from mmseg_textkd.deploy.load_stock import dataset_meta
from mmseg_textkd.deploy.words import (set_words, text_head, to_words_cfg,
                                       united_cfg)
from mmseg_textkd.models.layers.text_classifier import as_folded
from mmseg_textkd.utils.arguments import explain, read_config, warn_renamed
from mmseg_textkd.utils.checkpoint import (build_network, checkpoint_bytes,
                                           load_strictly, read_checkpoint)
from mmseg_textkd.utils.io import write_files

# What MMEngine's runner and this tool note of a training.
TRAINING = ('epoch', 'iter', 'seed', 'experiment_name', 'time', 'trained_with',
            'training_cfg')


def training_meta(saved: Dict) -> Dict:
    """Get what a checkpoint tells of the run that it comes from."""
    meta = {k: saved[k] for k in TRAINING if k in saved}
    if 'folded_from' not in saved:
        # The stock config and this process's versions take their places.
        meta['trained_with'] = {
            k[:-len('_version')]: str(v)
            for k, v in saved.items() if k.endswith('_version')
        }
        if 'cfg' in saved:
            meta['training_cfg'] = saved['cfg']
    return meta


def test_images(cfg: Config, number: int) -> List[Dict]:
    """Read images of the test set, one a batch, spread over all of it."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    try:
        if dataset is None:
            raise ValueError('the config has no test_dataloader')
        dataset = DATASETS.build(dataset)
        step = max(len(dataset) // number, 1)
        batches = [
            pseudo_collate([dataset[i]]) for i in range(0, len(dataset), step)
        ][:number]
        if not batches:
            raise ValueError('the test set is empty')
        return batches
    except (AssertionError, OSError, ValueError) as error:
        print(f'Only random inputs are compared, no images: {error}')
        return []


def choose_words(args: argparse.Namespace, cfg: Config, model: nn.Module,
                 meta: Dict) -> Config:
    """Make the words of the command line the classes of the network.

    Returns:
        Config: The config of the network with these classes.
    """
    own = dataset_meta(cfg, meta.get('dataset_meta'))
    names, palette = own['classes'], own.get('palette')
    if args.classes is None:
        return united_cfg(cfg, meta.get('dataset_meta'))
    encoder = ClassEncoder(
        text_head(model).text_branch.text, cfg.model.decode_head.text, names)
    classes = args.classes
    if osp.isfile(classes):  # of a long list a Path would raise
        classes = Path(classes)
    elif ',' in classes:
        classes = [name.strip() for name in classes.split(',')]
    found = encoder.encode(
        classes,
        tower=args.model,
        pretrained=args.pretrained,
        embeddings=args.embeddings)
    set_words(model, cfg, found.vectors, found.trained, args.new_words)
    print(f'{len(found.names)} classes: {found.source}')
    colors = [
        None if row is None or not palette else palette[row]
        for row in found.trained
    ]
    meta['dataset_meta'] = dict(
        classes=found.names, palette=palette_for(colors))
    return to_words_cfg(cfg, found.names, meta['dataset_meta']['palette'])


def convert(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    cfg = read_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    # TF32 would be measured in place of the fold.
    torch.backends.cudnn.allow_tf32 = False
    checkpoint = read_checkpoint(args.checkpoint)
    state, meta = checkpoint['state_dict'], checkpoint['meta']

    folded = not any(key.endswith('.class_embeddings') for key in state)
    strip = args.strip_auxiliary
    if folded:
        print(f'{args.checkpoint} has no text: it is folded already, or stock')
        strip = strip or not any(k.startswith('auxiliary_head') for k in state)
        left_out = ['distill_losses.'] + ['auxiliary_head.'] * strip
        state = {
            k: v
            for k, v in state.items() if not k.startswith(tuple(left_out))
        }
        if args.classes is not None:
            raise ValueError('a checkpoint without text has its own classes '
                             'alone; take that of the training.')
        stock_cfg = to_stock_cfg(
            united_cfg(cfg, meta.get('dataset_meta')), strip,
            args.l2 == 'keep')
        text = stock_cfg.pretty_text
        # What is verified is what will be in the file.
        stock_cfg = Config.fromstring(text, '.py')
    model = build_network((stock_cfg if folded else cfg).model)
    load_strictly(model, state, args.checkpoint)
    model.to(args.device or get_device()).eval()
    images_cfg = cfg
    if not folded:
        strip = strip or args.classes is not None
        words_cfg = choose_words(args, cfg, model, meta)
        stock_cfg = to_stock_cfg(words_cfg, strip, args.l2 == 'keep')
        text = stock_cfg.pretty_text
        stock_cfg = Config.fromstring(text, '.py')
        if words_cfg is cfg:
            images_cfg = stock_cfg

    lengths = None
    if args.l2 == 'approximate':
        images = test_images(images_cfg, 2 * args.num_images)
        if len(images) < 2:
            raise ValueError('`--l2 approximate` needs images of the test '
                             'set: to measure lengths on, and the result.')
        lengths, images = mean_lengths(model, images[::2]), images[1::2]
    else:
        images = test_images(images_cfg, args.num_images)
    state = fold_state_dict(model, strip, args.l2 == 'keep', lengths)
    report = verify(
        model, stock_cfg, state, images, tolerance=None if lengths else 1e-4)

    meta = dict(
        training_meta(meta),
        dataset_meta=dataset_meta(stock_cfg, meta.get('dataset_meta')),
        cfg=text,
        folded_from=args.checkpoint.name,
        verified=str(report),
        mmseg_textkd_version=mmseg_textkd.__version__,
        mmengine_version=mmengine.__version__,
        mmseg_version=mmseg.__version__,
        torch_version=str(torch.__version__))
    data = checkpoint_bytes(dict(state_dict=state, meta=meta))
    out = args.out.with_suffix('.py')
    write_files({out: text.encode(), args.out: data})
    print(report)
    if lengths:
        print('THE FOLD IS APPROXIMATE, with mean lengths '
              f'{lengths}: judge it by the figures above.')
    with as_folded(model) as left_out:
        if 'balance' in left_out:
            print('The balance for the classes without labels is left out: '
                  'it needs the plugin (TextSegInferencer).')
        if 'half_precision' in left_out:
            print('The rounding to half precision is left out.')
    print(f'wrote {args.out} and {out}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out', tower='--model')
    try:
        convert(args)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
