# Copyright (c) mmseg_textkd contributors. All rights reserved.
import math


class StageSchedule:
    """Factor on the learning rates over the iterations of a stage.

    A pure function of the iteration, so that it needs no state of its own
    in a checkpoint.

    Args:
        type (str): 'constant', 'cosine' (down to 0) or 'poly' (power 0.9).
            Defaults to 'constant'.
        warmup_iters (int): Iterations of a linear rise from 0. Defaults to 0.

    Raises:
        ValueError: If the type is unknown or ``warmup_iters`` negative.
    """

    TYPES = ('constant', 'cosine', 'poly')

    def __init__(self, type: str = 'constant', warmup_iters: int = 0) -> None:
        if type not in self.TYPES:
            raise ValueError(f'unknown schedule {type!r} for stage 2; choose '
                             f'one of {self.TYPES}.')
        if warmup_iters < 0:
            raise ValueError('`warmup_iters` must not be negative, but got '
                             f'{warmup_iters}.')
        self.type = type
        self.warmup_iters = warmup_iters

    def factor(self, iteration: int, length: int) -> float:
        """Get the factor of one iteration.

        Args:
            iteration (int): Iteration within the stage, from 0.
            length (int): Number of iterations of the stage.

        Returns:
            float: In [0, 1].
        """
        warmup = 1.
        if iteration < self.warmup_iters:
            warmup = (iteration + 1) / self.warmup_iters
        progress = iteration / length
        if self.type == 'cosine':
            return warmup * 0.5 * (1 + math.cos(math.pi * progress))
        if self.type == 'poly':
            return warmup * (1 - progress)**0.9
        return warmup
