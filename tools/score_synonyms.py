# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Score the phrases of classes by the pictures of a config's training data.

Each class of each image is cut out and encoded by the image side of the model
that encoded the text; what is most similar to it scores. The scores are
written beside the embeddings file, for dict(type='SynonymSampler',
confidence='image').
"""
import argparse
import copy
import sys
from typing import Any, Iterator, Optional, Sequence

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS

from mmseg_textkd.text.embedding_file import TextEmbeddings
from mmseg_textkd.text.image_tower import ImageTower
from mmseg_textkd.text.phrase_confidence import (image_confidence,
                                                 save_confidence)
from mmseg_textkd.text.region_embeddings import (RegionEmbeddings,
                                                 encode_regions)
from mmseg_textkd.text.text_weights import TextTowerError
from mmseg_textkd.utils.config import dicts, type_name


def only_load(cfg: Any) -> Any:
    """Cut pipelines behind LoadAnnotations: pictures as they are."""
    cfg = copy.deepcopy(cfg)
    for part in dicts(cfg):
        kinds = [type_name(t) for t in part.get('pipeline') or []]
        if 'LoadAnnotations' in kinds:
            del part['pipeline'][kinds.index('LoadAnnotations') + 1:]
    return cfg


def regions(dataset: Any, tower: ImageTower,
            number: int) -> Iterator[RegionEmbeddings]:
    """Encode the classes of images that lie evenly in the dataset."""
    from tqdm import tqdm
    step = max(len(dataset) // number, 1)
    rows = range(0, len(dataset), step)[:number]
    for i in tqdm(rows, desc='Scoring phrases', unit='image'):
        results = dataset[i]
        yield encode_regions(tower, results['img'], results['gt_seg_map'])


def report(record: TextEmbeddings, scores: Any, counts: Any) -> None:
    """Print the phrases of each class, the best first."""
    for k, name in enumerate(record.names):
        rows = zip(record.phrases[k], scores[k].tolist())
        said = ', '.join(
            f'{phrase} {score:.2f}'
            for phrase, score in sorted(rows, key=lambda row: -row[1]))
        print(f'{name} ({counts[k]} regions): {said}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='training config, for its data')
    parser.add_argument('file', help='embeddings file with a bank')
    parser.add_argument(
        '--images', type=int, default=2000, help='default: %(default)s')
    parser.add_argument(
        '--model', help='open_clip model; default: the one of the file')
    parser.add_argument('--pretrained', help='tag or file of its weights')
    parser.add_argument('--cache-dir', help='download cache')
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error('--images must be at least 1')
    try:
        record = TextEmbeddings.load(args.file)
        model = args.model or record.model
        pretrained = args.pretrained
        if pretrained is None and not args.model:
            pretrained = record.pretrained or None
        cfg = Config.fromfile(args.config)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        data = only_load(cfg.train_dataloader.dataset.to_dict())
        dataset = DATASETS.build(data)
        record.check_names(dataset.metainfo['classes'], where=args.config)
        tower = ImageTower(model, pretrained, args.cache_dir).to(get_device())
        scores, counts = image_confidence(record,
                                          regions(dataset, tower, args.images))
        path = save_confidence(args.file, record, scores, counts,
                               f'{model} {pretrained or ""}'.strip())
    except (TextTowerError, ValueError, OSError) as error:
        sys.exit(f'Error: {error}')
    report(record, scores, counts)
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
