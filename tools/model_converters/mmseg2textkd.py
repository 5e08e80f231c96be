# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make a checkpoint to start a text network from, out of a stock one.

All that has the same name is taken over. Text classifiers are initialized by
least squares so that they predict what the stock classifier predicted, and it
is measured how near they come. Train from the result with `load_from`, with
the same config.
"""
import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional, Sequence, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the text network')
    parser.add_argument('checkpoint', help='stock checkpoint, file or URL')
    parser.add_argument('--out', type=Path, help='checkpoint to write, *.pth')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--num-images',
        type=int,
        default=100,
        help='images to take batch norm statistics of, and as many again for '
        'each measurement, rounded up to whole batches (default: 100)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
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
    if args.num_images < 1:
        parser.error('--num-images must be at least 1')
    if args.out.exists():
        parser.error(f'{args.out} exists; remove it or write to another file')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_state_dict, set_random_seed
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmseg_textkd.models import TextHeadMixin
from mmseg_textkd.models.stock_init import (compare_with_stock, head_features,
                                            init_from_stock)
from mmseg_textkd.models.text_parameters import check_classes
from mmseg_textkd.text.encode_classes import ensure_embeddings
from mmseg_textkd.utils.arguments import explain, read_config, warn_renamed
from mmseg_textkd.utils.checkpoint import (build_network, checkpoint_bytes,
                                           class_differences, class_names)
from mmseg_textkd.utils.io import write_files

SEED = 0  # the same images whenever the tool runs
Names = Optional[Tuple[str, ...]]


def read_stock(path: str) -> Tuple[Dict[str, Tensor], Names]:
    """Read the weights of a checkpoint and, if it has them, its classes."""
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
        state = checkpoint.get('state_dict', checkpoint)
        state = {key.removeprefix('module.'): v for key, v in state.items()}
        names = class_names(checkpoint.get('meta') or {})
    except AttributeError as error:
        raise ValueError(f'{path} is no checkpoint, or a damaged one: '
                         f'{error}') from error
    return state, names


def stock_classifier(path: str, state: Dict[str, Tensor], names: Names,
                     name: str, head: TextHeadMixin) -> Tuple[Tensor, Tensor]:
    """Get weight and bias of the stock classifier that a text head had."""
    key = f'{name}.conv_seg'
    weight, bias = state.get(f'{key}.weight'), state.get(f'{key}.bias')
    if f'{key}.projection.conv.weight' in state:
        raise ValueError(f'{path} has a text classifier at {key} already: '
                         'start from it with plain `load_from`.')
    if weight is None or bias is None:
        parts = sorted({k.split('.')[0] for k in state})
        raise ValueError(
            f'{path} has no {key}.weight and .bias: it is not of the stock '
            f'network that belongs to the config. Its parts: {parts[:10]}.')
    if len(weight) != head.num_classes:
        raise ValueError(
            f'{path} has {len(weight)} classes'
            f'{"" if names is None else f" {list(names)}"}, but {name} has '
            f'num_classes={head.num_classes}. Its classifier cannot be taken '
            'over; plain `load_from` takes over the backbone and the other '
            'layers and leaves the text classifier random.')
    channels = head.text_branch.projection.conv.in_channels
    if weight[0].numel() != channels:
        raise ValueError(
            f'{key} of {path} has {weight[0].numel()} input channels, but '
            f'{name} has {channels}: it is of another network or width.')
    return weight, bias


def check_names(path: str, names: Names, dataset: Dataset) -> None:
    """Require a checkpoint to be for the classes of a dataset."""
    classes = dataset.metainfo.get('classes')
    where = f'the training set ({type(dataset).__name__})'
    if names is None or classes is None:
        print(f'The classes of {path} or of {where} are not named; they are '
              'taken to be the same in the same order.')
    differences = class_differences(names, classes)
    if differences:
        raise ValueError(
            f'{path} is for other classes than {where}, or in another '
            'order:\n  ' + '\n  '.join(differences))


def endless(loader: DataLoader) -> Iterator[dict]:
    """Yield batches, each time further ones, again from the start if need be.

    MMEngine's InfiniteSampler cannot be begun twice.
    """
    found = True
    while found:
        found = False
        for batch in loader:
            found = True
            yield batch


def take(batches: Iterable[dict], number: int) -> Iterator[dict]:
    """Yield whole batches until there are so many images."""
    for batch in batches:
        yield batch
        number -= len(batch['inputs'])
        if number <= 0:
            return


def held_back(cfg: Config) -> Optional[DataLoader]:
    """Build the validation loader, if its data is there."""
    try:
        return Runner.build_dataloader(cfg['val_dataloader'], seed=SEED)
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        print('No validation images, so further training images are taken: '
              f'{error}')
        return None


def fit(model: nn.Module, name: str, stock: Tuple[Tensor, Tensor],
        train: Iterator[dict], val: Optional[DataLoader], number: int) -> None:
    """Initialize one text classifier and print how near it comes."""
    # A copy: its batch norms move. They take the statistics of each batch, as
    # the first iteration does; those that are saved may lag behind by far.
    learner = copy.deepcopy(model).train()
    head, twin = model.get_submodule(name), learner.get_submodule(name)
    residual = init_from_stock(
        head.conv_seg, *stock,
        head_features(learner, twin, take(train, number), True))
    print(
        f'{name}: {head.num_classes} classes, text of width '
        f'{head.text_branch.text.dim}; relative residual of the least squares '
        f'{residual:.2g}')
    if residual > 1e-3:
        print('  The text cannot express the stock classifier: more classes '
              'than its width, or classes with equal vectors.')
    twin.conv_seg.load_state_dict(head.conv_seg.state_dict())
    modes = {
        'evaluation mode': (model, val or train),
        'training mode, as in the first iteration': (learner, train)
    }
    for mode, (segmentor, batches) in modes.items():
        part = segmentor.get_submodule(name)
        near = compare_with_stock(
            part.conv_seg, *stock,
            head_features(segmentor, part, take(batches, number), batches
                          is train))
        print(f'  {mode}, {"train" if batches is train else "val"} images: '
              f'logits differ by at most {near.max_difference:.2g}, on '
              f'average {near.mean_difference:.2g} (largest logit '
              f'{near.max_logit:.3g}); same class at '
              f'{100 * near.agreement:.4f} % of {near.pixels} pixels of the '
              'feature map')


def convert(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    path = args.checkpoint
    cfg = read_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    state, names = read_stock(path)
    ensure_embeddings(cfg)
    set_random_seed(SEED)
    # TF32 would be measured in place of the fit.
    torch.backends.cudnn.allow_tf32 = False
    model = build_network(cfg.model)
    heads = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TextHeadMixin)
    }
    if not heads:
        raise ValueError(f'{args.config} has no text head; give the config '
                         'of the text network.')
    stock = {
        name: stock_classifier(path, state, names, name, head)
        for name, head in heads.items()
    }
    loader = cfg.train_dataloader
    if loader.get('batch_size', 1) < 2:
        # Networks with pooled features have no batch statistics of one image.
        loader = dict(loader, batch_size=2)
        print('Images are taken two at a time: batch norms in training mode '
              'need more than one, also in the training itself.')
    train = Runner.build_dataloader(loader, seed=SEED)
    # As at the start of a run, and of the checkpoint in addition.
    check_classes(model, train.dataset)
    check_names(path, names, train.dataset)
    load_state_dict(model, state, strict=False, logger='current')
    model.to(args.device or get_device()).eval()

    fitted = [n for n, head in heads.items() if head.role == 'classifier']
    for name in heads.keys() - fitted:
        print(f"{name}: role 'auxiliary'; the stock classifier is taken over "
              'as it is, the text branch starts fresh')
    val = held_back(cfg) if fitted else None
    batches = endless(train)
    for name in fitted:
        fit(model, name, stock[name], batches, val, args.num_images)

    # What is neither taken over nor fitted is left out, so that the run
    # initializes it by its own rules and lists it as missing.
    own = tuple(f'{name}.conv_seg.' for name in fitted)
    state = {
        key: value.cpu()
        for key, value in model.state_dict().items() if key.startswith(own)
        or getattr(state.get(key), 'shape', None) == value.shape
    }
    classes = train.dataset.metainfo
    meta = {key: classes.get(key) for key in ('classes', 'palette')}
    meta = dict(dataset_meta=meta, stock_checkpoint=os.path.basename(path))
    data = checkpoint_bytes(dict(state_dict=state, meta=meta))
    write_files({args.out: data})
    print(f'wrote {args.out}: train with load_from={args.out}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    try:
        convert(args)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
