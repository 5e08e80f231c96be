# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import SampleList
from torch import Tensor

from ..decode_heads import TextHeadMixin
from ..label_spaces import own_label_spaces


@MODELS.register_module()
class MultiDatasetEncoderDecoder(EncoderDecoder):
    """``EncoderDecoder`` that learns from data sets with different classes.

    Its heads have a class for each word of a :class:`MultiDataset`. Each
    image is trained against the names of its own data set only, in all
    heads: "other" of one does not push away a class of another. A stock
    ``EncoderDecoder`` would train one softmax over all words. Everything
    else, the state dict included, is that of ``EncoderDecoder``.

    Args:
        **kwargs: As of ``EncoderDecoder``.

    Raises:
        ValueError: If a text head has a fusion, whose losses are over all
            words.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name, head in self.named_modules():
            if isinstance(head, TextHeadMixin) and head.text_branch.fusion:
                raise ValueError(
                    f'{name}: a {type(head.text_branch.fusion).__name__} '
                    'compares pixels with the words of all data sets; leave '
                    '`fusion` out where each image is to be trained against '
                    'its own.')

    def loss(self, inputs: Tensor,
             data_samples: SampleList) -> Dict[str, Tensor]:
        """Compute the losses, of each image in its own label space.

        Args:
            inputs (Tensor): Images with shape (N, 3, H, W).
            data_samples (list[:obj:`SegDataSample`]): Their labels; samples
                of no :class:`MultiDataset` are trained as with
                ``EncoderDecoder``.

        Returns:
            dict[str, Tensor]: Losses by name.
        """
        with own_label_spaces(self, data_samples):
            return super().loss(inputs, data_samples)
