# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from mmseg.models import BaseSegmentor, SegDataPreProcessor
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_textkd.compat import swaps_channels
from mmseg_textkd.models.input_channels import input_channels

Size = Tuple[int, int]


class ExportableSegmentor(nn.Module):
    """Segmentor with a single tensor as input and output, for exporters.

    Auxiliary heads are not run, and sliding windows (``test_cfg`` with
    ``mode='slide'``) not used: the network predicts the whole image.

    Args:
        model (nn.Module): A stock segmentor in evaluation mode.
        output (str): 'logits' (1, K, H, W), float32, at the resolution of
            the input; 'probabilities', the softmax of these; or 'argmax',
            labels (1, H, W), uint8. Defaults to 'logits'.
        preprocess (bool): Whether the input is an image as OpenCV reads it,
            (1, H, W, 3), uint8, BGR, that is normalized and, if the model
            does that in testing, padded here. Otherwise it is that already,
            (1, 3, H, W), float32. Defaults to False.

    Raises:
        ValueError: If the model has one output for two classes, or more
            classes than uint8 holds labels.
    """

    model: BaseSegmentor
    preprocessor: SegDataPreProcessor

    def __init__(self,
                 model: BaseSegmentor,
                 output: str = 'logits',
                 preprocess: bool = False) -> None:
        super().__init__()
        classes = model.decode_head.out_channels
        if classes == 1:
            raise ValueError('the decode head has out_channels=1 and a '
                             'threshold, which is not supported; train it '
                             'with out_channels=2.')
        if output == 'argmax' and classes > 256:
            raise ValueError(f'labels are uint8, but there are {classes} '
                             "classes: export 'logits'.")
        self.model = model
        self.channels = input_channels(model)
        self.output = output
        self.preprocess = preprocess
        # Without the padding, which does not export.
        self.preprocessor = copy.deepcopy(model.data_preprocessor)
        self.preprocessor.test_cfg = None

    def forward(self, image: Tensor) -> Tensor:
        """Predict one image."""
        if self.preprocess:
            scores = self._from_bytes(image)
        else:
            scores = self._encode_decode(image)
        if self.output == 'probabilities':
            return scores.softmax(1)
        if self.output == 'argmax':
            return scores.argmax(1).to(torch.uint8)
        return scores

    def _encode_decode(self, inputs: Tensor) -> Tensor:
        """Predict a normalized image."""
        meta = dict(img_shape=inputs.shape[2:])
        return self.model.encode_decode(inputs, [meta])

    def _from_bytes(self, image: Tensor) -> Tensor:
        """Normalize and pad an image, predict, and crop the logits."""
        images = list(image.permute(0, 3, 1, 2))
        inputs = self.preprocessor(dict(inputs=images))['inputs']
        height, width = inputs.shape[2:]
        more = self._padding((height, width))
        if more is None:
            return self._encode_decode(inputs)
        inputs = F.pad(
            inputs, (0, more[1], 0, more[0]), value=self.preprocessor.pad_val)
        return self._encode_decode(inputs)[..., :height, :width]

    def _padding(self, size: Size) -> Optional[Size]:
        """How much is padded below and at the right of a size in testing."""
        padding = self.model.data_preprocessor.test_cfg
        if not padding:
            return None
        full, divisor = padding.get('size'), padding.get('size_divisor')
        if full is None:
            return -size[0] % divisor, -size[1] % divisor
        return (torch.sym_max(full[0] - size[0],
                              0), torch.sym_max(full[1] - size[1], 0))

    def check_size(self, size: Size, dynamic: bool) -> None:
        """Refuse sizes that are padded in testing where the graph does not.

        Args:
            size (tuple[int, int]): Height and width of the input.
            dynamic (bool): Whether the graph is to take other sizes too.

        Raises:
            ValueError: If the size, or another one, would be padded.
        """
        more = None if self.preprocess else self._padding(size)
        if more and (dynamic or any(more)):
            padded = size[0] + more[0], size[1] + more[1]
            raise ValueError(
                f'in testing the network pads {size[0]}x{size[1]} to '
                f'{padded[0]}x{padded[1]}, which is no part of a graph '
                'without the preprocessing. Take --preprocess, or --size '
                f'{padded[0]} {padded[1]} without --dynamic.')

    @torch.no_grad()
    def reference(self, image: Tensor) -> Tensor:
        """Compute reference logits by ``test_step`` of MMSegmentation."""
        if not self.preprocess:
            return self._encode_decode(image)
        size = tuple(image.shape[1:3])
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        result, = self.model.test_step(
            dict(
                inputs=list(image.permute(0, 3, 1, 2)), data_samples=[sample]))
        return result.seg_logits.data[None]

    def example(self, size: Size) -> Tensor:
        """Make a random input of a size, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        if self.preprocess:
            return torch.randint(
                0,
                256, (1, *size, self.channels),
                dtype=torch.uint8,
                generator=generator)
        return torch.randn(1, self.channels, *size, generator=generator)

    def spec(self) -> Dict:
        """Describe the normalization that the input of the graph needs.

        Returns:
            dict: ``mean`` and ``std`` (lists, one value a channel, or
            None), and ``swap_channels``: whether the network sees RGB.
        """
        lists = {
            key: value.flatten().tolist()
            for key, value in self.preprocessor.named_buffers()
        }
        return dict(
            mean=lists.get('mean'),
            std=lists.get('std'),
            swap_channels=swaps_channels(self.preprocessor))
