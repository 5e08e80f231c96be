# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Run one of MMSegmentation's own tools on a config of this package.

It finds the tool in the installed MMSegmentation, imports the package before
it (mmcv-lite needs that), and hands it all further arguments:

  python tools/stock_tool.py browse_dataset CONFIG --output-dir OUT --not-show
  python tools/stock_tool.py print_config CONFIG
  python tools/stock_tool.py confusion_matrix CONFIG PREDICTIONS OUT
  python tools/stock_tool.py benchmark CONFIG CHECKPOINT

PREDICTIONS is the folder that `tools/test.py --out` wrote. `TOOL --help` after
the name shows the arguments of the tool. Any other tool goes by its path below
MMSegmentation's `tools`, such as analysis_tools/analyze_logs.py.
"""
import argparse
import io
import os
import os.path as osp
import sys
from itertools import chain, repeat
from types import ModuleType
from typing import Any, Iterable, Mapping, Optional, Sequence

TOOLS = dict(
    browse_dataset='misc/browse_dataset.py',
    print_config='misc/print_config.py',
    confusion_matrix='analysis_tools/confusion_matrix.py',
    benchmark='analysis_tools/benchmark.py')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'tool', help=f'{", ".join(TOOLS)}, or a path below tools')
    parser.add_argument(
        'words',
        nargs=argparse.REMAINDER,
        metavar='...',
        help='arguments of the tool')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.evaluation import ConfusionIoUMetric, label_map_names
from mmseg_textkd.utils.io import write_files


def count_confusions(dataset: Dataset,
                     results: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the pixels by true and predicted class.

    In place of MMSegmentation's, which counts in 8 bits, too few from 17
    classes on, takes ``reduce_zero_label`` twice, and pairs the files in the
    order of their names with the images in the order of the data set.

    Args:
        dataset (Dataset): The test set.
        results (Mapping[str, np.ndarray]): Predicted labels of its images by
            file name, as written by ``tools/test.py --out``.

    Returns:
        np.ndarray: Pixels, shape (K, K).
    """
    try:
        names = label_map_names(dataset)
    except ValueError as error:
        sys.exit(f'Error: {error}')
    odd = set(names) ^ set(results)
    if odd:
        sys.exit(f'Error: there are {len(results)} predictions, but the test '
                 f'set has {len(dataset)} images; {min(odd)} is a name of '
                 'one of them alone: write them all again.')
    # Its class's, which is what MMSegmentation's tool takes the names of.
    dataset.METAINFO = dataset.metainfo
    number = len(dataset.metainfo['classes'])
    metric = ConfusionIoUMetric(ignore_index=dataset.ignore_index)
    metric.dataset_meta = dataset.metainfo
    for i, name in enumerate(names):
        truth = dataset[i]['data_samples'].gt_sem_seg.data
        # With `reduce_zero_label` the written labels are one higher.
        labels = torch.from_numpy(results[name].astype(np.int64))[None] - int(
            dataset.reduce_zero_label)
        counted = labels[truth != dataset.ignore_index]
        if ((counted < 0) | (counted >= number)).any():
            sys.exit(f'Error: {name} has labels that are none of the '
                     f'{number} classes as `tools/test.py --out` writes them.')
        metric.process({}, [
            dict(pred_sem_seg=dict(data=labels), gt_sem_seg=dict(data=truth))
        ])
    return metric.confusion.numpy()


def plot_confusion_matrix(confusion_matrix: np.ndarray,
                          labels: Sequence[str],
                          save_dir: str,
                          title: str = 'Confusion matrix',
                          color_theme: str = 'Blues',
                          **kwargs: Any) -> None:
    """Draw a confusion matrix that can be read, in place of MMSegmentation's.

    Args:
        confusion_matrix (np.ndarray): Pixels by true and predicted class,
            shape (K, K).
        labels (Sequence[str]): Names of the classes.
        save_dir (str): Folder of ``confusion_matrix.png``, which is made.
        title (str): Title. Defaults to 'Confusion matrix'.
        color_theme (str): Color map. Defaults to 'Blues', also in the place
            of MMSegmentation's default.
        **kwargs: What the original has besides.
    """
    number = len(labels)
    sums = confusion_matrix.sum(1, keepdims=True)
    shares = 100 * confusion_matrix / np.where(sums, sums, np.nan)
    side = 2 + .45 * number
    figure = Figure(figsize=(side + 1.5, side), layout='constrained')
    axis = figure.subplots()
    theme = 'Blues' if color_theme == 'winter' else color_theme
    shown = axis.imshow(shares, cmap=theme, vmin=0, vmax=100)
    figure.colorbar(shown, ax=axis, label='% of the true class', shrink=.8)
    axis.set_xticks(range(number), labels, rotation=45, ha='right')
    axis.set_yticks(range(number), labels)
    axis.set(xlabel='predicted', ylabel='true', title=title)
    if number <= 30:
        for i, j in np.ndindex(number, number):
            value = shares[i, j]
            # Nothing where it would read 0, or where there is no such pixel.
            if value >= .5:
                axis.text(
                    j,
                    i,
                    f'{value:.0f}',
                    ha='center',
                    va='center',
                    fontsize=8,
                    color='white' if value > 50 else 'black')
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=110)
    path = osp.join(save_dir, 'confusion_matrix.png')
    write_files({path: data.getvalue()})
    print(f'\nwrote {path}')


def prepare_benchmark(stock: ModuleType) -> None:
    """Let MMSegmentation's benchmark measure any data set, and weights.

    It takes 200 images, without which it has no result: smaller data sets are
    gone through again. It measures random weights where there are none.

    Args:
        stock (ModuleType): The tool, for the command line of this process.
    """
    runner = stock.Runner

    class Runner:

        @staticmethod
        def build_dataloader(cfg: dict) -> Iterable:
            loader = runner.build_dataloader(cfg)
            if not len(loader):
                sys.exit('Error: the test data set of the config is empty')
            return chain.from_iterable(repeat(loader))

    stock.Runner = Runner
    args = stock.parse_args()
    if not osp.isfile(args.checkpoint):
        sys.exit(f'Error: there is no checkpoint {args.checkpoint}. For times '
                 'without one, and of stock, text and folded side by side: '
                 f'`python tools/analysis_tools/benchmark.py {args.config}`')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    name = TOOLS.get(args.tool, args.tool)
    try:
        stock = load_stock_tool(name)
    except FileNotFoundError as error:
        sys.exit(f'Error: {error}')
    sys.argv = [name, *args.words]
    if hasattr(stock, 'plot_confusion_matrix'):
        stock.plot_confusion_matrix = plot_confusion_matrix
        folder = stock.parse_args().prediction_path
        if not osp.isdir(folder):
            sys.exit(f'Error: there is no folder {folder}.')
        # It reads them in this order.
        files = sorted(os.listdir(folder))
        stock.calculate_confusion_matrix = lambda dataset, results: (
            count_confusions(dataset, dict(zip(files, results))))
    if args.tool == 'benchmark':
        prepare_benchmark(stock)
    stock.main()


if __name__ == '__main__':
    main()
