# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Iterator, List, Mapping, Optional

import torch
from mmengine.dataset import ConcatDataset, InfiniteSampler
from mmseg.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class BalancedDatasetSampler(InfiniteSampler):
    """Endless samples of several data sets, each with its share.

    Each sample is of a data set that is drawn anew, whatever the sizes, so
    that batches mix them; within a data set the images come in random order,
    all of them before one comes again. As with ``InfiniteSampler`` the order
    follows from the seed alone, over all processes, and a resumed run goes on
    where it was.

    Args:
        dataset (ConcatDataset): Data sets, such as a :class:`MultiDataset`.
        weights (Mapping[str, float], optional): Shares of the data sets by
            their names, which need not sum to 1; 0 leaves one out. Defaults
            to None: all the same.
        **kwargs: ``seed`` and ``shuffle`` (True alone) of
            ``InfiniteSampler``.

    Raises:
        TypeError: If the data set is not several ones.
        ValueError: If the weights do not fit, a data set with a share is
            empty, or ``shuffle`` is False.
    """

    def __init__(self,
                 dataset: ConcatDataset,
                 weights: Optional[Mapping[str, float]] = None,
                 **kwargs: Any) -> None:
        if not isinstance(dataset, ConcatDataset):
            raise TypeError('BalancedDatasetSampler is for several data sets '
                            f'(MultiDataset), but got {type(dataset)}.')
        super().__init__(dataset, **kwargs)
        if not self.shuffle:
            raise ValueError('BalancedDatasetSampler draws at random; use '
                             'DefaultSampler for all images in their order.')
        self.sizes = [len(part) for part in dataset.datasets]
        names = getattr(dataset, 'names', list(range(len(self.sizes))))
        shares = dict.fromkeys(names, 1.) if weights is None else weights
        if set(shares) != set(names) or min(
                shares.values()) < 0 or not sum(shares.values()) > 0:
            raise ValueError(f'`weights` must be a share for each of {names}, '
                             f'not negative and not all 0, but are {shares}.')
        self.shares = torch.tensor([float(shares[name]) for name in names])
        empty = [
            name for name, size, share in zip(names, self.sizes, self.shares)
            if share > 0 and not size
        ]
        if empty:
            raise ValueError(f'the data sets {empty} have no image.')

    def _infinite_indices(self) -> Iterator[int]:
        """Yield indices over all data sets, the same in each process."""
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        starts = [0, *self.dataset.cumulative_sizes]
        waiting: List[List[int]] = [[] for _ in self.sizes]
        while True:
            drawn = torch.multinomial(
                self.shares, 64, replacement=True, generator=generator)
            for number in drawn.tolist():
                if not waiting[number]:
                    waiting[number] = torch.randperm(
                        self.sizes[number], generator=generator).tolist()
                yield starts[number] + waiting[number].pop()
