# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch.nn.functional as F
from torch import Tensor


def pixel_text_similarity(embeddings: Tensor, text: Tensor) -> Tensor:
    """Multiply every pixel embedding with every class embedding.

    Args:
        embeddings (Tensor): Pixel embeddings with shape (N, D, H, W).
        text (Tensor): Class embeddings of the same dtype: (K, D) for all
            images, or (N, K, D), those of each image.

    Returns:
        Tensor: Inner products with shape (N, K, H, W).
    """
    if text.dim() == 2:
        return F.conv2d(embeddings, text[:, :, None, None])
    product = text @ embeddings.flatten(2)
    return product.unflatten(2, embeddings.shape[2:])
