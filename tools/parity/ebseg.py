# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compare EBSeg with the code of its authors.

REPO is a clone of https://github.com/slonetime/EBSeg (compared: f61977d),
OPEN_CLIP the version that it needs:

    pip install --no-deps --target OPEN_CLIP open_clip_torch==2.20.0

Its network is built at its configuration with random weights and saved in its
format, converted by ebseg2mmseg.py, and both get the same files. Prints one
row of a table in Markdown for each image: the largest difference of scores,
relative to the largest score, and the share of pixels with the same class, for
the classes that are trained and for others.
"""
import argparse
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'ebseg_{}_4xb4-120k_coco-stuff164k-640x640.py'
# Height and width, most of which are no multiples of 32.
SIZES = ((192, 192), (192, 256), (192, 253), (128, 160), (128, 171),
         (140, 128), (133, 128), (128, 149), (128, 192), (128, 128))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('repo', type=Path, help='clone of EBSeg')
    parser.add_argument('open_clip', type=Path, help='folder of open_clip')
    parser.add_argument(
        '--model',
        choices=('vit-b16', 'vit-l14-336'),
        default='vit-b16',
        help='which of theirs (default: %(default)s)')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/parity_ebseg'),
        help='folder of the checkpoints, 3 GB (default: %(default)s)')
    parser.add_argument(
        '--images', nargs='*', default=[], help='images beside random ones')
    parser.add_argument(
        '--num-images',
        type=int,
        default=len(SIZES),
        help='random images (default: %(default)s)')
    parser.add_argument(
        '--short',
        type=int,
        default=128,
        help='short side of --images (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

# isort: split
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.utils.checkpoint import load_strictly, read_checkpoint

# After this package, which makes the ops of MMCV that mmcv-lite lacks.
from mmseg.apis import inference_model  # isort: skip
from mmseg.datasets import COCOStuffDataset  # isort: skip


def list_images(args: argparse.Namespace) -> List[Tuple[str, int]]:
    """Make the random images; paths and short sides of all."""
    rng = np.random.default_rng(0)
    found = []
    for i, (height, width) in enumerate(SIZES[:args.num_images]):
        low = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3))
        image = mmcv.imresize(
            low.astype(np.uint8), (width, height), interpolation='bicubic')
        image = image + rng.integers(-20, 21, image.shape)
        path = args.work_dir / f'random_{i}.png'
        mmcv.imwrite(image.clip(0, 255).astype(np.uint8), str(path))
        found.append((str(path.resolve()), min(height, width)))
    return found + [(str(Path(p).resolve()), args.short) for p in args.images]


def convert(args: argparse.Namespace) -> Tuple[Config, nn.Module]:
    """Convert their checkpoint and build our network with it."""
    folder = args.work_dir
    for path in folder.glob('ours*'):
        path.unlink()
    names = tuple(COCOStuffDataset.METAINFO['classes'])
    width = 512 if args.model == 'vit-b16' else 768
    torch.manual_seed(0)
    TextEmbeddings(
        vectors=F.normalize(torch.randn(len(names), width), dim=1),
        names=names).save(folder / 'ours_text.safetensors')
    tool = runpy.run_path(str(ROOT / 'tools/model_converters/ebseg2mmseg.py'))
    tool['main']([
        str(folder / 'theirs.pth'), '--out',
        str(folder / 'ours.pth'), '--model', args.model, '--embeddings',
        str(folder / 'ours_text.safetensors'), '--towers'
    ])
    cfg = Config.fromfile(ROOT / 'configs/ebseg' / CONFIG.format(args.model))
    init_default_scope('mmseg')
    cfg.model.image_encoder.model += '-quickgelu'
    cfg.model.image_encoder.pretrained = str(folder / 'ours_clip.safetensors')
    cfg.model.backbone.pretrained = str(folder / 'ours_sam.safetensors')
    model = MODELS.build(cfg.model).eval()
    state = read_checkpoint(folder / 'ours.pth')['state_dict']
    load_strictly(model, state, folder / 'ours.pth')
    model.cfg = cfg
    return cfg, model


@torch.no_grad()
def compare(cfg: Config, model: nn.Module, theirs: dict) -> str:
    """Predict on one image and return its row."""
    for transform in cfg.test_pipeline:
        if transform['type'] == 'Resize':
            transform['scale'] = (2560, theirs['short'])
    cfg.test_dataloader.dataset.pipeline = cfg.test_pipeline
    text = model.decode_head.text
    text.trained.fill(theirs['seen_text'])
    cells = []
    for name in ('seen', 'new'):
        text.__dict__.pop('vocabulary', None)
        if name == 'seen':
            model.set_classes(None)
        else:
            vectors, overlap = theirs['new_text'], theirs['overlap'].bool()
            model.set_classes(
                TextEmbeddings(
                    vectors=vectors,
                    names=tuple(f'class {i}' for i in range(len(vectors)))))
            # Which are seen is theirs, by names that are not asked here.
            text.vocabulary = lambda: (vectors, overlap)
        ours: Tensor = inference_model(model, theirs['path']).seg_logits.data
        expected: Tensor = theirs[name]
        difference = (ours - expected).abs().max() / expected.abs().max()
        same = (ours.argmax(0) == expected.argmax(0)).float().mean()
        cells += [
            f'{difference:.2g}', f'{100 * same:.4f} %',
            str(len(expected.argmax(0).unique()))
        ]
    height, width = expected.shape[1:]
    return (f'| {Path(theirs["path"]).stem}, {height}x{width}, short side '
            f'{theirs["short"]} | ' + ' | '.join(cells) + ' |')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warnings.simplefilter('ignore')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images = list_images(args)
    (args.work_dir / 'images.json').write_text(json.dumps(images))
    subprocess.run([
        sys.executable, '-c', 'import sys; from ebseg_reference import run; '
        'run(*sys.argv[1:])',
        str(args.repo.resolve()),
        str(args.work_dir.resolve()), args.model
    ],
                   env=dict(
                       os.environ,
                       PYTHONPATH=os.pathsep.join([
                           str(args.open_clip.resolve()),
                           str(Path(__file__).parent)
                       ])),
                   check=True)
    cfg, model = convert(args)
    print('| image | seen classes: difference | same class | classes | '
          'others: difference | same class | classes |')
    print('|' + ' --- |' * 7)
    for i in range(len(images)):
        print(
            compare(
                cfg, model,
                torch.load(
                    args.work_dir / f'theirs_{i}.pt', weights_only=True)))


if __name__ == '__main__':
    main()
