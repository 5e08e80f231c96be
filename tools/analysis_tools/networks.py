# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Write docs/en/networks.md: what text costs each network, and where.

The networks are those of the text configs on Cityscapes. Each is built with
and without text and its parameters and multiplications are counted, on
tensors without values: no weights, vectors, data or GPU are needed. Takes
about a minute.
"""
import argparse
import difflib
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'en' / 'networks.md'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out',
        type=Path,
        default=PAGE,
        help='page to write (default: %(default)s)')
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing; fail if the file is out of date')
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='NETWORK',
        help='with --check: look at these networks only')
    args = parser.parse_args(argv)
    if args.only and not args.check:
        parser.error('--only would write a page without the other networks; '
                     'it goes with --check')
    needed = args.out if args.check else args.out.parent
    if not needed.exists():
        parser.error(f'--out: there is no {needed}')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmseg_textkd  # noqa: F401  (registers the text heads)
from mmseg_textkd.analysis.benchmark import randomize_text
from mmseg_textkd.models.record_calls import record_calls
from mmseg_textkd.utils.report import count_params, flops_by_module, table

# Network, and what follows the text encoder.
NAME = re.compile(r'textkd_(.+)_vit-b16_(.+_cityscapes-.+\.py)')
SCORE_MAP = re.compile(r'textkd_(.+)_vit-b16-score-map_(.+_camvid-.+\.py)')
SIZE = (1024, 2048)
TEMPLATE = Path(__file__).with_name('networks.md.in')


class Row(NamedTuple):
    """What was measured of one network; the counts are exact."""
    name: str
    config: str
    heads: Tuple[str, str]
    channels: int
    dim: int
    stride: int
    training_only: str
    params: Dict[str, int]
    macs: Dict[str, int]


def text_configs() -> Dict[str, Path]:
    """Find the text configs on Cityscapes, by name of the network."""
    folder = ROOT / 'configs' / 'text_classifier'
    matches = [(NAME.fullmatch(p.name), p) for p in sorted(folder.iterdir())]
    return {match[1]: path for match, path in matches if match}


def build(cfg: Config, **head: str) -> nn.Module:
    """Build a model, with vectors that need no file as the text."""
    cfg = randomize_text(cfg).model
    cfg.decode_head.update(head)
    return revert_sync_batchnorm(MODELS.build(cfg))


def count_macs(model: nn.Module, mode: str, batch: int) -> Dict[str, int]:
    """Count what each module multiplies in one forward.

    Args:
        model (nn.Module): A segmentor, in training or evaluation mode.
        mode (str): 'tensor' or 'loss'.
        batch (int): Number of images.

    Returns:
        dict[str, int]: Multiply-accumulates for one image, by name of the
        module; '' is the whole model.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = BaseDataElement(metainfo=dict(img_shape=SIZE))
        labels = torch.zeros(1, *SIZE, dtype=torch.long)
        sample.gt_sem_seg = sample.gt_edge_map = PixelData(data=labels)
        inputs = torch.zeros(batch, 3, *SIZE)
        counts = flops_by_module(
            lambda: model(inputs, [sample] * batch, mode=mode))
    root = type(model).__name__
    return {
        name[len(root) + 1:]: flops // (2 * batch)
        for name, flops in counts.items()
        if name == root or name.startswith(f'{root}.')
    }


def evaluation_macs(model: nn.Module) -> Dict[str, int]:
    """Count one forward in evaluation mode."""
    return count_macs(model.eval(), 'tensor', batch=1)


def training_macs(model: nn.Module) -> Dict[str, int]:
    """Count one forward in training mode, of all heads."""
    heads = [m for m in model.modules() if hasattr(m, 'loss_by_feat')]
    for head in heads:
        # Some pick hard pixels by their values, which are not there.
        head.loss_by_feat = lambda *args: {}
    # Two: a batch norm behind global pooling needs more than one value.
    macs = count_macs(model.train(), 'loss', batch=2)
    for head in heads:
        del head.loss_by_feat
    return macs


def take_text_away(model: nn.Module, stock: nn.Module) -> nn.Module:
    """Bring a text network into the form in which it is released.

    Raises:
        RuntimeError: If what is left is not the stock network.
    """
    head = model.eval().decode_head
    if head.role == 'classifier':
        head.conv_seg = head.conv_seg.as_conv()
    else:
        del head.text_branch, head.text_losses
    left, expected = ({(name, param.shape)
                       for name, param in m.named_parameters()}
                      for m in (model, stock))
    if left != expected:
        raise RuntimeError(f'{type(head).__name__} without its text differs '
                           f'from the stock head: {left ^ expected}')
    return model


def training_only(stock: nn.Module, evaluation: Dict[str, int],
                  training: Dict[str, int]) -> Tuple[str, int]:
    """Describe the parts that run in training only.

    Returns:
        tuple[str, int]: The parts, and the number of their parameters.
    """
    idle = training.keys() - evaluation.keys()
    names = sorted({'.'.join(name.split('.')[:2]) for name in idle})
    parts = [stock.get_submodule(name) for name in names]
    kinds = Counter(
        type(part).__name__ if name.startswith('auxiliary_head.') else name
        for name, part in zip(names, parts))
    words = [f'`{k}`' if n == 1 else f'{n} `{k}`' for k, n in kinds.items()]
    return ', '.join(words) or 'none', count_params(*parts)


def measure(name: str, path: Path) -> Row:
    """Measure one network.

    Args:
        name (str): Name of the network.
        path (Path): Its text config, which has a stock twin.

    Returns:
        Row: What was measured.

    Raises:
        RuntimeError: If the deployed network is not the stock one.
    """
    cfg = Config.fromfile(path)
    twin = f'{name}_{NAME.fullmatch(path.name)[2]}'
    stock = build(Config.fromfile(path.parents[1] / 'stock' / twin))
    models = {
        'stock': stock,
        'classifier': build(cfg, role='classifier'),
        'auxiliary': build(cfg, role='auxiliary')
    }
    params = {key: count_params(model) for key, model in models.items()}
    training = {key: training_macs(model) for key, model in models.items()}
    macs = {f'training {key}': value[''] for key, value in training.items()}

    head = models['classifier'].decode_head
    with record_calls(head.conv_seg) as calls:
        macs['text'] = evaluation_macs(models['classifier'])['']
    _, channels, height, _ = calls[0][0].shape

    evaluation = evaluation_macs(stock)
    macs['stock'] = evaluation['']
    parts, params['training only'] = training_only(stock, evaluation,
                                                   training['stock'])
    for role in ('auxiliary', 'classifier'):
        model = take_text_away(models[role], stock)
        params['deployed'] = count_params(model)
        macs['deployed'] = evaluation_macs(model)['']
        if macs['deployed'] != macs['stock']:
            raise RuntimeError(f'{name}: {macs["deployed"]} MACs deployed in '
                               f'the role {role!r}, {macs["stock"]} stock')
    return Row(
        name=name,
        config=path.name,
        heads=(type(stock.decode_head).__name__, type(head).__name__),
        channels=channels,
        dim=cfg.model.decode_head.text.embeddings.dim,
        stride=SIZE[0] // height,
        training_only=parts,
        params=params,
        macs=macs)


def score_map_row(path: Path) -> Tuple[str, ...]:
    """Count what the score map of one network costs, deployed.

    Args:
        path (Path): Its config, which has a stock twin.

    Returns:
        tuple[str]: A row of the table.
    """
    name, rest = SCORE_MAP.fullmatch(path.name).groups()
    cfg = Config.fromfile(path)
    text = cfg.model.score_map.text
    # Without its offsets, which only training has.
    cfg.model.score_map.text = text.embeddings
    model, stock = (
        build(c).eval() for c in (cfg,
                                  Config.fromfile(path.parents[1] / 'stock' /
                                                  f'{name}_{rest}')))
    with record_calls(model.score_map) as calls:
        macs, before = (evaluation_macs(m)[''] for m in (model, stock))
    _, channels, height, _ = calls[0][0].shape
    params = count_params(model) - count_params(stock)
    readers = [key.replace('/', '.') for key in model.score_map.convs]
    place = os.path.commonprefix([r.split('.') for r in readers])
    text = f'`{readers[0]}`'
    if len(readers) > 1:
        text = f'{len(readers)} convolutions of `{".".join(place)}`'
    return (f'[{name}](../../configs/textkd/{path.name})', f'{channels}',
            str(SIZE[0] // height), text, f'+{params / 1e6:.3f}',
            f'+{(macs - before) / 1e9:.3f}',
            f'+{100 * (macs / before - 1):.2f} %')


def score_map_rows(only: Sequence[str]) -> List[Tuple[str, ...]]:
    """Count what the score maps cost, of all networks or of some."""
    folder = ROOT / 'configs' / 'textkd'
    found = [(SCORE_MAP.fullmatch(p.name), p)
             for p in sorted(folder.iterdir())]
    return [
        score_map_row(path) for match, path in found
        if match and match[1] in (only or [match[1]])
    ]


def millions(row: Row, key: str) -> str:
    """Write a number of parameters, and how it differs from stock."""
    more = row.params[key] - row.params['stock']
    text = f'{row.params[key] / 1e6:.3f}'
    return f'{text} (+{more / 1e6:.3f})' if more else text


def page(rows: Sequence[Row], score_maps: Sequence[Tuple[str, ...]]) -> str:
    """Write the whole page."""
    attachment = [
        (
            # From docs/en.
            f'[{row.name}](../../configs/text_classifier/{row.config})',
            f'`{row.heads[0]}` → `{row.heads[1]}`',
            f'{row.channels} → {row.dim}',
            str(row.stride),
            row.training_only) for row in rows
    ]
    params = [(row.name,
               *(millions(row, key)
                 for key in ('stock', 'classifier', 'auxiliary', 'deployed')),
               f'{row.params["training only"] / 1e6:.3f}') for row in rows]
    keys = ('stock', 'text', 'deployed', 'training stock',
            'training classifier', 'training auxiliary')
    macs = [(row.name, *(f'{row.macs[key] / 1e9:.2f}' for key in keys))
            for row in rows]
    return TEMPLATE.read_text(encoding='utf-8').format(
        height=SIZE[0],
        width=SIZE[1],
        attachment=table(
            ('network', 'decode head', 'C → D', 'stride', 'in training only'),
            attachment),
        params=table(('network', 'stock', 'training, `classifier`',
                      'training, `auxiliary`', 'deployed', 'in training only'),
                     params),
        macs=table(('network', 'evaluation, stock', 'text, unfolded',
                    'deployed', 'training, stock', 'training, `classifier`',
                    'training, `auxiliary`'), macs),
        score_maps=table(('network', 'C', 'stride', 'read by', 'parameters',
                          'GMACs', 'of stock'), score_maps))


def differences(old: str, new: str, only: Sequence[str]) -> List[str]:
    """Compare two pages, or the rows of some networks in them."""
    pages = [text.splitlines() for text in (old, new)]
    if only:
        starts = tuple(
            start for name in only for start in (f'| [{name}]', f'| {name} |'))
        pages = [[line for line in lines if line.startswith(starts)]
                 for lines in pages]
    return [
        line for line in difflib.unified_diff(*pages, n=0, lineterm='')
        if not line.startswith(('---', '+++', '@@'))
    ]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    unknown = set(args.only) - set(text_configs())
    if unknown:
        sys.exit(f'--only: there is no {", ".join(sorted(unknown))}, only '
                 f'{", ".join(text_configs())}')
    init_default_scope('mmseg')
    rows = [
        measure(name, path) for name, path in text_configs().items()
        if name in (args.only or [name])
    ]
    text = page(rows, score_map_rows(args.only))
    if not args.check:
        args.out.write_text(text, encoding='utf-8')
        print(f'wrote {args.out}: {len(rows)} networks')
        return
    found = differences(args.out.read_text(encoding='utf-8'), text, args.only)
    if found:
        sys.exit('\n'.join([
            f'{args.out} is out of date (- in the file, + measured):', *found,
            'Run `python tools/analysis_tools/networks.py`.'
        ]))
    print(f'{args.out} is up to date: {len(rows)} networks')


if __name__ == '__main__':
    main()
