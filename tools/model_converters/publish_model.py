# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make a checkpoint fit to be published.

Keeps the weights and what is known of them and drops optimizer, schedules and
messages. Writes {config}_{date}-{first 8 digits of its SHA-256}.pth, a model
card beside it and, with ``--log``, the log of the training. With EMA the
weights are the averaged ones, as in any checkpoint that MMEngine saves.
"""
import argparse
import hashlib
import html
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='a folded or stock one')
    parser.add_argument(
        '--out',
        help='folder, where the files are named after --config (it is made '
        'if it ends in a slash); or folder and name of the config, without '
        'date and hash')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--config',
        help='config into which the weights must fit, all of them; for folded '
        'ones that of textkd2mmseg.py')
    parser.add_argument(
        '--log',
        type=Path,
        help='scalars.json of the run: a copy is published')
    parser.add_argument(
        '--keep-text',
        action='store_true',
        help='publish weights that still have text in them')
    parser.add_argument(
        '--fp16',
        action='store_true',
        help='store the weights in half precision; networks compute in their '
        'own')
    args = parser.parse_intermixed_args(argv)
    words = args.out or args.old_out
    if not words:
        parser.error('--out is needed')
    args.out = Path(words)
    if args.out.is_dir() or words.endswith('/'):
        if args.config is None:
            parser.error(f'{args.out} is a folder: give --config, after which '
                         'the file is named, or a name as well')
        args.out /= Path(args.config).stem
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import mmcv
import mmengine
import mmseg
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmseg_textkd
from mmseg_textkd.deploy.publish import (check_weights, read_log, serialize,
                                         to_half)
from mmseg_textkd.models import DistilledEncoderDecoder
from mmseg_textkd.utils.arguments import explain, warn_renamed
from mmseg_textkd.utils.checkpoint import (build_network, load_strictly,
                                           read_checkpoint)
from mmseg_textkd.utils.config import load_config
from mmseg_textkd.utils.io import write_files

CARD = Path(__file__).with_name('model_card.md.in')
LIBRARIES = (torch, mmengine, mmcv, mmseg, mmseg_textkd)
# As MMEngine writes when a checkpoint was saved.
DATE = re.compile(r'\d{8}_\d{6}')
UNKNOWN = 'not recorded'


def model_card(cfg: Optional[Config], meta: Dict, **facts: Any) -> str:
    """Fill the template."""
    classes = meta['dataset_meta']['classes']
    cfg = cfg or Config()
    loader = cfg.get('train_dataloader') or {}
    dataset = loader.get('dataset') or {}
    model = cfg.get('model') or {}
    crop = (model.get('data_preprocessor') or {}).get('size')
    length = (cfg.get('train_cfg') or {}).get('max_iters')
    whole = f'{length} (the whole run)' if length else UNKNOWN
    places = [dataset[k] for k in ('type', 'data_root') if dataset.get(k)]
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    log = meta.get('training_log')
    results = 'Not measured.'
    if log:
        values = ', '.join(f'{k} {v:.2f}' for k, v in log['metrics'].items())
        results = (f'{values} in one run, as logged at iteration '
                   f'{log["iter"]} by the network as it was trained '
                   f'(`{log["file"]}`).')
    return CARD.read_text(encoding='utf-8').format(
        num_classes=len(classes),
        # The card is a page, and the names may be anybody's.
        classes=html.escape(', '.join(classes), quote=False),
        dataset=', '.join(map(str, places)) or UNKNOWN,
        iterations=meta.get('iter', whole),
        batch=loader.get('batch_size') or UNKNOWN,
        crop='x'.join(map(str, crop)) if crop else UNKNOWN,
        optimizer=f'`{dict(optimizer)}`' if optimizer else UNKNOWN,
        seed=meta.get('seed', UNKNOWN),
        results=results,
        folded_from=meta.get('folded_from', UNKNOWN),
        verified=meta.get('verified', UNKNOWN),
        versions=', '.join(f'{k} {v}'
                           for k, v in meta['published_with'].items()),
        **facts)


def publish(args: argparse.Namespace) -> Path:
    """Do what the command line says.

    Returns:
        Path: The published weights.
    """
    checkpoint = read_checkpoint(args.checkpoint)
    state, meta = checkpoint['state_dict'], checkpoint['meta']
    has_text = check_weights(args.checkpoint, state, meta, args.keep_text)
    if args.fp16:
        state = to_half(args.checkpoint, state)
    checks = ['all weights are finite', 'loads with `weights_only=True`']
    text = 'yes: it needs mmseg_textkd' if has_text else 'no'
    # MMEngine's inferencers execute it, so it must be that of --config.
    # Both are put in again below, so that the order is the same.
    for key in ('cfg', 'config', 'published_with'):
        meta.pop(key, None)
    cfg, params = None, UNKNOWN
    if args.config:
        cfg = load_config(args.config)
        init_default_scope(cfg.get('default_scope') or 'mmseg')
        model = build_network(cfg.model)
        if isinstance(model, DistilledEncoderDecoder):
            raise ValueError(
                f'{args.config} has a teacher, which only training needs. '
                'Make the stock config and its weights first, `python '
                'tools/model_converters/textkd2mmseg.py '
                f'{args.config} {args.checkpoint} --out OUT`.')
        load_strictly(model, state, args.checkpoint)
        names = meta['dataset_meta']['classes']
        number = getattr(model, 'num_classes', len(names))
        # With one logit the labels may have a name for what it is not.
        if len(names) != number and (number, len(names)) != (1, 2):
            raise ValueError(
                f'{args.checkpoint} names {len(names)} classes, but the '
                f'network of {args.config} has {number}: {list(names)[:10]}. '
                'Put the names right in meta[\'dataset_meta\'].')
        params = f'{sum(p.numel() for p in model.parameters()):,}'
        meta['cfg'] = cfg.pretty_text
        ours = f'{mmseg_textkd.__name__}.'
        if not has_text and any(
                type(m).__module__.startswith(ours) for m in model.modules()):
            text = 'no, but the network needs mmseg_textkd'
        checks.append('loads with `strict=True` into the network of '
                      f'`{Path(args.config).name}`')
    # torch's version is no plain text, which weights_only=True would refuse.
    meta['published_with'] = {
        library.__name__: str(library.__version__)
        for library in LIBRARIES
    }
    date = str(meta.get('time'))
    if not DATE.fullmatch(date):
        date = time.strftime('%Y%m%d_%H%M%S')
    stem = f'{args.out}_{date}'
    files = {}
    if args.log:
        log = Path(f'{stem}.json')
        meta['training_log'] = dict(
            file=log.name, **read_log(args.log, meta.get('iter')))
        files[log] = args.log.read_bytes()
    data = serialize(state, meta)
    sha256 = hashlib.sha256(data).hexdigest()
    weights = Path(f'{stem}-{sha256[:8]}.pth')
    files[weights.with_suffix('.md')] = model_card(
        cfg,
        meta,
        name=args.out.name,
        file=weights.name,
        size=f'{len(data):,}',
        sha256=sha256,
        params=params,
        dtypes=', '.join(
            sorted({str(v.dtype).split('.')[-1]
                    for v in state.values()})),
        config=f'`{Path(args.config).name}`' if args.config else 'no config',
        where_config=("in the file: `torch.load(FILE)['meta']['cfg']`"
                      if args.config else 'not in the file'),
        text=text,
        checks=', '.join(checks)).encode()
    # Last, so that whoever sees the weights sees all.
    files[weights] = data
    for path in files:
        if path.exists():
            raise ValueError(f'{path} exists; remove it or write elsewhere')
    try:
        write_files(files)
    except OSError as error:
        raise OSError(f'cannot write to {args.out.parent}: {error}. Nothing '
                      'was left there.') from error
    print('\n'.join(f'wrote {path}' for path in files))
    return weights


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    try:
        publish(args)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
