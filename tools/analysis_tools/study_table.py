# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make the page of a study from its ledger alone: tables and plots.

Nothing on the page is typed by hand. The same ledgers give the same page.
--overview puts the first table of the page into another page too, between the
lines "<!-- results: begin -->" and "<!-- results: end -->". --check writes
nothing and fails where page, plots or overview are not those of the ledgers.
"""
import argparse
import hashlib
import html
import io
import math
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('ledgers', nargs='+', type=Path, help='ledgers')
    parser.add_argument(
        '--out', type=Path, required=True, help='page to write (.md)')
    parser.add_argument(
        '--overview',
        type=Path,
        metavar='PAGE',
        help='another page (.md) whose marked part gets the first table')
    parser.add_argument(
        '--check', action='store_true', help='only compare with what is there')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from mmseg_textkd.study import Ledger, LedgerError
from mmseg_textkd.study.analysis import (Group, Interval, check_hypotheses,
                                         group, interval)
from mmseg_textkd.study.run import Run
from mmseg_textkd.utils.io import write_files
from mmseg_textkd.utils.report import table

NOTE = ('<!-- Made by tools/analysis_tools/study_table.py of {ledgers}; not '
        'to be edited. -->')
READING = '''How to read: mIoU in percent of the last checkpoint, mean ± \
standard deviation over the seeds. Differences are taken within a seed and \
given in percentage points as mean [95 % t-interval]; they are not corrected \
for the number of arms. **gain** and **loss** say that the interval lies on \
one side of 0, *open* that it does not: nothing is shown. Where \
"(registered)" follows, the two arms are those of a registered hypothesis, \
and the word is that of its test, corrected by Holm's method. "Last quarter" \
is what the val mIoU still rose in the last quarter of the training: where it \
is large, a difference may be one of speed alone. Rows of networks together \
take each network and seed as one value; they are for orientation, unless the \
registration asked for them. Seconds are those of the training, on a machine \
that may have been busy.'''
MARKS = ('<!-- results: begin -->\n\n', '\n\n<!-- results: end -->')
OVERVIEW = ('study', 'network', 'arm', 'runs', 'mIoU', 'baseline',
            'difference', 'control', 'difference')
# Okabe and Ito's, which also the color-blind tell apart; their yellow is too
# light for lines.
COLORS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00',
          '#56B4E9', '#8A6D00', '#999999', '#5B2A86')
KEY = 'ledger'  # of the text in a PNG that names the ledger's content


def difference(value: Optional[Interval], word: Optional[str] = None) -> str:
    """Write a difference with its interval, and by default how to read it."""
    if value is None:
        return '-'
    if math.isinf(value.low):
        return f'{value.mean:+.2f} (one seed)'
    text = f'{value.mean:+.2f} [{value.low:+.2f}, {value.high:+.2f}]'
    marks = dict(gain='**gain**', loss='**loss**', open='*open*')
    return f'{text} {marks[value.reading] if word is None else word}'.rstrip()


def spread(values: Tuple[float, Optional[float]]) -> str:
    """Write a mean with its standard deviation."""
    mean, deviation = values
    return f'{mean:.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')


class Study:
    """One study of the ledgers.

    Args:
        name (str): Its name.
        registrations (Sequence[dict]): Its registration and amendments.
        entries (Sequence[dict]): Its runs. Those that an amendment has taken
            out of the plan are left out.
    """

    def __init__(self, name: str, registrations: Sequence[Dict[str, Any]],
                 entries: Sequence[Dict[str, Any]]) -> None:
        self.name = name
        self.registrations = registrations
        self.plan = registrations[-1]
        planned = set(self.plan['planned'])
        named = {
            Run(e['network'], e['arm'], e['seed'], e['train_fraction']).name: e
            for e in entries
        }
        self.left = planned - set(named)
        self.entries = entries = [
            e for name, e in named.items() if name in planned
        ]
        self.baseline = self.plan['baseline']
        self.arms: Dict[str, str] = self.plan['arms']
        self.split = 'test' if all(e.get('test') for e in entries) else 'val'
        self.groups = group(entries, self.split)
        hypotheses = self.plan.get('hypotheses', [])
        # An early look decides nothing: looks at every seed would find more
        # than 5 % of what is not there.
        arms = {arm for pair in hypotheses for arm in pair[:2]}
        self.early = any(f'/{arm}/' in name for arm in arms
                         for name in self.left)
        there: Dict[Tuple[str, str], Set[str]] = {}
        for name in self.plan['planned']:
            network, arm, seed = name.split('/')
            share = seed.partition('_')[2]
            there.setdefault((network, share), set()).add(arm)
        number = sum({*pair[:2]} <= has for has in there.values()
                     for pair in hypotheses)
        parts = [*self.groups.values()]
        self.tests = dict(
            zip(parts, check_hypotheses(parts, hypotheses, number)))

    def title(self, key: Tuple[str, float]) -> str:
        """Name a group."""
        network, fraction = key
        if fraction == 1:
            return network
        return f'{network}, {fraction * 100:g} % of the training images'

    def ordered(self, part: Group) -> List[str]:
        """The arms of a group, in the order of the plan."""
        return [arm for arm in self.arms if arm in part.arms]

    def markdown(self, plots: Sequence[str]) -> str:
        """Write the section of the study."""
        first = self.registrations[0]
        parts = [self.plan['registration'].strip()]
        dates = f'Registered {first["registered"]}'
        if len(self.registrations) > 1:
            dates += ', amended ' + ', '.join(r['registered']
                                              for r in self.registrations[1:])
        parts.append(f'{dates}. {len(self.entries)} of '
                     f'{len(self.plan["planned"])} planned runs are done.'
                     f'\n\n{self.circumstances()}')
        parts.append(
            table(('arm', 'what'),
                  [(f'`{arm}`', what) for arm, what in self.arms.items()]))
        for key, part in self.groups.items():
            parts += [
                f'### {self.title(key)}',
                self.main_table(part),
                self.test_table(part),
                self.dataset_table(part),
                self.speeds(part), '#### By class',
                self.class_table(part)
            ]
        parts += [f'![{name}]({name})' for name in plots]
        return '\n\n'.join(part for part in parts if part)

    def overview(self) -> List[List[str]]:
        """Write a row for every arm that is neither baseline nor control."""
        rows = []
        for key, part in self.groups.items():
            for arm in self._tried(part):
                rows.append(self._row(self.title(key), arm, [part]))
        full = [part for (_, share), part in self.groups.items() if share == 1]
        for arm in dict.fromkeys(
                a for part in full for a in self._tried(part)):
            parts = [part for part in full if arm in part.arms]
            if len(parts) > 1:
                what = f'these {len(parts)} networks together'
                rows.append(self._row(what, arm, parts))
        return rows

    def _tried(self, part: Group) -> List[str]:
        others = (self.baseline, *self.plan['controls'])
        return [arm for arm in self.ordered(part) if arm not in others]

    def _row(self, what: str, arm: str, parts: Sequence[Group]) -> List[str]:
        """Compare an arm with the baseline and a control that is there.

        That of its name, as ``random-cls`` of ``text-cls``, or the first.
        """
        runs = sum(len(part.arms[arm]) for part in parts)
        one = parts[0] if len(parts) == 1 else None
        row = [
            self.plan['title'], what, f'`{arm}`',
            str(runs), f'{self.split} {spread(one.spread(arm))}' if one else ''
        ]
        own = arm.split('-')[1:]

        def is_other(control: str) -> Tuple[bool, bool]:
            # Not all networks have all controls.
            missing = all(control not in part.arms for part in parts)
            return missing, not own or control.split('-')[1:] != own

        controls = sorted(self.plan['controls'], key=is_other)
        for other in (self.baseline, *controls[:1]):
            known = one is not None and other in one.arms
            row += [
                f'`{other}`' +
                (f' {spread(one.spread(other))}' if known else ''),
                self.compare(parts, arm, other)
            ]
        return row + [''] * (len(OVERVIEW) - len(row))

    def compare(self,
                parts: Sequence[Group],
                arm: str,
                other: str,
                dataset: Optional[str] = None) -> str:
        """Write a difference; what was registered is read by its test."""
        word, pair = None, ({arm, other}, dataset)
        asked = [({*h[:2]}, (*h, None)[2])
                 for h in self.plan.get('hypotheses', [])]
        if len(parts) == 1 and pair in asked:
            words = [
                t.reading for t in self.tests[parts[0]]
                if ({t.better, t.worse}, t.dataset) == pair
            ]
            word = words[0] if words and not self.early else 'too early'
            mark = '*' if word in ('open', 'too early') else '**'
            word = f'{mark}{word}{mark} (registered)'
        found = [
            d for part in parts
            for d in part.differences(arm, other, dataset=dataset)
        ]
        return difference(interval(found), word)

    def circumstances(self) -> str:
        """Say with what and where the runs were made."""
        rows = []

        def row(what: str, values: Sequence[Any]) -> None:
            found = dict.fromkeys(str(v) for v in values if v is not None)
            if found:
                rows.append((what, '; '.join(found)))

        entries = self.entries
        row('device', [e['device'] for e in entries])
        row('runs side by side, threads each',
            [f'{e["jobs"]}, {e["threads"] or "default"}' for e in entries])
        row('size (height, width)', [e['size'] for e in entries])
        row('iterations',
            [f'{e["network"]} {e["iterations"]}' for e in entries])
        row('commit', [e['commit'] for e in entries])
        row('versions', [
            ', '.join(f'{k} {v}' for k, v in e['versions'].items())
            for e in entries
        ])
        for name in dict.fromkeys(k for e in entries for k in e['inputs']):
            row(f'SHA-256 of `{name}`',
                [e['inputs'].get(name, None) for e in entries])
        return table(('', ''), rows) if rows else ''

    def main_table(self, part: Group) -> str:
        """Write the table of the arms of a network."""
        references = [self.baseline, *self.plan['controls']]
        references = [arm for arm in references if arm in part.arms]
        splits = [self.split] + (['val'] if self.split != 'val' else [])
        rows = []
        for arm in self.ordered(part):
            runs = list(part.arms[arm].values())
            last = part.last_gain(arm)
            best = [e['best_val']['mIoU'] for e in runs if e['best_val']]
            rows.append([
                f'`{arm}`',
                str(len(runs)), *(spread(part.spread(arm, split))
                                  for split in splits),
                *('' if arm == other else self.compare([part], arm, other)
                  for other in references),
                f'{np.mean(best):.2f}' if best else '-',
                '-' if last is None else f'{last:+.2f}',
                f'{np.mean([e["train_seconds"] for e in runs]):.0f}',
                f'{max(e["peak_memory_mib"] for e in runs)}'
            ])
        return table(
            ('arm', 'seeds', *(f'{s} mIoU'
                               for s in splits), *(f'- `{other}`'
                                                   for other in references),
             'best val', 'last quarter', 'seconds', 'MiB'), rows)

    def test_table(self, part: Group) -> str:
        """Write the tests of what was registered."""
        header = ('hypothesis', 'seeds', f'difference in {self.split} mIoU',
                  'p', 'p by Holm', 'at 5 %')
        title = '#### Hypotheses'
        if self.early:
            title += ' (so far; decided when all runs of their arms are done)'
        return f'{title}\n\n' + table(header, [[
            f'`{t.better}` > `{t.worse}`' +
            (f' on {t.dataset}' if t.dataset else ''),
            str(t.difference.number),
            difference(t.difference,
                       word=''), f'{t.p:.4f}', f'{t.corrected:.4f}',
            'too early' if self.early else f'**{t.reading}**'
        ] for t in self.tests[part]]) if self.tests[part] else ''

    def speeds(self, part: Group) -> str:
        """Write how soon arms are where the baseline ends."""
        if not self.plan.get('hypotheses'):
            return ''
        rows = []
        for arm in self.ordered(part):
            speed = part.speed(arm, self.baseline)
            if speed is None:
                continue
            gain = speed.gain
            text = f'{gain.mean:.2f}'
            if arm != self.baseline and gain.number > 1:
                text += f' [{gain.low:.2f}, {gain.high:.2f}]'
            rows.append([
                f'`{arm}`', f'{speed.iterations:.0f}',
                f'{speed.reached} of {gain.number}', text
            ])
        return '' if not rows else '#### Speed\n\n' + table(
            ('arm', f'iterations to the last val mIoU of `{self.baseline}`',
             'reached', 'speed-up'), rows)

    def dataset_table(self, part: Group) -> str:
        """Write the mIoU of each data set, where there are several."""
        first = next(iter(part.arms[self.ordered(part)[0]].values()))
        names = list(first[self.split].get('datasets', {}))
        rows = []
        for arm in self.ordered(part):
            cells = [f'`{arm}`']
            for name in names:
                scores = list(part.scores(arm, dataset=name).values())
                wide = np.std(scores, ddof=1) if len(scores) > 1 else None
                cells.append(spread((np.mean(scores), wide)))
                cells.append('' if arm == self.baseline else self.
                             compare([part], arm, self.baseline, name))
            rows.append(cells)
        return '' if not names else '#### By data set\n\n' + table(
            ('arm', *(f'{cell}' for name in names
                      for cell in (f'{self.split} mIoU, {name}',
                                   f'- `{self.baseline}`'))), rows)

    def class_table(self, part: Group) -> str:
        """Write the table of the classes of a network."""
        arms = [a for a in self.ordered(part) if a != self.baseline]
        rows = []
        for label, name in enumerate(part.classes):
            scores = list(part.scores(self.baseline, label=label).values())
            rows.append([
                html.escape(name, quote=False),
                f'{np.mean(scores):.2f}' if scores else '-', *(difference(
                    part.difference(arm, self.baseline, label), word='')
                                                               for arm in arms)
            ])
        return table(
            ('IoU', f'`{self.baseline}`', *(f'`{arm}` - `{self.baseline}`'
                                            for arm in arms)), rows)

    # ------------------------------------------------------------ plots
    def style(self, arm: str) -> Dict[str, str]:
        """Color and marker of an arm with runs, the same in all figures."""
        done = {name for part in self.groups.values() for name in part.arms}
        i = [name for name in self.arms if name in done].index(arm)
        return dict(
            color=COLORS[i % len(COLORS)], marker='os^Dv'[i // len(COLORS)])

    def plot_seeds(self) -> Figure:
        """Draw a dot for each run; a line joins those of a seed."""
        figure, axes = self._panels(width=1.2 + .55 * len(self.arms))
        for axis, part in zip(axes, self.groups.values()):
            arms = self.ordered(part)
            seeds = sorted({s for arm in arms for s in part.arms[arm]})
            for seed in seeds:
                points = [(x, part.scores(arm)[seed])
                          for x, arm in enumerate(arms)
                          if seed in part.scores(arm)]
                line, = axis.plot(*zip(*points), color='.75', linewidth=.8)
            line.set_label('one seed')
            for x, arm in enumerate(arms):
                values = list(part.scores(arm).values())
                axis.plot(
                    [x] * len(values),
                    values,
                    linestyle='none',
                    markersize=5,
                    label=f'_{arm}',
                    **self.style(arm))
                axis.plot([x - .3, x + .3], [part.spread(arm)[0]] * 2,
                          color=self.style(arm)['color'],
                          linewidth=2.5)
            mean = Line2D([], [], color='.3', linewidth=2.5)
            axis.legend([line, mean], ['one seed', 'mean'], fontsize='small')
            axis.set_xticks(range(len(arms)), arms, rotation=45, ha='right')
            axis.set_ylabel(f'{self.split} mIoU (%)')
        return figure

    def plot_classes(self) -> Figure:
        """Draw the gain of each class over the baseline, with its interval."""
        others = max(1, len(self.arms) - 1)
        number = max(len(part.classes) for part in self.groups.values())
        figure, axes = self._panels(
            width=4.5, height=1.5 + number * (.2 + .08 * others))
        for axis, part in zip(axes, self.groups.values()):
            arms = [a for a in self.ordered(part) if a != self.baseline]
            step = .75 / max(len(arms), 1)
            for i, arm in enumerate(arms):
                gains = [
                    part.difference(arm, self.baseline, label)
                    for label in range(len(part.classes))
                ]
                known = [(y + step * (i - (len(arms) - 1) / 2), g)
                         for y, g in enumerate(gains) if g]
                axis.errorbar([g.mean for _, g in known],
                              [y for y, _ in known],
                              xerr=[
                                  0 if math.isinf(g.high) else g.high - g.mean
                                  for _, g in known
                              ],
                              linestyle='none',
                              elinewidth=1,
                              markersize=4,
                              label=arm,
                              **self.style(arm))
            for y in range(1, len(part.classes)):
                axis.axhline(y - .5, color='.9', linewidth=.8)
            axis.grid(False, axis='y')
            axis.set_yticks(range(len(part.classes)), part.classes)
            axis.set_ylim(len(part.classes) - .5, -.5)
            axis.axvline(0, color='k', linewidth=.8)
            axis.set_xlabel(f'{self.split} IoU - {self.baseline} (points)\n'
                            'mean and 95 % interval')
        self._legend(figure, without=self.baseline)
        return figure

    def plot_curves(self) -> Figure:
        """Draw the mean val mIoU over the training; a band is all seeds."""
        figure, axes = self._panels(width=4.5)
        for axis, part in zip(axes, self.groups.values()):
            for arm in self.ordered(part):
                # A run that was killed in its only validation has none.
                curves = [
                    dict(e['curve']) for e in part.arms[arm].values()
                    if e['curve']
                ]
                if not curves:
                    continue
                steps = sorted(set.intersection(*map(set, curves)))
                values = np.array([[c[s] for s in steps] for c in curves])
                style = self.style(arm)
                axis.fill_between(
                    steps,
                    values.min(0),
                    values.max(0),
                    color=style['color'],
                    alpha=.12,
                    linewidth=0)
                axis.plot(
                    steps,
                    values.mean(0),
                    markersize=3,
                    label=arm,
                    **self.style(arm))
            axis.set_xlabel('iteration')
            axis.set_ylabel('val mIoU (%), mean and all seeds')
        self._legend(figure)
        return figure

    def _legend(self, figure: Figure, without: str = '') -> None:
        """Name all arms of the figure, once."""
        handles = {}
        for axis in figure.axes:
            for handle, arm in zip(*axis.get_legend_handles_labels()):
                handles.setdefault(arm, handle)
        arms = [arm for arm in self.arms if arm in handles and arm != without]
        if arms:
            figure.legend([handles[arm] for arm in arms],
                          arms,
                          loc='outside lower center',
                          ncols=min(len(arms), 2 * len(self.groups)),
                          fontsize='small')

    def _panels(self,
                width: float,
                height: float = 4.5) -> Tuple[Figure, List[Any]]:
        """Get a figure with a panel for each group."""
        number = len(self.groups)
        figure = Figure(
            figsize=(max(width, 3.5) * number, height), layout='constrained')
        axes = figure.subplots(1, number, squeeze=False)[0]
        for axis, key in zip(axes, self.groups):
            axis.set_title(self.title(key), fontsize='medium')
            axis.grid(alpha=.3)
        return figure, list(axes)


def read_studies(ledgers: Sequence[Ledger]) -> List[Study]:
    """Sort what is in the ledgers by study."""
    registrations: Dict[str, List[Dict[str, Any]]] = {}
    entries: Dict[str, List[Dict[str, Any]]] = {}
    for ledger in ledgers:
        for name in ledger.studies:
            if name in registrations:
                raise LedgerError(f'{name} is in two ledgers.')
            registrations[name] = ledger.registrations(name)
        for entry in ledger.entries:
            entries.setdefault(entry['study'], []).append(entry)
    for name in entries:
        if name not in registrations:
            raise LedgerError(f'{name} has runs but was not registered.')
    return [
        Study(name, found, entries.get(name, []))
        for name, found in registrations.items()
    ]


def render(figure: Figure, digest: str) -> bytes:
    """Write a figure as PNG, with nothing in it that changes."""
    data = io.BytesIO()
    figure.savefig(
        data, format='png', dpi=110, metadata={
            'Software': None,
            KEY: digest
        })
    return data.getvalue()


def insert(page: Path, text: str) -> bytes:
    """Put text between the marks of a page.

    Args:
        page (Path): The page, which is not written.
        text (str): The text.

    Returns:
        bytes: The new content.

    Raises:
        ValueError: If there is no page or it does not have the marks.
    """
    begin, end = MARKS
    old = page.read_text(encoding='utf-8') if page.is_file() else ''
    if old.count(begin) != 1 or end not in old.split(begin)[1]:
        raise ValueError(
            f'{page} needs one line "{begin.strip()}", and below '
            f'it "{end.strip()}", with an empty line inside each.')
    head, rest = old.split(begin)
    tail = rest.split(end, 1)[1]
    return f'{head}{begin}{text}{end}{tail}'.encode()


def make(paths: Sequence[Path],
         out: Path,
         readme: Optional[Path] = None) -> Dict[Path, bytes]:
    """Make the page and its plots.

    Args:
        paths (Sequence[Path]): The ledgers.
        out (Path): The page. Plots lie beside it.
        readme (Path, optional): Another page, which gets the first table.
            Defaults to None.

    Returns:
        dict[Path, bytes]: Contents by path.
    """
    for path in paths:
        if not path.is_file():
            raise LedgerError(f'there is no ledger {path}.')
    digest = hashlib.sha256(b''.join(p.read_bytes() for p in paths))
    studies = read_studies([Ledger(path) for path in paths])
    files: Dict[Path, bytes] = {out: b''}  # named first
    sections = []
    for study in studies:
        plots = {
            f'{study.name}_seeds.png': study.plot_seeds,
            f'{study.name}_classes.png': study.plot_classes,
            f'{study.name}_curves.png': study.plot_curves
        } if study.entries else {}
        for name, plot in plots.items():
            files[out.parent / name] = render(plot(), digest.hexdigest())
        title = study.plan['title'] if len(studies) > 1 else 'The study'
        sections += [f'## {title}', study.markdown(list(plots))]
    ledgers = ', '.join(path.name for path in paths)
    rows = [row for study in studies for row in study.overview()]
    first = [table(OVERVIEW, rows)] if rows else []
    page = '\n\n'.join([
        NOTE.format(ledgers=ledgers),
        '# ' + '; '.join(study.plan['title'] for study in studies), READING,
        *first, *sections
    ])
    files[out] = (page + '\n').encode()
    if readme is not None:
        files[readme] = insert(readme, '\n\n'.join(first))
    return files


def outdated(path: Path, data: bytes) -> bool:
    """Whether a file is not what it should be."""
    if not path.is_file():
        return True
    if path.suffix != '.png':
        return path.read_bytes() != data
    # Another Matplotlib draws other pixels: the ledger is what counts.
    own, new = (
        Image.open(io.BytesIO(d)).text.get(KEY)
        for d in (path.read_bytes(), data))
    return own != new


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write or check the page."""
    args = parse_args(argv)
    try:
        files = make(args.ledgers, args.out, args.overview)
    except ValueError as error:
        sys.exit(f'study_table: {error}')
    if not args.check:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_files(files)
        print('\n'.join(f'wrote {path}' for path in files))
        return
    old = [path.name for path, data in files.items() if outdated(path, data)]
    if old:
        sys.exit(f'study_table: {", ".join(old)} not as the ledgers have it; '
                 'run without --check.')


if __name__ == '__main__':
    main()
