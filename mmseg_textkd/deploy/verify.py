# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmseg.models import BaseSegmentor
from torch import Tensor, nn

from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.models.layers.text_classifier import as_folded
from ..utils.checkpoint import build_network
from ..utils.progress import track
from ..utils.report import Cost, count_cost

Size = Tuple[int, int]
# Height and width of the random inputs: one that the usual strides divide,
# and one that they do not.
SIZES: Tuple[Size, Size] = ((128, 256), (184, 312))
SEED = 0


class Agreement(NamedTuple):
    """Difference between two models on some inputs.

    Attributes:
        inputs (str): What they were.
        max_difference (float): Largest absolute difference of two logits.
        max_logit (float): Largest absolute logit of the first model.
        differing (int): Pixels with another class, at full resolution.
        pixels (int): All pixels.
    """
    inputs: str
    max_difference: float
    max_logit: float
    differing: int
    pixels: int

    @property
    def relative(self) -> float:
        """float: Largest difference over the largest logit."""
        # Logits that are all zero have no scale of their own.
        return self.max_difference / (self.max_logit or 1.)

    @property
    def share(self) -> float:
        """float: Share of the pixels with another class."""
        return self.differing / self.pixels

    def __str__(self) -> str:
        return (f'{self.inputs}: max |difference of logits| '
                f'{self.max_difference:.2g}, relative {self.relative:.2g} '
                f'(largest logit {self.max_logit:.3g}); another class at '
                f'{self.differing} of {self.pixels} pixels '
                f'({100 * self.share:.4f} %)')


class Report(NamedTuple):
    """Result of :func:`verify`.

    Attributes:
        agreements (list[Agreement]): By kind of inputs.
        costs (dict[str, Cost]): Of the network 'as trained' and of the
            'folded' one, for one input of ``SIZES[0]``.
    """
    agreements: List[Agreement]
    costs: Dict[str, Cost]

    def __str__(self) -> str:
        lines = [
            f'{name}: {cost.params} parameters, {cost.flops / 1e9:.4f} GFLOPs '
            f'at {SIZES[0][0]}x{SIZES[0][1]}'
            for name, cost in self.costs.items()
        ]
        return '\n'.join([*lines, *map(str, self.agreements)])


@torch.no_grad()
def verify(model: nn.Module,
           cfg: Config,
           state_dict: Dict[str, Tensor],
           batches: Sequence[dict] = (),
           tolerance: Optional[float] = 1e-4) -> Report:
    """Compare a model with the stock model that it was folded into.

    The stock model is built from its config, loaded strictly, and compared on
    random inputs of two sizes and on the images that are given. SegNeXt's
    head draws random numbers; both models draw the same. A model with a
    balance, or that rounds to half precision, which no stock model does, is
    compared without that.

    Args:
        model (nn.Module): The model as trained, in evaluation mode.
        cfg (Config): The stock config.
        state_dict (dict[str, Tensor]): The folded weights.
        batches (Sequence[dict]): Images, as a data loader yields them.
            Defaults to ().
        tolerance (float, optional): Largest relative difference of logits.
            None: whatever it is. Defaults to 1e-4.

    Returns:
        Report: The figures.

    Raises:
        RuntimeError: If the weights do not fit the stock model.
        ValueError: If the models differ by more than the tolerance; with the
            figures.
    """
    stock = build_network(cfg.model).to(next(model.parameters())).eval()
    stock.load_state_dict(state_dict, strict=True)
    models = model, stock
    costs = {
        name: count_cost(m, partial(_logits, m, SIZES[0]))
        for name, m in zip(('as trained', 'folded'), models)
    }
    with as_folded(model):
        agreements = [
            _compare(f'random {size[0]}x{size[1]}', models, [size])
            for size in SIZES
        ]
        if batches:
            number = sum(len(batch['inputs']) for batch in batches)
            agreements.append(_compare(f'{number} images', models, batches))
    report = Report(agreements, costs)
    # Written so that NaN counts as a difference.
    if tolerance is not None and not all(a.relative <= tolerance
                                         for a in agreements):
        raise ValueError(
            'the folded network does not predict what the trained one '
            f'predicts (tolerance {tolerance:g}, relative):\n{report}')
    return report


def _logits(model: BaseSegmentor, source: Union[Size, dict]) -> List[Tensor]:
    """Logits (K, H, W) of a random input of that size, or of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        if isinstance(source, dict):
            # A copy: the results are written into the samples.
            source = copy.deepcopy(source)
            if model.out_channels > 1:
                samples = model.test_step(source)
                return [sample.seg_logits.data for sample in samples]
            # The results would be probabilities.
            inputs = model.data_preprocessor(source, False)['inputs']
        else:
            inputs = torch.randn(1, input_channels(model), *source)
        inputs = inputs.to(next(model.parameters()))
        size = tuple(inputs.shape[2:])
        metas = [dict(img_shape=size, ori_shape=size, pad_shape=size)]
        return list(model.encode_decode(inputs, metas * len(inputs)))


def _labels(model: BaseSegmentor, logits: Tensor) -> Tensor:
    """Labels (H, W) of logits (K, H, W), as MMSegmentation decides."""
    if len(logits) > 1:
        return logits.argmax(0)
    return logits[0].sigmoid() > model.decode_head.threshold


def _compare(inputs: str, models: Tuple[nn.Module, nn.Module],
             sources: Sequence[Union[Size, dict]]) -> Agreement:
    difference, largest, differing, pixels = 0., 0., 0, 0
    for source in track(sources, 'Comparing', 'batch', show=len(sources) > 1):
        for expected, got in zip(*(_logits(m, source) for m in models)):
            gap = (got - expected).abs().max().item()
            # Python's max() would lose a NaN.
            difference = gap if not gap <= difference else difference
            largest = max(largest, expected.abs().max().item())
            wrong = _labels(models[1], got) != _labels(models[1], expected)
            differing += int(wrong.sum())
            pixels += wrong.numel()
    return Agreement(inputs, difference, largest, differing, pixels)
