# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Statistics of a ledger: means, spreads, paired differences and tests."""
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

from .ledger import LedgerError

Entry = Dict[str, Any]
# Of the iterations, over which the last gain of a learning curve is taken.
LAST_PART = 0.25


class Interval(NamedTuple):
    """A mean with its 95 % t-interval."""
    mean: float
    low: float
    high: float
    number: int

    @property
    def reading(self) -> str:
        """str: 'gain' or 'loss' where the interval lies on one side of 0."""
        return 'gain' if self.low > 0 else 'loss' if self.high < 0 else 'open'


def interval(values: Sequence[float]) -> Optional[Interval]:
    r"""Get the mean and its 95 % interval by Student's t.

    :math:`\bar d \pm t_{0.975, n-1}\, s / \sqrt n`, with s the sample standard
    deviation.

    Args:
        values (Sequence[float]): Differences, one for each seed.

    Returns:
        Interval, optional: None without a value; with one value the bounds
        are infinite.
    """
    if not len(values):
        return None
    mean, number = float(np.mean(values)), len(values)
    if number == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(
        stats.t.ppf(0.975, number - 1) * np.std(values, ddof=1) /
        math.sqrt(number))
    return Interval(mean, mean - half, mean + half, number)


class Tested(NamedTuple):
    """A registered hypothesis: that one arm is better than another."""
    better: str
    worse: str
    difference: Interval
    p: float  # of the two-sided paired t-test
    corrected: float  # by Holm's method over all hypotheses of the study
    dataset: Optional[str] = None  # of which it is, if of one of several

    @property
    def reading(self) -> str:
        """str: 'shown', 'the opposite' or 'open', at 5 % after correction."""
        if not self.corrected < 0.05:
            return 'open'
        return 'shown' if self.difference.mean > 0 else 'the opposite'


def holm(values: Sequence[float]) -> List[float]:
    """Correct p-values for their number.

    Source: Holm, `A Simple Sequentially Rejective Multiple Test Procedure
    <https://www.jstor.org/stable/4615733>`_: the smallest is multiplied by
    their number m, the next by m - 1, and none is less than one before it.

    Args:
        values (Sequence[float]): p-values.

    Returns:
        list[float]: Corrected ones, at most 1, in the same order.
    """
    corrected, last = [0.] * len(values), 0.
    for rank, i in enumerate(np.argsort(values, kind='stable')):
        last = max(last, min(1., (len(values) - rank) * values[i]))
        corrected[i] = last
    return corrected


def iterations_to(curve: Sequence[Sequence[float]],
                  target: float) -> Optional[float]:
    """Find where a learning curve first reaches a value.

    Args:
        curve (Sequence[Sequence[float]]): [iteration, value] pairs in their
            order; a straight line lies between two of them.
        target (float): The value.

    Returns:
        float, optional: The iteration, not before the first pair; None if it
        is not reached.
    """
    for i, (step, value) in enumerate(curve):
        if value >= target:
            if not i:
                return float(step)
            (start, low) = curve[i - 1]
            return start + (step - start) * (target - low) / (value - low)
    return None


class Speed(NamedTuple):
    """Training time of an arm to the final score of the baseline."""
    iterations: float  # mean over the seeds
    reached: int  # seeds in which it reaches that score
    gain: Interval  # geometric mean of the ratios to the baseline's own


class Group:
    """The runs of one network on one share of the training images.

    Args:
        entries (Sequence[dict]): Entries of the ledger.
        split (str): What is compared on, 'val' or 'test'.
    """

    def __init__(self, entries: Sequence[Entry], split: str) -> None:
        self.split = split
        self.arms: Dict[str, Dict[int, Entry]] = {}
        for entry in entries:
            self.arms.setdefault(entry['arm'], {})[entry['seed']] = entry
        self.classes: List[str] = entries[0]['classes']

    def scores(self,
               arm: str,
               split: Optional[str] = None,
               label: Optional[int] = None,
               dataset: Optional[str] = None) -> Dict[int, float]:
        """Get the scores of an arm.

        Args:
            arm (str): The arm.
            split (str, optional): 'val' or 'test'. Defaults to None: that of
                the group.
            label (int, optional): Index of a class, for its IoU. Defaults to
                None: mIoU.
            dataset (str, optional): Name of a data set, for its mIoU alone.
                Defaults to None: all that the run was measured on.

        Returns:
            dict[int, float]: Percent, by seed; classes that are not in the
            images have none.

        Raises:
            LedgerError: If there is no such data set.
        """
        scores = {}
        for seed, entry in sorted(self.arms.get(arm, {}).items()):
            result = entry[split or self.split]
            if dataset is not None:
                parts = result.get('datasets') or {}
                if dataset not in parts:
                    raise LedgerError(
                        f'a hypothesis is about the data set {dataset!r}, but '
                        f'{arm} was measured on {list(parts) or "one alone"}.')
                result = parts[dataset]
            value = result['mIoU'] if label is None else result['IoU'][label]
            if value is not None:
                scores[seed] = value
        return scores

    def spread(self,
               arm: str,
               split: Optional[str] = None) -> Tuple[float, Optional[float]]:
        """Get mean and sample standard deviation over the seeds.

        Args:
            arm (str): The arm.
            split (str, optional): As of :meth:`scores`. Defaults to None.

        Returns:
            tuple[float, float or None]: Percent; no deviation of one seed.
        """
        values = list(self.scores(arm, split).values())
        deviation = np.std(values, ddof=1) if len(values) > 1 else None
        return float(np.mean(values)), deviation

    def differences(self,
                    arm: str,
                    other: str,
                    label: Optional[int] = None,
                    dataset: Optional[str] = None) -> List[float]:
        """Compare two arms within the seeds that both have.

        Args:
            arm (str): The arm.
            other (str): What it is compared with.
            label (int, optional): Index of a class. Defaults to None: mIoU.
            dataset (str, optional): As of :meth:`scores`. Defaults to None.

        Returns:
            list[float]: One for each seed, in percentage points.
        """
        ours, theirs = (
            self.scores(a, label=label, dataset=dataset) for a in (arm, other))
        return [ours[s] - theirs[s] for s in ours if s in theirs]

    def difference(self,
                   arm: str,
                   other: str,
                   label: Optional[int] = None,
                   dataset: Optional[str] = None) -> Optional[Interval]:
        """Summarize :meth:`differences`.

        Args:
            arm (str): The arm.
            other (str): What it is compared with.
            label (int, optional): Index of a class. Defaults to None: mIoU.
            dataset (str, optional): As of :meth:`scores`. Defaults to None.

        Returns:
            Interval, optional: Of the differences in percentage points; None
            without a common seed.
        """
        return interval(self.differences(arm, other, label, dataset))

    def speed(self, arm: str, baseline: str) -> Optional[Speed]:
        """Compare the iterations to the final val mIoU of the baseline.

        Paired by seed. An arm that does not reach it counts with the length
        of the longer of both runs; the baseline with the first iteration that
        reaches it.

        Args:
            arm (str): The arm.
            baseline (str): The baseline.

        Returns:
            Speed, optional: None without a common seed, of which both have a
            curve.
        """
        steps, ratios, reached = [], [], 0
        for seed, entry in self.arms.get(arm, {}).items():
            other = self.arms.get(baseline, {}).get(seed)
            if other is None or not (entry['curve'] and other['curve']):
                continue
            target = other['curve'][-1][1]
            own = iterations_to(entry['curve'], target)
            reached += own is not None
            # A shorter run that does not get there is not faster.
            longest = max(entry['iterations'], other['iterations'])
            steps.append(longest if own is None else own)
            ratios.append(iterations_to(other['curve'], target) / steps[-1])
        gain = interval(np.log(ratios))
        if gain is None:
            return None
        low, mean, high = np.exp([gain.low, gain.mean, gain.high])
        return Speed(
            float(np.mean(steps)), reached,
            Interval(float(mean), float(low), float(high), gain.number))

    def last_gain(self, arm: str) -> Optional[float]:
        """Get the rise of the val mIoU in the last quarter of the training.

        Args:
            arm (str): The arm.

        Returns:
            float, optional: Mean over the seeds of last value minus value at
            three quarters of the run, on a straight line between validations,
            in percentage points; None where there was none by then.
        """
        gains = []
        for entry in self.arms[arm].values():
            limit = (1 - LAST_PART) * entry['iterations']
            steps, values = zip(*entry['curve'] or [(math.inf, 0.)])
            if steps[0] <= limit:
                gains.append(values[-1] - np.interp(limit, steps, values))
        return float(np.mean(gains)) if gains else None


def check_hypotheses(parts: Sequence[Group],
                     hypotheses: Sequence[Sequence[str]],
                     number: Optional[int] = None) -> List[List[Tested]]:
    """Test the registered hypotheses, with Holm's correction over all.

    In each group, on the seeds that have all arms of the hypotheses that it
    has runs for. One that cannot be tested yet counts in the correction, with
    a p-value of 1.

    Args:
        parts (Sequence[Group]): The groups of a study.
        hypotheses (Sequence[Sequence[str]]): Pairs of arms, the better one
            first, and where it is about one of several data sets its name.
        number (int, optional): Number of tests that are planned. Defaults to
            None: each hypothesis in each group.

    Returns:
        list[list[Tested]]: For each group one for each of its hypotheses;
        none with fewer than two such seeds.
    """
    found: List[List[Tested]] = []
    values: List[float] = []
    for part in parts:
        pairs = [(*p, None)[:3] for p in hypotheses
                 if {*p[:2]} <= {*part.arms}]
        scores = {
            (arm, dataset): part.scores(arm, dataset=dataset)
            for *pair, dataset in pairs
            for arm in pair
        }
        seeds = sorted(set.intersection(*map(set, scores.values()))) \
            if pairs else []
        found.append([])
        for better, worse, on in pairs if len(seeds) > 1 else []:
            ours, theirs = scores[better, on], scores[worse, on]
            gains = [ours[s] - theirs[s] for s in seeds]
            values.append(float(stats.ttest_1samp(gains, 0).pvalue))
            found[-1].append(
                Tested(better, worse, interval(gains), values[-1], 1., on))
    if number is None:
        number = len(parts) * len(hypotheses)
    corrected = iter(holm(values + [1.] * (number - len(values))))
    return [[t._replace(corrected=next(corrected)) for t in tests]
            for tests in found]


def group(entries: Sequence[Entry],
          split: str) -> Dict[Tuple[str, float], Group]:
    """Sort entries of one study by network and share of the images.

    Args:
        entries (Sequence[dict]): Entries of the ledger.
        split (str): What is compared on.

    Returns:
        dict[tuple[str, float], Group]: By network, in the order of the
        entries, and by share, the largest first.
    """
    parts: Dict[Tuple[str, float], List[Entry]] = {}
    networks = list(dict.fromkeys(e['network'] for e in entries))
    for entry in entries:
        key = (entry['network'], entry['train_fraction'])
        parts.setdefault(key, []).append(entry)
    order = sorted(parts, key=lambda k: (networks.index(k[0]), -k[1]))
    return {key: Group(parts[key], split) for key in order}
