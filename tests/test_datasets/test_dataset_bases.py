# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Dataset bases on small trees that lie where the guide says, for real."""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import DATASETS, METRICS
from PIL import Image

from mmseg_textkd import stock_config
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

BASES = Path(__file__).resolve().parents[2] / 'configs/_base_/datasets'
HEIGHT, WIDTH = 40, 60


@dataclass
class Layout:
    """What the files of a dataset are like.

    Args:
        kind (str): Dataset class.
        vocabulary (str): Key of the vocabulary.
        stock (str): Stock config that the base inherits from.
        images (str): Folder and file name of images; the fields are the part
            (see ``parts``) and the stem.
        labels (str): The same of label maps.
        values (tuple[int]): Labels in the files.
        meant (tuple[int]): What they are in training and testing.
        scale (float): From a file's size to that in testing.
        parts (tuple[str]): Names of the training and the validation part.
    """
    kind: str
    vocabulary: str
    stock: str
    images: str
    labels: str
    values: Tuple[int, ...]
    meant: Tuple[int, ...]
    scale: float
    parts: Tuple[str, str] = ('train', 'val')


VOC = 'data/VOCdevkit/VOC2012'
LAYOUTS = {
    'cityscapes-1024x1024':
    Layout(
        kind='CityscapesDataset',
        vocabulary='cityscapes',
        stock='cityscapes_1024x1024.py',
        images='data/cityscapes/leftImg8bit/{}/town/{}_leftImg8bit.png',
        labels='data/cityscapes/gtFine/{}/town/{}_gtFine_labelTrainIds.png',
        values=(0, 7, 18, 255),
        meant=(0, 7, 18, 255),
        scale=25.6),
    # Label 0 is none of the classes; they start at 1.
    'ade20k-512x512':
    Layout(
        kind='ADE20KDataset',
        vocabulary='ade20k',
        stock='ade20k.py',
        images='data/ade/ADEChallengeData2016/images/{}/{}.jpg',
        labels='data/ade/ADEChallengeData2016/annotations/{}/{}.png',
        values=(0, 1, 75, 150),
        meant=(255, 0, 74, 149),
        scale=12.8,
        parts=('training', 'validation')),
    'voc12aug-512x512':
    Layout(
        kind='PascalVOCDataset',
        vocabulary='voc12',
        stock='pascal_voc12_aug.py',
        images=f'{VOC}/JPEGImages/{{1}}.jpg',
        labels=f'{VOC}/SegmentationClass/{{1}}.png',
        values=(0, 15, 20, 255),
        meant=(0, 15, 20, 255),
        scale=12.8),
    'coco-stuff164k-512x512':
    Layout(
        kind='COCOStuffDataset',
        vocabulary='coco_stuff',
        stock='coco-stuff164k.py',
        images='data/coco_stuff164k/images/{}2017/{}.jpg',
        labels='data/coco_stuff164k/annotations/{}2017/{}_labelTrainIds.png',
        values=(0, 80, 170, 255),
        meant=(0, 80, 170, 255),
        scale=12.8),
    'bdd100k-512x1024':
    Layout(
        kind='BDD100KDataset',
        vocabulary='bdd100k',
        stock='bdd100k.py',
        images='data/bdd100k/images/10k/{}/{}.jpg',
        labels='data/bdd100k/labels/sem_seg/masks/{}/{}.png',
        values=(0, 7, 18, 255),
        meant=(0, 7, 18, 255),
        scale=25.6),
    # Label 65 of the files is `Unlabeled`.
    'mapillary-v1-512x1024':
    Layout(
        kind='MapillaryDataset_v1',
        vocabulary='mapillary_v1',
        stock='mapillary_v1_65.py',
        images='data/mapillary/{}/images/{}.jpg',
        labels='data/mapillary/{}/v1.2/labels/{}.png',
        values=(0, 30, 64, 65),
        meant=(0, 30, 64, 255),
        scale=25.6,
        parts=('training', 'validation'))
}


def stripes(values):
    """Diagonal stripes, so narrow that every crop holds every value."""
    rows, cols = np.mgrid[:HEIGHT, :WIDTH] // 4
    return np.array(values, np.uint8)[(rows + cols) % len(values)]


def write(image, label, values):
    """Write an image and its label map."""
    rng = np.random.default_rng(0)
    for file in (image, label):
        file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    # With a palette, as VOC and Mapillary have them: what counts is the index
    # and not the color.
    seg_map = Image.fromarray(stripes(values))
    seg_map.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    seg_map.save(label)


@pytest.fixture(params=LAYOUTS)
def base(request, tmp_path, monkeypatch):
    """A base, and two images of either part where it looks for them."""
    layout = LAYOUTS[request.param]
    for split, part in zip(('train', 'val'), layout.parts):
        for i in range(2):
            write(tmp_path / layout.images.format(part, f'{split}{i}'),
                  tmp_path / layout.labels.format(part, f'{split}{i}'),
                  layout.values)
    if layout.kind == 'PascalVOCDataset':
        write(tmp_path / VOC / 'JPEGImages/aug0.jpg',
              tmp_path / VOC / 'SegmentationClassAug/aug0.png', layout.values)
        lists = tmp_path / VOC / 'ImageSets/Segmentation'
        lists.mkdir(parents=True)
        (lists / 'train.txt').write_text('train0\ntrain1\n')
        (lists / 'val.txt').write_text('val0\nval1\n')
        (lists / 'aug.txt').write_text('aug0\n')
    monkeypatch.chdir(tmp_path)
    return layout, Config.fromfile(BASES / f'{request.param}.py')


def test_every_base_is_tested():
    ours = {
        'camvid-192x256', 'camvid-360x480', 'camvid-720x960',
        'toy_scenes-128x256'
    }
    found = {file.stem for file in BASES.glob('*.py')}
    # Variants, episodes and several together have tests of their own.
    found -= {
        name
        for name in found
        if re.search('steps|episodes|labelmefacade|coarse-fine', name)
    }
    assert found == {*LAYOUTS, *ours}
    assert len(LAYOUTS) == 6


@each_case('name', LAYOUTS)
def test_is_the_stock_one_with_the_crop_of_its_name(name):
    cfg = Config.fromfile(BASES / f'{name}.py')
    stock = stock_config(f'_base_/datasets/{LAYOUTS[name].stock}')
    assert cfg.to_dict() == Config.fromfile(stock).to_dict()
    height, width = map(int, name.rsplit('-', 1)[1].split('x'))
    crops = [t for t in cfg.train_pipeline if t.type == 'RandomCrop']
    assert [tuple(t.crop_size) for t in crops] == [(height, width)]
    assert tuple(cfg.crop_size) == (height, width)


def load_all(dataloader):
    """All samples of a data loader's dataset in one batch."""
    size = len(DATASETS.build(dataloader.dataset))
    loader = Runner.build_dataloader({
        **dataloader, 'batch_size': size,
        'num_workers': 0,
        'persistent_workers': False
    })
    batch = next(iter(loader))
    assert len(batch['inputs']) == size
    return loader.dataset, list(zip(batch['inputs'], batch['data_samples']))


def stem(sample):
    """Name of a sample's image without what the dataset appends."""
    return Path(sample.img_path).stem.split('_')[0]


def test_training_samples(base):
    layout, cfg = base
    dataset, samples = load_all(cfg.train_dataloader)
    kinds = {type(d).__name__ for d in getattr(dataset, 'datasets', [dataset])}
    assert kinds == {layout.kind}
    assert dataset.metainfo['classes'] == Vocabulary.from_spec(
        layout.vocabulary).names
    assert len(dataset.metainfo['palette']) == len(dataset.metainfo['classes'])
    # All of the training part, with VOC's augmentation, and of no other.
    expected = {'train0', 'train1'}
    if layout.kind == 'PascalVOCDataset':
        expected.add('aug0')
    assert {stem(sample) for _, sample in samples} == expected
    crop_height, crop_width = cfg.crop_size
    for image, sample in samples:
        seg_map = sample.gt_sem_seg.data
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert image.shape[1:] == seg_map.shape[1:]
        # What is smaller than the crop stays so, where nothing pads it; the
        # model's data preprocessor does.
        wide, high = sample.scale_factor
        height, width = round(HEIGHT * high), round(WIDTH * wide)
        size = (min(crop_height, height), min(crop_width, width))
        if layout.kind == 'PascalVOCDataset':
            size = (crop_height, crop_width)
            added = torch.ones(size, dtype=bool)
            added[:height, :width] = False
            assert (seg_map[0][added] == 255).all()
        assert image.shape[1:] == size
        labels = set(seg_map.unique().tolist())
        assert labels == {*layout.meant}


def test_test_samples(base):
    layout, cfg = base
    dataset, samples = load_all(cfg.test_dataloader)
    assert cfg.val_dataloader == cfg.test_dataloader
    names = Vocabulary.from_spec(layout.vocabulary).names
    assert dataset.metainfo['classes'] == names
    assert [stem(sample) for _, sample in samples] == ['val0', 'val1']
    expected = torch.from_numpy(stripes(layout.meant))
    for image, sample in samples:
        assert image.shape == (3, round(HEIGHT * layout.scale),
                               round(WIDTH * layout.scale))
        # The label map is that of the file: scores are for its size.
        assert sample.ori_shape == (HEIGHT, WIDTH)
        assert torch.equal(sample.gt_sem_seg.data[0].long(), expected.long())

    # Whatever is predicted where nothing is labeled does not count.
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    outputs = []
    for _, sample in samples:
        pred = sample.gt_sem_seg.data.long() % 255
        outputs.append(dict(pred_sem_seg=dict(data=pred), **sample.to_dict()))
    metric.process({}, outputs)
    scores = metric.evaluate(len(outputs))
    assert scores == dict(aAcc=100., mIoU=100., mAcc=100.)


def test_tta_pipeline_loads(base):
    _, cfg = base
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    sample = DATASETS.build(cfg.test_dataloader.dataset)[0]
    # Six sizes, each as it is and flipped.
    sizes = [(round(HEIGHT * r), round(WIDTH * r))
             for r in (0.5, 0.75, 1., 1.25, 1.5, 1.75) for _ in range(2)]
    assert [tuple(image.shape[1:]) for image in sample['inputs']] == sizes
    flips = [s.flip for s in sample['data_samples']]
    assert flips == [False, True] * 6
