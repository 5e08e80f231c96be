# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compare two checkpoints class by class, on the validation set.

Each is evaluated by MMSegmentation's runner and IoUMetric, with the
val_dataloader and val_evaluator of its config. Writes to --out: compare.md,
compare.png, compare.json, and the result of each side, a.json and b.json,
which can be compared again without evaluating.
"""
import argparse
import html
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='compare.py CONFIG_A CKPT_A CONFIG_B CKPT_B [--out DIR]\n'
        '       compare.py A.json B.json [--out DIR]')
    parser.add_argument('inputs', nargs='+', help='as above')
    parser.add_argument(
        '--out',
        type=Path,
        default='work_dirs/compare',
        help='folder (default: %(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of both configs to override')
    args = parser.parse_args(argv)
    if len(args.inputs) not in (2, 4):
        parser.error('two configs with a checkpoint each, or two results, but '
                     f'got {len(args.inputs)} files')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
from matplotlib.figure import Figure

from mmseg_textkd.analysis.compare import compare, evaluate
from mmseg_textkd.evaluation.confusion_iou_metric import SUMMARY
from mmseg_textkd.utils.arguments import explain, read_options
from mmseg_textkd.utils.io import write_files
from mmseg_textkd.utils.report import table

NOTE = ('One pair of checkpoints says nothing about seeds: another seed of '
        'the same config may move a class by as much. Repeat it with several.')


def number(value: Optional[float], sign: str = '') -> str:
    """Write a percentage, or - if there is none."""
    return '-' if value is None else f'{value:{sign}.2f}'


def markdown(result: Dict[str, Any]) -> str:
    """Write a comparison as a page."""
    a, b = result['a'], result['b']
    largest = max([abs(row['gain'] or 0) for row in result['IoU']] + [.01])

    def bar(gain: Optional[float]) -> str:
        length = math.ceil(10 * abs(gain or 0) / largest)
        return f'`{("+" if gain > 0 else "-") * length}`' if length else ''

    summary = [(side, f'`{r["config"]}`', f'`{r["checkpoint"]}`',
                *(number(r[key]) for key in SUMMARY))
               for side, r in (('A', a), ('B', b))]
    # A page, and the names may be anybody's.
    classes = [(html.escape(row['name'], quote=False), number(row['a']),
                number(row['b']), number(row['gain'], '+'), bar(row['gain']))
               for row in result['IoU']]
    pairs = [(*(html.escape(row[key], quote=False)
                for key in ('truth', 'taken_for')), number(row['a']),
              number(row['b']), number(row['b'] - row['a'], '+'))
             for row in result['pairs']]
    tables = [
        table(('', 'config', 'checkpoint', *SUMMARY), summary),
        table(('class', 'A', 'B', 'B - A', ''), classes),
        table(('class', 'taken for', 'A', 'B', 'B - A'), pairs)
    ]
    parts = [
        '# Comparison',
        f'{result["images"]} images of the validation set. {NOTE}', tables[0],
        '## IoU of each class, in percent', tables[1],
        '## Most confusable pairs',
        'Percent of the pixels of a class that are taken for another one.',
        tables[2]
    ]
    return '\n\n'.join(parts) + '\n'


def draw(result: Dict[str, Any]) -> Figure:
    """Draw gains and confusable pairs as bars."""
    classes, pairs = result['IoU'], result['pairs']
    rows = max(len(classes), 2 * len(pairs))
    figure = Figure((12, 2 + .22 * rows), layout='constrained')
    left, right = figure.subplots(1, 2)
    gains = [row['gain'] or 0 for row in classes]
    colors = ['C2' if gain > 0 else 'C3' for gain in gains]
    left.barh([row['name'] for row in classes], gains, color=colors)
    left.axvline(0, color='k', linewidth=.8)
    left.set_title('IoU, B - A, in percentage points')
    names = [f'{row["truth"]} → {row["taken_for"]}' for row in pairs]
    places = np.arange(len(pairs))
    for shift, side in ((-.2, 'a'), (.2, 'b')):
        right.barh(
            places + shift, [row[side] for row in pairs],
            height=.4,
            label=f'{side.upper()}: {result[side]["checkpoint"]}')
    right.set_yticks(places, names)
    right.set_title('most confusable pairs, % of the pixels of the class')
    if pairs:
        right.legend()
    for axes in (left, right):
        axes.invert_yaxis()
    figure.suptitle(f'{result["images"]} images; one pair of checkpoints '
                    'says nothing about seeds')
    return figure


def read_result(path: str) -> Dict[str, Any]:
    """Read the result of one side, as written here."""
    try:
        result = json.loads(Path(path).read_text(encoding='utf-8'))
        missing = {'config', 'checkpoint', 'images', 'classes', 'IoU',
                   'confusion', *SUMMARY} - result.keys()  # yapf: disable
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{path} is no JSON object: {error}') from error
    if missing:
        raise ValueError(f'{path} is not the result of one side (a.json or '
                         f'b.json): it lacks {sorted(missing)}')
    return result


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    if len(args.inputs) == 2:
        a, b = map(read_result, args.inputs)
    else:
        a, b = (evaluate(args.inputs[i], Path(args.inputs[i + 1]),
                         args.out / name, read_options(args.cfg_options))
                for i, name in ((0, 'a'), (2, 'b')))
    result = compare(a, b)
    picture = io.BytesIO()
    draw(result).savefig(picture, format='png', dpi=120)
    files = {f'{n}.json': json.dumps(r) for n, r in (('a', a), ('b', b))}
    files['compare.json'] = json.dumps(result, indent=1)
    files['compare.md'] = markdown(result)
    args.out.mkdir(parents=True, exist_ok=True)
    contents = {args.out / n: text.encode() for n, text in files.items()}
    contents[args.out / 'compare.png'] = picture.getvalue()
    write_files(contents)
    print(files['compare.md'])
    print(f'wrote {args.out}/compare.md, .png and .json')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        run(args)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
