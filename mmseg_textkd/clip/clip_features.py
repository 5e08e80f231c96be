# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Intermediate features of a CLIP image encoder."""
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn


class CLIPFeatures:
    """Tokens of one batch after each block of a CLIP image encoder.

    Args:
        network (nn.Module): open_clip's image tower of L blocks.
        states (tuple[Tensor]): L + 1 tensors with shape (N, 1 + h·w, C): what
            each block got, and what the last one gave. The class token is the
            first of each.
        size (tuple[int, int]): h and w, in patches.
        logit_scale (float): CLIP's own factor on cosines.
    """

    def __init__(self, network: Any, states: Tuple[Tensor, ...],
                 size: Tuple[int, int], logit_scale: float) -> None:
        self.network = network
        self.states = states
        self.size = size
        self.logit_scale = logit_scale

    def level(self, depth: int) -> Tensor:
        """Get the patch tokens after some blocks.

        Args:
            depth (int): Number of blocks.

        Returns:
            Tensor: Features with shape (N, C, h, w).
        """
        return self.states[depth][:, 1:].transpose(1,
                                                   2).unflatten(2, self.size)

    def mask_attention(self, bias: Tensor, first_block: int) -> Tensor:
        """Embed masks by class tokens that attend to their pixels.

        Each mask gets a copy of the class token. In the last blocks it attends
        to itself and to the patches, to whose attention logits a bias is
        added, the largest within each patch. The image's own tokens do not see
        it. After `Side Adapter Network <https://arxiv.org/abs/2302.12242>`_.

        Args:
            bias (Tensor): Shape (N, heads, Q, H, W), or (N, Q, H, W) if it is
                the same for all heads.
            first_block (int): Number of blocks before the copies are made.

        Returns:
            Tensor: Embeddings, not normalized, with shape (N, Q, D).
        """
        if bias.dim() == 4:
            bias = bias[:, None]
        heads, num = bias.shape[1:3]
        bias = F.adaptive_max_pool2d(bias.flatten(1, 2), self.size)
        bias = bias.unflatten(1, (heads, num)).flatten(3)
        others = bias.new_full((num, num), float('-inf')).fill_diagonal_(0)
        bias = torch.cat([others.expand(*bias.shape[:2], -1, -1), bias], dim=3)
        tokens = self.states[first_block][:, :1].expand(-1, num, -1)
        blocks = self.network.transformer.resblocks
        for block, state in zip(blocks[first_block:],
                                self.states[first_block:]):
            query = block.ln_1(tokens)
            context = torch.cat([query, block.ln_1(state[:, 1:])], dim=1)
            tokens = tokens + block.ls_1(
                _attend(block.attn, query, context, bias))
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return self._project(tokens)

    def dense(self, surgery_blocks: int) -> Tensor:
        """Embed the patches by CLIP Surgery.

        A stream beside the last blocks gathers their attention with values
        for queries and keys, and leaves the feed-forward networks out, which
        keeps patches apart. Source: `CLIP Surgery
        <https://arxiv.org/abs/2304.05653>`_.

        Args:
            surgery_blocks (int): Number of blocks that are treated so; with 0
                the patches are those of the plain tower.

        Returns:
            Tensor: Embeddings, not normalized, with shape (N, D, h, w).
        """
        blocks = self.network.transformer.resblocks
        start = len(blocks) - surgery_blocks
        tokens = self.states[start]
        for block, state in zip(blocks[start:], self.states[start:]):
            tokens = tokens + block.ls_1(
                _attend_to_values(block.attn, block.ln_1(state)))
        return self._project(tokens[:,
                                    1:]).transpose(1,
                                                   2).unflatten(2, self.size)

    def _project(self, tokens: Tensor) -> Tensor:
        """Project tokens to the space shared by images and text."""
        return self.network.ln_post(tokens) @ self.network.proj


def encode_image(network: Any, images: Tensor, position: Tensor,
                 logit_scale: float) -> CLIPFeatures:
    """Run a CLIP image encoder on images of any size.

    Args:
        network (nn.Module): open_clip's image tower, a plain ViT.
        images (Tensor): Normalized, shape (N, 3, H, W), sides of whole
            patches.
        position (Tensor): Positional embedding for the tower's own grid,
            shape (1 + L, C).
        logit_scale (float): CLIP's own factor on cosines.

    Returns:
        CLIPFeatures: Tokens of all depths.
    """
    patches = network.conv1(images)
    size = (patches.shape[2], patches.shape[3])
    patches = patches.flatten(2).transpose(1, 2)
    token = network.class_embedding.to(patches.dtype)
    tokens = torch.cat([token.expand(len(patches), 1, -1), patches], 1)
    tokens = tokens + VisionTransformer.resize_pos_embed(
        position[None], size, tuple(network.grid_size), 'bicubic')
    states = [network.ln_pre(tokens)]
    for block in network.transformer.resblocks:
        states.append(block(states[-1]))
    return CLIPFeatures(network, tuple(states), size, logit_scale)


def _heads(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Split the last dimension: (N, L, C) to (N, heads, L, C / heads)."""
    return x.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


def _attend(attn: nn.MultiheadAttention, query: Tensor, context: Tensor,
            bias: Tensor) -> Tensor:
    """Multi-head attention with a bias (N, heads or 1, Q, L)."""
    dim = attn.embed_dim
    weight, shift = attn.in_proj_weight, attn.in_proj_bias
    query = F.linear(query, weight[:dim], shift[:dim])
    keys, values = F.linear(context, weight[dim:], shift[dim:]).chunk(2, 2)
    out = F.scaled_dot_product_attention(
        _heads(attn, query),
        _heads(attn, keys),
        _heads(attn, values),
        attn_mask=bias.to(query.dtype))
    return attn.out_proj(out.transpose(1, 2).flatten(2))


def _attend_to_values(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention whose queries and keys are the values."""
    start = 2 * attn.embed_dim
    values = _heads(
        attn,
        F.linear(x, attn.in_proj_weight[start:], attn.in_proj_bias[start:]))
    out = F.scaled_dot_product_attention(values, values, values)
    return attn.out_proj(out.transpose(1, 2).flatten(2))
