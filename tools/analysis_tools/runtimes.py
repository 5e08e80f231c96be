# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Write docs/en/runtimes.md: every network in every runtime, each run.

The networks are those of the text configs on Cityscapes, folded, with random
weights whose batch norms have seen images. Each cell is a folder of
tools/deployment/deploy.py in --work-dir; those that are there are not made
anew, so the table may be filled in several runs, with other runtimes
installed. With --time what is there is also timed, on a machine that should
do nothing else.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'en' / 'runtimes.md'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/runtimes'),
        help='where the folders are (default: %(default)s)')
    parser.add_argument(
        '--networks',
        nargs='+',
        metavar='NETWORK',
        help='those to make (default: all)')
    parser.add_argument(
        '--cells',
        nargs='+',
        metavar='RUNTIME:PRECISION',
        help='those to make (default: all)')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(128, 256),
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: 128 256)')
    parser.add_argument(
        '--num-images',
        type=int,
        default=4,
        help='images to compare on (default: %(default)s)')
    parser.add_argument(
        '--out',
        type=Path,
        default=PAGE,
        help='page to write (default: %(default)s)')
    parser.add_argument(
        '--time', action='store_true', help='deploy stock ones too, and time')
    parser.add_argument(
        '--runs', type=int, default=30, help='rounds (default: %(default)s)')
    parser.add_argument(
        '--warmup',
        type=int,
        default=5,
        help='rounds before, which do not count (default: %(default)s)')
    parser.add_argument(
        '--threads',
        type=int,
        default=1,
        help='of each runtime (default: %(default)s)')
    args = parser.parse_args(argv)
    args.size = tuple(args.size)
    if not args.out.parent.is_dir():
        parser.error(f'--out: there is no {args.out.parent}')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from networks import text_configs
from torch import nn

from mmseg_textkd.analysis.benchmark import randomize_text
from mmseg_textkd.analysis.benchmark_folders import EAGER, time_folders
from mmseg_textkd.datasets.toy_scenes_renderer import render_scene
from mmseg_textkd.deploy import fold, to_stock_cfg
from mmseg_textkd.deploy.export import metadata
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.folder import deploy
from mmseg_textkd.deploy.load_stock import (complete_meta, dataset_meta,
                                            fix_bases)
from mmseg_textkd.deploy.runtimes import RUNTIMES, Form
from mmseg_textkd.utils.report import describe, environment, table

CELLS = tuple((name, precision) for name, runtime in RUNTIMES.items()
              for precision in runtime.precisions)
STOCK = 'stock'
INTRO = '''# Runtimes

Every network of the text classifier, folded, in every runtime that
`tools/deployment/deploy.py` deploys to. Made by
`python tools/analysis_tools/runtimes.py`, not by hand.

Each cell was exported and run in its runtime on the CPU, on {number} images
of ToyScenes of {height}x{width}, and compared with PyTorch: the largest
difference of scores relative to the largest score, and the share of pixels
with the same class where it is not 100 %. Weights are random, with batch norms
that have seen those images. In fp32 a difference above 1e-4 would be an
error.

{table}
'''
NOTES = '''
- An empty cell has not been run, and times that are missing not measured.
- `tensorrt` stands for the graph that TensorRT gets: it holds only operators
  and modes of TensorRT's list, with static shapes, and was run in ONNX
  Runtime. **Nothing was run in TensorRT**, which needs its GPU.
- `openvino` fp16 stores weights in half precision and computes in float32.
- int8 of random weights says that it runs, not what it costs a trained
  network; for that see [8 bits](user_guides/export.md#8-bits).
'''
TIMES = '''
## Time

`{command}`; {where} Times relative to PyTorch eager in the same rounds (less
is faster), folded / stock in the same runtime with its 95 % interval, and the
share of the machine's peak that the folded network reaches: its GFLOP/s over
those of a product of two large float32 matrices in the same rounds (more than
100 % is possible where 3x3 convolutions take fewer products, by Winograd).
Folded and stock are the same network, so that a ratio beside 1 is noise: of
{number} the median is {median:.3f}, and the intervals of {inside} contain 1.

{table}
'''
NO_TIMES = '''
## Time

Not measured yet: the machine was not quiet.
`python tools/analysis_tools/runtimes.py --time` measures and writes it here.
'''


def build(cfg: Config, text: bool, images: torch.Tensor) -> nn.Module:
    """Build a network as it is deployed: the text network folded, or stock.

    Args:
        cfg (Config): Config of the text network.
        text (bool): Whether it is that, folded, or the stock one.
        images (Tensor): Normalized, (N, 3, H, W), for the batch norms.

    Returns:
        nn.Module: In evaluation mode, for whole images.
    """
    cfg = randomize_text(cfg)
    torch.manual_seed(0)
    own = cfg.model if text else to_stock_cfg(cfg, True).model
    model = revert_sync_batchnorm(MODELS.build(own)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        model(images, mode='tensor')
    if text:
        model = revert_sync_batchnorm(fold(model.eval(), cfg, True))
    model.auxiliary_head = None
    model.test_cfg = ConfigDict(mode='whole')
    return fix_bases(model.eval())


def make(name: str, path: Path, args: argparse.Namespace) -> None:
    """Make the folders of a network that are wanted and not there."""
    kinds = ('', STOCK) if args.time else ('', )
    wanted = [(*cell, kind) for cell in args.cells for kind in kinds
              if not folder(args.work_dir, name, *cell, kind).exists()]
    cfg = Config.fromfile(path)
    models: Dict[str, nn.Module] = {}
    scenes = [
        render_scene(0, 'val', i, *args.size).image
        for i in range(args.num_images)
    ]
    for runtime, precision, kind in wanted:
        if kind not in models:
            inputs = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
            inputs = (inputs.float() - 128) / 64
            models[kind] = build(cfg, kind != STOCK, inputs)
        model = models[kind]
        network = ExportableSegmentor(
            model, preprocess=RUNTIMES[runtime].preprocess).eval()
        images = [torch.from_numpy(scene)[None] for scene in scenes]
        if not network.preprocess:
            images = [
                network.preprocessor(
                    dict(inputs=list(x.permute(0, 3, 1, 2))))['inputs']
                for x in images
            ]
        classes = complete_meta(
            dataset_meta(cfg, None), model.decode_head.num_classes)
        out = folder(args.work_dir, name, runtime, precision, kind)
        try:
            meta = deploy(
                out,
                runtime,
                network,
                Form(args.size, False, precision, metadata(network, classes)),
                classes, {f'{len(images)} images': images},
                [np.ascontiguousarray(x.numpy()) for x in images],
                source=dict(config=path.name, checkpoint='random weights'))
            print(f'{out.name}: {meta["checks"][0]["text"]}', flush=True)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            print(f'{out.name} FAILED: {error}', flush=True)


def folder(root: Path, name: str, runtime: str, precision: str,
           kind: str) -> Path:
    """Where a cell is."""
    parts = [name, kind, runtime, precision]
    return root / '_'.join(part for part in parts if part)


def cell(path: Path) -> str:
    """What a cell of the table says."""
    if not path.exists():
        return ''
    found, = json.loads((path / 'network.json').read_text())['checks']
    text = f'{found["difference"] / (found["largest"] or 1):.1e}'
    same = 100 * (1 - found['differing'] / found['pixels'])
    return f'{text}, {same:.2f} %' if found['differing'] else text


def timed(args: argparse.Namespace) -> Dict[str, Any]:
    """Time what is there, one network after another."""
    results = dict(environment=environment(), rows=[])
    for name, path in args.networks.items():
        folders = {
            f'{runtime} {precision}{" stock" * bool(kind)}':
            folder(args.work_dir, name, runtime, precision, kind)
            for runtime, precision in args.cells
            for kind in ('', STOCK) if runtime != 'tensorrt'
        }
        folders = {k: v for k, v in folders.items() if v.exists()}
        images = torch.randn(2, 3, *args.size)
        model = build(Config.fromfile(path), True, images)
        found = time_folders(folders, args.runs, args.warmup, args.threads,
                             model, args.size)
        results['rows'].append(dict(network=name, **found))
    return results


def time_rows(results: Dict[str, Any]) -> List[Tuple[str, ...]]:
    """Rows of the table of times."""
    rows = []
    for row in results['rows']:
        for arm, times in row['arms'].items():
            if arm.endswith(f' {STOCK}') or arm == EAGER:
                continue
            low, high = times['to_stock_ci95']
            rows.append((row['network'], arm, f'{times["ratio"]:.3f}',
                         f'{times["to_stock"]:.3f} [{low:.3f}, {high:.3f}]',
                         f'{100 * times["share_of_peak"]:.0f} %'))
    return rows


def page(args: argparse.Namespace, results: Optional[Dict]) -> str:
    """Write the whole page from the folders."""
    columns = [
        c for c in CELLS if any(
            folder(args.work_dir, name, *c, '').exists()
            for name in text_configs())
    ]
    rows = [(name, *(cell(folder(args.work_dir, name, *c, ''))
                     for c in columns)) for name in text_configs()]
    text = INTRO.format(
        number=args.num_images,
        height=args.size[0],
        width=args.size[1],
        table=table(('network', *map(' '.join, columns)), rows)) + NOTES
    if results is None:
        return text + NO_TIMES
    ratios = [
        times for row in results['rows'] for times in row['arms'].values()
        if 'to_stock' in times
    ]
    bounds = [times['to_stock_ci95'] for times in ratios]
    return text + TIMES.format(
        number=len(ratios),
        median=np.median([times['to_stock'] for times in ratios]),
        inside=sum(low <= 1 <= high for low, high in bounds),
        command=f'runtimes.py --time --runs {args.runs} --warmup '
        f'{args.warmup} --threads {args.threads}',
        where=describe(results['environment']),
        table=table(('network', 'runtime', 'time / eager', 'folded / stock',
                     'of peak'), time_rows(results)))


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Look up networks and cells, and make the folder of all folders."""
    configs = text_configs()
    cells = [tuple(c.split(':')) for c in args.cells or ()] or CELLS
    odd = [n for n in args.networks or () if n not in configs]
    odd += [':'.join(c) for c in cells if c not in CELLS]
    if odd:
        sys.exit(f'Error: there is no {", ".join(odd)}; networks: '
                 f'{", ".join(configs)}; cells: '
                 f'{", ".join(map(":".join, CELLS))}')
    args.cells = cells
    args.networks = {k: configs[k] for k in args.networks or configs}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = complete(parse_args(argv))
    init_default_scope('mmseg')
    torch.set_num_threads(args.threads)
    for name, path in args.networks.items():
        make(name, path, args)
    text = page(args, timed(args) if args.time else None)
    args.out.write_text(text, encoding='utf-8')
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
