# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Iterable, Tuple

from torch import Tensor

from .export import Exported
from .exportable import ExportableSegmentor

TOLERANCE = 1e-4


def check(name: str, network: ExportableSegmentor, exported: Exported,
          images: Iterable[Tensor]) -> str:
    """Compare an export with PyTorch.

    Scores may differ by 1e-4 (of the largest, if that is above 1), classes
    only where the two best scores are nearer to each other than that.

    Args:
        name (str): What the images are.
        network (ExportableSegmentor): The network.
        exported (Exported): The same in another format.
        images (Iterable[Tensor]): Inputs.

    Returns:
        str: One line with the largest difference.

    Raises:
        ValueError: If they differ by more, something is not finite, or it
            does not run.
    """
    worst = largest = allowed_there = 0.
    differing = pixels = 0
    for image in images:
        expected = network.reference(image)
        if network.output == 'probabilities':
            expected = expected.softmax(1)
        if not expected.isfinite().all():
            raise ValueError(f'{name}: PyTorch itself predicts NaN or '
                             'infinite logits.')
        scores, labels = _run(name, network, exported, image)
        top = expected.abs().max().item()
        allowed = TOLERANCE * max(1., top)
        if scores is not None:
            _same_shape(name, scores, expected)
            difference = (scores - expected).abs().max().item()
            # Written so that NaN is not near.
            if not difference <= allowed:
                raise ValueError(
                    f'{name}: the export is not the network: it differs by '
                    f'{difference:.2g} from scores of up to {top:.3g} '
                    f'(allowed: {allowed:.2g}).')
            if difference >= worst:
                worst, largest, allowed_there = difference, top, allowed
        _same_shape(name, labels, expected[:, 0])
        best = expected.topk(2, dim=1).values
        other = labels != expected.argmax(1)
        clear = int((other & (best[:, 0] - best[:, 1] >= allowed)).sum())
        if clear:
            raise ValueError(
                f'{name}: the export is not the network: another class at '
                f'{clear} pixels whose two best scores differ by more than '
                f'{allowed:.2g}.')
        differing += int(other.sum())
        pixels += other.numel()
    line = f'{name}: '
    if scores is not None:
        line += (f'scores differ by at most {worst:.2g}, with scores of up to '
                 f'{largest:.3g} (allowed: {allowed_there:.2g}); ')
    return line + (
        f'another class at {differing} of {pixels} pixels' +
        (', all of them ties within what is allowed' * bool(differing)))


def _run(name: str, network: ExportableSegmentor, exported: Exported,
         image: Tensor) -> Tuple['Tensor | None', Tensor]:
    """Get scores, if they are an output, and labels of the export."""
    try:
        output, scores = exported.run(image)
    except Exception as error:  # each runtime has its own
        raise ValueError(f'{name}: what was exported does not run: '
                         f'{error}') from error
    if network.output == 'argmax':
        return scores, output
    return output, output.argmax(1)


def _same_shape(name: str, got: Tensor, expected: Tensor) -> None:
    """Require an output of the same shape."""
    if got.shape != expected.shape:
        raise ValueError(f'{name}: the export has an output of shape '
                         f'{tuple(got.shape)} instead of '
                         f'{tuple(expected.shape)}.')
