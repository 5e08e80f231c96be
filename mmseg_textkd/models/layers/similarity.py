# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch.nn.functional as F
from torch import Tensor


def pixel_text_similarity(embeddings: Tensor, text: Tensor) -> Tensor:
    """Compute inner products of pixel embeddings and class embeddings.

    Args:
        embeddings (Tensor): Pixel embeddings with shape (N, D, H, W).
        text (Tensor): Class embeddings of the same dtype: (K, D) for all
            images; (N, K, D), those of each image; or (1, R, K, D), R phrases
            of each class, of which the one that fits a pixel best counts.

    Returns:
        Tensor: Inner products with shape (N, K, H, W).
    """
    if text.dim() == 2:
        return F.conv2d(embeddings, text[:, :, None, None])
    if text.dim() == 4:
        product = pixel_text_similarity(embeddings, text[0].flatten(0, 1))
        return product.unflatten(1, text.shape[1:3]).amax(dim=1)
    product = text @ embeddings.flatten(2)
    return product.unflatten(2, embeddings.shape[2:])


def text_of_batch(text: Tensor) -> Tensor:
    """Get one class embedding for each class of a batch.

    Where images have text of their own, or a class has several phrases, it
    is their normalized mean, since it is compared with
    values of the whole batch, such as means over the pixels of all images.

    Args:
        text (Tensor): Class embeddings with unit rows, of a shape that
            :func:`pixel_text_similarity` takes.

    Returns:
        Tensor: Unit rows with shape (K, D).
    """
    if text.dim() == 4:
        text = text[0]
    if text.dim() == 3:
        text = text.mean(dim=0)
    return F.normalize(text, dim=1)
