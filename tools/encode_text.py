# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make, import or look at a file of class embeddings."""
import argparse
import os.path as osp
import sys
from pathlib import Path
from typing import List, Optional, Sequence

EXAMPLES = """examples:
  # Cityscapes' classes with CLIP ViT-B/16 and 14 templates
  python tools/encode_text.py cityscapes --model ViT-B-16 \\
      --pretrained openai --out data/text/cityscapes_vitb16.safetensors
  # own classes, one per line (`name` or `name: phrase, phrase`)
  python tools/encode_text.py classes.txt --model toyclip --out own.safetensors
  # plain vectors made elsewhere, under the names of a dataset
  python tools/encode_text.py camvid --import camvid11.npy \\
      --names-file camvid11.json --out data/text/camvid.safetensors
  # further words for each class, and a vector for each of them
  python tools/encode_text.py camvid+synonyms --model toyclip --keep-bank \\
      --out data/text/camvid_synonyms.safetensors
  # the same of plain vectors of many phrases
  python tools/encode_text.py camvid+synonyms --import phrases.npy \\
      --names-file phrases.json --by-phrase --keep-bank --out own.safetensors
  # fetch a model on a machine with a network
  python tools/encode_text.py --prefetch --model hf-hub:org/name --cache-dir D
  # look at a file
  python tools/encode_text.py own.safetensors --closest 5 --heatmap own.png
"""


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'classes',
        nargs='?',
        help='names with commas between them, "road, tree, bus stop"; or a '
        'vocabulary: a data set such as cityscapes or camvid, one with '
        '+synonyms behind it, or a .txt or .json file of names and phrases; '
        'or an embeddings file to look at')
    parser.add_argument('--names', dest='old_names', help=argparse.SUPPRESS)
    parser.add_argument('--out', type=Path, help='embeddings file to write')
    parser.add_argument(
        '--force', action='store_true', help='replace an existing --out')
    tower = parser.add_argument_group('encoding')
    tower.add_argument(
        '--model',
        help="open_clip architecture, 'hf-hub:org/name', 'local-dir:/path', "
        "or 'toyclip' (the tiny model of this package)")
    tower.add_argument('--pretrained', help='tag or file of the weights')
    tower.add_argument('--cache-dir', help='folder of downloaded models')
    tower.add_argument(
        '--templates',
        default='vild',
        help="'vild', 'imagenet', 'photo', 'none', one template with {}, or a "
        '.txt or .json file (default: vild)')
    tower.add_argument(
        '--keep-bank',
        action='store_true',
        help='keep the vector of each phrase in each template, as mixture '
        'prompts need')
    tower.add_argument(
        '--prefetch',
        action='store_true',
        help='only download the model into the cache')
    plain = parser.add_argument_group('importing')
    plain.add_argument(
        '--import',
        dest='vectors',
        metavar='VECTORS',
        help='plain K×D vectors: .npy, .pt, .pth or .safetensors')
    plain.add_argument(
        '--names-file',
        help='names of the imported rows: .txt, or .json with "names" and '
        'optionally "phrases", "template", "model"')
    plain.add_argument(
        '--by-phrase',
        action='store_true',
        help='the imported rows are phrases: look up those of each class')
    report = parser.add_argument_group('report')
    report.add_argument(
        '--closest', type=int, metavar='N', help='print the N closest pairs')
    report.add_argument(
        '--heatmap', type=Path, metavar='PNG', help='image of the cosines')
    report.add_argument(
        '--center',
        '--centre',
        action='store_true',
        help='subtract the mean in the report (the file stays as it is)')
    args = parser.parse_args(argv)
    args.names = args.old_names
    if (args.classes and ',' in args.classes and args.names is None
            and not osp.isfile(args.classes)):
        args.names, args.classes = args.classes, None
    _check_args(parser, args)
    return args


def _check_args(parser: argparse.ArgumentParser,
                args: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, before any work."""
    if args.prefetch:
        if not args.model:
            parser.error('--prefetch needs --model')
        return
    if args.classes and args.names:
        parser.error('give names once: CLASSES, without --names')
    if args.vectors:
        if args.model or (args.keep_bank and not args.by_phrase):
            parser.error('--import encodes nothing: --model and, without '
                         '--by-phrase, --keep-bank make no sense with it')
        if args.by_phrase and not (args.classes and args.names_file):
            parser.error('--by-phrase needs a dataset or a file of names and '
                         'phrases, and the --names-file of the rows')
        if not (args.names_file or args.names or args.classes):
            parser.error('--import needs the names of its rows: --names-file, '
                         'or CLASSES')
    elif args.names_file or args.by_phrase:
        parser.error('--names-file belongs to --import, as --by-phrase does; '
                     'give a file of names to encode as first argument')
    elif not (args.classes or args.names):
        parser.error('nothing to encode: give CLASSES, names with commas or a '
                     'vocabulary')
    looking = _is_embeddings(args.classes) and not args.vectors
    if looking and (args.out or args.model):
        parser.error(f'{args.classes} is an embeddings file already; it can '
                     'only be looked at')
    if not looking:
        if not args.out:
            parser.error('--out is needed')
        if args.out.suffix != '.safetensors':
            parser.error(f'--out must end in .safetensors: {args.out}')
        if args.out.exists() and not args.force:
            parser.error(f'{args.out} exists; --force replaces it')
        if not args.vectors and not args.model:
            parser.error('--model is needed, such as `--model ViT-B-16 '
                         '--pretrained openai` or `--model toyclip`')
    if args.closest is not None and args.closest < 1:
        parser.error('--closest must be at least 1')


def _is_embeddings(classes: Optional[str]) -> bool:
    """Whether the first argument is a file to look at."""
    return bool(classes) and classes.endswith('.safetensors')


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
from torch import Tensor

from mmseg_textkd.clip.text_tower import TextTower, TextTowerError
from mmseg_textkd.clip.weights import find_weights
from mmseg_textkd.text.embedding_file import TextEmbeddings
from mmseg_textkd.text.embedding_statistics import (ce_floor, center,
                                                    closest_pairs, geometry)
from mmseg_textkd.text.encode_classes import encode_classes, look_up_phrases
from mmseg_textkd.text.vocabulary import Vocabulary
from mmseg_textkd.utils.arguments import warn_renamed


def _split(names: str) -> List[str]:
    """Split --names."""
    return [name.strip() for name in names.split(',')]


def make(args: argparse.Namespace) -> TextEmbeddings:
    """Encode or import the embeddings that the arguments describe."""
    classes = _split(args.names) if args.names else args.classes
    if not args.vectors:
        return encode_classes(
            classes,
            dict(
                model=args.model,
                pretrained=args.pretrained,
                cache_dir=args.cache_dir),
            args.templates,
            keep_bank=args.keep_bank,
            progress=True)
    if args.by_phrase:
        found = TextEmbeddings.from_vectors(args.vectors, args.names_file)
        return look_up_phrases(classes, found, args.keep_bank)
    wanted = None if classes is None else Vocabulary.from_spec(classes).names
    embeddings = TextEmbeddings.from_vectors(args.vectors, args.names_file
                                             or wanted)
    return embeddings if wanted is None else embeddings.renamed(wanted)


def report(embeddings: TextEmbeddings, args: argparse.Namespace) -> None:
    """Print the geometry and draw the image that was asked for."""
    names = embeddings.names
    print(f'{len(names)} classes, D = {embeddings.dim}, model '
          f'{embeddings.model or "unknown"} {embeddings.pretrained}'.strip() +
          f', '
          f'{embeddings.library or "library unknown"}, '
          f'{max(len(embeddings.templates), 1)} template(s), '
          f'{sum(map(len, embeddings.phrases))} phrases, bank: '
          f'{"no" if embeddings.bank is None else embeddings.bank.shape[1]}\n'
          f'sha256 {embeddings.sha256}')
    if len(names) < 2:
        return
    vectors = embeddings.vectors
    if args.center:
        vectors = center(vectors)
    shape = geometry(vectors)
    near, far = shape['closest_pair'], shape['farthest_pair']
    print(f'cosines{" after centering" if args.center else ""}: mean '
          f'{shape["mean"]:.3f}, highest {shape["closest"]:.3f} '
          f'({names[near[0]]} - {names[near[1]]}), lowest {shape["min"]:.3f} '
          f'({names[far[0]]} - {names[far[1]]})')
    if len(names) <= 300:  # of 1000 it would take minutes
        print('lowest possible cross entropy at scale ' +
              ', '.join(f'{scale:g}: {ce_floor(vectors, scale):.4f}'
                        for scale in (10, 14.29, 30)))
    if args.closest:
        print('closest pairs:')
        for i, j, cosine in closest_pairs(vectors, args.closest):
            print(f'  {cosine:.3f}  {names[i]} - {names[j]}')
    if args.heatmap:
        draw(vectors, names, args.heatmap, args.center)
        print(f'wrote {args.heatmap}')


def draw(vectors: Tensor, names: Sequence[str], path: Path,
         centered: bool) -> None:
    """Draw the cosine matrix, with its values where they can be read."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    num = len(names)
    cosine = (vectors @ vectors.T).fill_diagonal_(float('nan')).numpy()
    # The diagonal is 1 everywhere; it is left out.
    low, high = float(np.nanmin(cosine)), float(np.nanmax(cosine))
    size = max(5., .32 * num + 2.5) if num <= 40 else .16 * num + 3
    font = 8 if num <= 40 else 5
    figure, axes = plt.subplots(figsize=(size + .8, size))
    axes.set_facecolor('.85')
    image = axes.imshow(cosine, vmin=low, vmax=high, cmap='viridis')
    axes.set_xticks(range(num), names, rotation=90, fontsize=font)
    axes.set_yticks(range(num), names, fontsize=font)
    axes.set_title(f'cosines of the class embeddings'
                   f'{" (centered)" if centered else ""}')
    if num <= 25:
        for i in range(num):
            for j in {*range(num)} - {i}:
                bright = cosine[i, j] > low + .6 * (high - low)
                axes.text(
                    j,
                    i,
                    f'{cosine[i, j]:.2f}'.replace('0.', '.'),
                    ha='center',
                    va='center',
                    fontsize=6,
                    color='black' if bright else 'white')
    figure.colorbar(image, ax=axes, fraction=.04, label='cosine')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches='tight')
    plt.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, names='the names as the first argument')
    try:
        if args.prefetch:
            # Opened too: that fetches the tokenizer and proves the files.
            tower = TextTower(args.model, args.pretrained, args.cache_dir)
            place = find_weights(args.model, args.pretrained, args.cache_dir)
            print(f'{args.model} works (D = {tower.dim}) and is at '
                  f'{place.pretrained or place.name}')
            return
        if _is_embeddings(args.classes) and not args.vectors:
            embeddings = TextEmbeddings.load(args.classes)
            print(', '.join(embeddings.names))
        else:
            embeddings = make(args)
            embeddings.save(args.out)
            print(f'wrote {args.out}')
        report(embeddings, args)
    except (TextTowerError, ValueError, OSError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
