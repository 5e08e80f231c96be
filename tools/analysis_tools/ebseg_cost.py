# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Count what EBSeg costs: parameters, and multiply-accumulates of an image.

Both towers get random weights, which cost the same: neither weights nor class
vectors are needed. Counted by PyTorch's `FlopCounterMode`: convolutions and
matrix products, those of attention included.
"""
import argparse
from pathlib import Path
from typing import Optional, Sequence

import open_clip
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmseg_textkd  # noqa: F401  (registers EBSeg)


def build(cfg: Config) -> nn.Module:
    """Build the network with random vectors as text, and random towers."""
    head = cfg.model.decode_head
    head.text = dict(
        type='ControlEmbeddings', kind='random', dim=head.text.dim)
    model = MODELS.build(cfg.model).requires_grad_(False).eval()
    clip = open_clip.create_model(cfg.model.image_encoder.model).visual
    clip.clip_scale = 100.
    sam = timm.create_model(cfg.model.backbone.model, num_classes=0)
    for tower, network in ((model.image_encoder, clip), (model.backbone, sam)):
        tower.load_network = lambda network=network: network
    return model


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(640, 640),
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image (default: 640 640)')
    args = parser.parse_args(argv)
    print('| CLIP | parameters: trained (M) | CLIP (M) | SAM (M) | all (M) | '
          f'GMACs |\n{"| --- " * 6}|')
    for path in args.configs:
        cfg = Config.fromfile(path)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        model = build(cfg)
        towers = model.image_encoder.network, model.backbone.network
        counts = [
            sum(p.numel() for p in part.parameters()) / 1e6
            for part in (model, *towers)
        ]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, *args.shape))
        cells = [f'{n:.1f}' for n in (*counts, sum(counts))]
        cells.append(f'{counter.get_total_flops() / 2e9:.1f}')
        name = cfg.model.image_encoder.model
        print(f'| {name} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
