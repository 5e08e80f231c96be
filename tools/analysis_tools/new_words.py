# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Ask trained networks for words that they were not trained with.

measure: score checkpoints on the validation images of a config and add the
results to a ledger. table: make the tables from the ledger alone.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

PAGE = '''<!-- Made by tools/analysis_tools/new_words.py of {ledger}; not \
to be edited. -->
# New words

Trained networks, asked for words that they were not trained with: mIoU and \
IoU in percent on validation images, mean ± standard deviation over the \
seeds. What `unit`, `projected`, `ridge` and `raw` are: \
[words](../en/user_guides/words.md#which-part-of-a-new-word-is-used). "All \
new": every class is asked for by its new word at once; "this word new": one, \
beside the trained names of the others.

'''

# Of entries before 2026-12-01.
SHIFTED = ' In each list labels and scores were half a stride apart. Where it \
was measured again that had changed mIoU by 0.1 at most (by 0.3 at 360x480).'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(
        dest='command', required=True, help='what to do')
    measure = commands.add_parser('measure', help='score checkpoints')
    measure.add_argument('ledger', type=Path, help='file to add to, *.jsonl')
    measure.add_argument('config', help='config of the network')
    measure.add_argument(
        'checkpoints', type=Path, nargs='+', help='one of each seed')
    measure.add_argument(
        '--words',
        type=Path,
        required=True,
        help='JSON with a new word for classes of the data')
    measure.add_argument(
        '--embeddings',
        type=Path,
        required=True,
        help='embeddings file with the vectors of these words')
    measure.add_argument(
        '--data', help='config whose val_dataloader is used (default: CONFIG)')
    measure.add_argument(
        '--study',
        default='new_words',
        help='name in the ledger (default: %(default)s)')
    measure.add_argument(
        '--network',
        default='',
        help='name of the network in the ledger (default: %(default)s)')
    measure.add_argument(
        '--stride',
        type=int,
        default=2,
        help='score every so many-th row and column (default: %(default)s)')
    measure.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the configs to override')
    made = commands.add_parser('table', help='make the tables')
    made.add_argument('ledger', type=Path, help='file to read, *.jsonl')
    made.add_argument(
        '--out', type=Path, help='page to write (default: print it)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

# isort: split
import numpy as np
from mmengine.registry import init_default_scope

from mmseg_textkd.analysis.new_words import (ALL_NEW, RANDOM, TRAINED,
                                             measure_new_words)
from mmseg_textkd.models.new_words import NEW_WORDS
from mmseg_textkd.study import Ledger, LedgerError
from mmseg_textkd.study.analysis import Group
from mmseg_textkd.utils.arguments import read_config
from mmseg_textkd.utils.io import write_files
from mmseg_textkd.utils.report import table


def measure(args: argparse.Namespace) -> None:
    """Score checkpoints and write the ledger."""
    cfg = read_config(args.config, args.cfg_options)
    data = read_config(
        args.data or args.config, args.cfg_options, network=False)
    init_default_scope('mmseg')
    ledger = Ledger(args.ledger)
    words = json.loads(args.words.read_text(encoding='utf-8'))
    for checkpoint in args.checkpoints:
        for entry in measure_new_words(cfg.copy(), checkpoint, data, words,
                                       args.embeddings, args.study,
                                       args.network, args.stride):
            ledger.append(entry)
            if entry['arm'].split(', ')[0] in (TRAINED, ALL_NEW, RANDOM):
                print(f'\n{checkpoint} {entry["arm"]}: {entry["val"]["mIoU"]}')


def mean(scores: Dict[int, float]) -> str:
    """Mean and standard deviation over the seeds."""
    values = list(scores.values())
    if not values:
        return '-'
    wide = f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else ''
    return f'{np.mean(values):.1f}{wide}'


def tables(entries: Sequence[Dict[str, Any]]) -> str:
    """Write the tables of one study and network."""
    # Of a seed that was not measured to its end, nothing: means of other
    # seeds could not be compared.
    first, arms = entries[0], {e['arm'] for e in entries}
    counts = Counter(e['seed'] for e in entries)
    entries = [e for e in entries if counts[e['seed']] == len(arms)]
    lost = sorted(set(counts) - {e['seed'] for e in entries})
    if lost:
        print(
            f'{first["study"]}, {first["network"]}: seeds {lost} are left '
            f'out, not all of their {len(arms)} lists were measured',
            file=sys.stderr)
    if not entries:
        raise ValueError(f'{first["study"]} has no seed with all of {arms}')
    part = Group(entries, 'val')
    rows: List[Tuple[str, ...]] = []
    for arm in part.arms:
        if ' -> ' not in arm:
            rows.append(
                (arm, str(len(part.arms[arm])), mean(part.scores(arm))))
    text = [
        f'### {first["study"]}, {first["network"]}',
        f'{first["images"]} images, pixels at stride {first["stride"]}.' +
        ('' if first.get('aligned') else SHIFTED),
        table(('words', 'seeds', 'mIoU'), rows)
    ]
    whole = {how: f'{ALL_NEW}, {how}' for how in NEW_WORDS}
    words = next(iter(part.arms[whole['unit']].values()))['words']
    rows = []
    for label, (name, word) in enumerate(zip(first['classes'], words)):
        alone = [f'{name} -> {word}, {how}' for how in ('unit', 'raw')]
        rows.append(
            (name, word,
             *(mean(part.scores(arm, label=label))
               for arm in (TRAINED, *alone, whole['unit'], whole['raw']))))
    text.append(
        table(('class', 'new word', 'IoU, trained name', 'this word new, unit',
               'raw', 'all new, unit', 'raw'), rows))
    return '\n\n'.join(text)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        if args.command == 'measure':
            measure(args)
            return
        parts: Dict[Tuple, List[Dict[str, Any]]] = {}
        for entry in Ledger(args.ledger).entries:
            # What was scored at other pixels makes no common mean.
            key = (entry['study'], entry['network'], entry['stride'],
                   entry.get('aligned'))
            parts.setdefault(key, []).append(entry)
        if not parts:
            raise ValueError(f'{args.ledger} has no entry.')
        page = PAGE.format(ledger=args.ledger.name) + '\n\n'.join(
            map(tables, parts.values())) + '\n'
        if args.out is None:
            print(page, end='')
        else:
            write_files({args.out: page.encode()})
    except (LedgerError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
