# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make the runs of a study: arms x networks x seeds.

Each run is an ordinary config that tools/train.py trains in a process of its
own. A finished run is a line in the ledger and is never made again; one that
was stopped or killed goes on from its last checkpoint. Exit status: 0 all
runs are in the ledger, 1 some failed, 2 the study cannot be run as it is
written, 3 the budget ended before the runs did.
"""
import argparse
import sys
import time
from pathlib import Path
from typing import Dict, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('study', type=Path, help='study (.yaml)')
    parser.add_argument(
        '--vars',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME=VALUE',
        help='paths of data and embeddings that the study calls ${NAME}')
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='folder of logs and checkpoints (default: work_dirs/STUDY)')
    parser.add_argument(
        '--ledger',
        type=Path,
        help='file of finished runs (default: ledger.jsonl in --work-dir)')
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs side by side (default: 1)')
    parser.add_argument(
        '--budget', type=float, metavar='SECONDS', help='stop after this time')
    parser.add_argument(
        '--commit', help='commit to write down where there is no Git')
    parser.add_argument(
        '--drop-checkpoints',
        action='store_true',
        help='remove the checkpoints of finished runs')
    parser.add_argument(
        '--dry-run', action='store_true', help='only list the runs')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error('--jobs must be at least 1')
    return args


def split_vars(words: Sequence[str]) -> Dict[str, str]:
    """Read NAME=VALUE."""
    for word in words:
        if '=' not in word:
            sys.exit(f'--vars {word}: write NAME=VALUE.')
    return dict(word.split('=', 1) for word in words)


def say(text: str) -> None:
    """Print with the time, at once."""
    print(f'{time.strftime("%H:%M:%S")} {text}', flush=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the runs; returns the exit status."""
    args = parse_args(argv)  # before what takes seconds to import
    from mmseg_textkd.study import Ledger, LedgerError, Study, StudyError
    from mmseg_textkd.study.scheduler import Scheduler
    try:
        study = Study.load(args.study, split_vars(args.vars))
        work_dir = args.work_dir or Path('work_dirs') / study.name
        ledger = Ledger(args.ledger or work_dir / 'ledger.jsonl')
        if args.dry_run:
            for run in study.runs():
                study.config(run, resolved=False)
                done = ledger.find(study.name, run) is not None
                print(f'{"done" if done else "    "} {run.name}, '
                      f'{study.iterations(run)} iterations')
            return 0
        scheduler = Scheduler(
            study,
            ledger,
            work_dir,
            ROOT,
            jobs=args.jobs,
            budget=args.budget,
            commit=args.commit,
            drop_checkpoints=args.drop_checkpoints,
            say=say)
        left = scheduler.work()
    except (LedgerError, StudyError) as error:
        print(f'study: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f'study: cannot write: {error}. Make room, or the file or folder '
            'writable, and start again: what is finished is kept.',
            file=sys.stderr)
        return 2
    say(f'{len(scheduler.runs) - len(left)} of {len(scheduler.runs)} runs are '
        f'in {ledger.path}, {len(scheduler.failed)} failed')
    if scheduler.failed:
        return 1
    return 3 if left else 0


if __name__ == '__main__':
    if sys.argv[1:2] == ['--make']:  # the process of one run
        from mmseg_textkd.study.measure import make_run
        make_run(Path(sys.argv[2]), sys.argv[3:], ROOT / 'tools' / 'train.py')
    else:
        sys.exit(main())
