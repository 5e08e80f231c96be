# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""One training of a study, and its share of the images."""
from dataclasses import dataclass
from typing import List

import numpy as np


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
        network (str): Name of the network in the study.
        arm (str): Name of the arm in the study.
        seed (int): Seed of weights, order and augmentation.
        train_fraction (float): Share of the training images, in (0, 1].
    """
    network: str
    arm: str
    seed: int
    train_fraction: float = 1.

    @property
    def name(self) -> str:
        """str: Its name; also its folder below the work directory."""
        name = f'{self.network}/{self.arm}/seed{self.seed}'
        if self.train_fraction != 1:
            name += f'_{self.train_fraction * 100:g}%'
        return name


def subset(length: int, run: Run) -> List[int]:
    """Draw the training images of a run that has not all of them.

    Args:
        length (int): Number of images.
        run (Run): The run. All arms and networks of a seed get the same
            images, and more images contain the fewer.

    Returns:
        list[int]: Their indices, sorted; at least one.
    """
    order = np.random.default_rng(run.seed).permutation(length)
    number = max(1, round(length * run.train_fraction))
    return sorted(order[:number].tolist())
