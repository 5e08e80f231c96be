# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Functions that configs call, to reuse those of MMSegmentation.

They do so as ``__import__('mmseg_textkd').stock_network(...)``,
since MMEngine allows no other import there.
"""
import copy
import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmseg.registry import DATASETS

from .compat import stock_config
from .text import Vocabulary
from .utils.config import as_list, type_name, walk


@functools.lru_cache(maxsize=None)
def _read_stock(path: str) -> Config:
    """Read a stock config once: many configs build on the same one."""
    return Config.fromfile(stock_config(path))


def stock_network(path: str,
                  num_classes: int,
                  size: Tuple[int, int],
                  min_kept: Optional[int] = None) -> Tuple[Dict, Dict]:
    """Get network and optimizer of a stock config for another dataset.

    The decode head gets ``num_classes``, and so does every head that had as
    many classes as it; STDC's boundary head had two and keeps them. Where the
    number changes, class weights go: they were those of other classes.

    Args:
        path (str): Path of the config below MMSegmentation's ``configs``.
        num_classes (int): Number of classes K of the dataset.
        size (tuple[int, int]): Height and width, in pixels, of the crops
            that the data preprocessor pads to in training.
        min_kept (int, optional): Pixels of an image that OHEM samplers keep
            at least. Defaults to None: as in the config.

    Returns:
        tuple[dict, dict]: ``model`` and ``optim_wrapper`` for a config.

    Raises:
        FileNotFoundError: If there is no such config; near matches are
            listed.
        ValueError: If a head has its classes in parts of its own.
    """
    cfg = _read_stock(path)
    model, optim_wrapper = (
        copy.deepcopy(cfg[key].to_dict())
        for key in ('model', 'optim_wrapper'))
    model['data_preprocessor']['size'] = size
    heads = as_list(model['decode_head']) + as_list(
        model.get('auxiliary_head'))
    nested = [
        h['type'] for h in heads if 'num_classes' not in h or 'loss_cls' in h
    ]
    if nested:
        raise ValueError(
            f'{path}: the classes of {nested} are in parts of the head too, '
            'such as the weights of its loss. Inherit the config, and set '
            'them there.')
    stock_classes = heads[0]['num_classes']
    for head in heads:
        if min_kept is not None and head.get('sampler'):
            head['sampler']['min_kept'] = min_kept
        if head['num_classes'] == stock_classes != num_classes:
            head['num_classes'] = num_classes
            for loss in as_list(head.get('loss_decode')):
                loss.pop('class_weight', None)
    return model, optim_wrapper


def insert_transform(dataloader: Dict, transform: Dict, before: str) -> Dict:
    """Insert a transform into every pipeline of a data loader.

    Wrapped datasets are found too, such as the two of PASCAL VOC with its
    augmentation.

    Args:
        dataloader (dict): Config of the data loader.
        transform (dict): Config of the transform.
        before (str): Type of the transform that it is put in front of.

    Returns:
        dict: Config of the new data loader.

    Raises:
        ValueError: If no pipeline has a transform of the type ``before``.
    """
    dataloader = copy.deepcopy(dict(dataloader))
    pipelines = _pipelines(dataloader, before)
    for pipeline in pipelines:
        pipeline.insert(
            _types(pipeline).index(before), copy.deepcopy(transform))
    if not pipelines:
        raise ValueError(f'no pipeline of the data loader has a {before!r} to '
                         f'put {transform["type"]!r} in front of.')
    return dataloader


def open_vocabulary_test(
    path: str,
    scale: Tuple[int, int],
    vocabulary: str,
    leave_out: Sequence[str] = ()
) -> Tuple[Dict, Dict[str, List[str]]]:
    """Get test data of a stock config with a vocabulary for its classes.

    Args:
        path (str): Path of the config below MMSegmentation's ``configs``.
        scale (tuple[int, int]): Longest and shortest side, in pixels, that
            images are brought to.
        vocabulary (str): Vocabulary, see :meth:`Vocabulary.from_spec`; a
            class that it lacks is described by its name.
        leave_out (Sequence[str]): Classes whose pixels are ignored. Defaults
            to (): none.

    Returns:
        tuple[dict, dict]: ``test_dataloader`` for a config that has another
        one, and the phrases of each class.

    Raises:
        FileNotFoundError: If there is no such config; near matches are
            listed.
        ValueError: If ``leave_out`` names a class that is not there.
    """
    loader = copy.deepcopy(_read_stock(path).test_dataloader.to_dict())
    dataset = loader['dataset']
    for transform in dataset['pipeline']:
        if type_name(transform) == 'Resize':
            transform['scale'] = scale
    classes = DATASETS.get(dataset['type']).METAINFO['classes']
    unknown = sorted(set(leave_out) - set(classes))
    if unknown:
        raise ValueError(f'`leave_out` names {unknown}, which are no classes '
                         f'of the data set; it has {list(classes)}.')
    kept = [name for name in classes if name not in leave_out]
    if leave_out:
        dataset['metainfo'] = dict(classes=kept)
    known = Vocabulary.from_spec(vocabulary)
    phrases = dict(zip(known.names, known.phrases))
    return (dict(loader, _delete_=True), {
        name: list(phrases.get(name, [name]))
        for name in kept
    })


def wide_label_test(data_root: str, img_path: str, seg_map_path: str,
                    scale: Tuple[int, int],
                    vocabulary: str) -> Tuple[Dict, Dict, List[Dict]]:
    """Configure test data of more classes than 8-bit label maps can hold.

    Images are ``.jpg``, label maps 16-bit ``.tif`` of the same name, see
    :class:`Load16BitAnnotations`; 65535 is ignored.

    Args:
        data_root (str): Folder of the data.
        img_path (str): Folder of the images below it.
        seg_map_path (str): Folder of the label maps below it.
        scale (tuple[int, int]): Longest and shortest side, in pixels, that
            images are brought to.
        vocabulary (str): Key of the vocabulary of its classes.

    Returns:
        tuple[dict, dict, list]: ``test_dataloader``, ``test_evaluator`` and
        ``tta_pipeline`` for a config that has others.
    """
    classes = list(Vocabulary.from_spec(vocabulary).names)
    ignored = dict(ignore_index=65535)
    image = dict(type='LoadImageFromFile')
    labels = [
        dict(type='Load16BitAnnotations'),
        dict(type='CheckLabels', num_classes=len(classes), **ignored)
    ]
    pack = dict(type='PackSegInputs')
    resize = dict(type='Resize', keep_ratio=True)
    # MMSegmentation's, with these labels.
    tta = dict(
        type='TestTimeAug',
        transforms=[[
            dict(resize, scale_factor=r)
            for r in (.5, .75, 1., 1.25, 1.5, 1.75)
        ], [dict(type='RandomFlip', prob=p) for p in (0., 1.)],
                    *[[t] for t in labels], [pack]])
    loader = dict(
        _delete_=True,
        batch_size=1,
        num_workers=4,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            data_root=data_root,
            data_prefix=dict(img_path=img_path, seg_map_path=seg_map_path),
            img_suffix='.jpg',
            seg_map_suffix='.tif',
            metainfo=dict(classes=classes),
            pipeline=[image, dict(resize, scale=scale), *labels, pack],
            **ignored))
    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], **ignored)
    return loader, evaluator, [image, tta]


def zero_shot(train_dataloader: Dict, vocabulary: str, unseen: Sequence[str],
              before: str) -> Tuple[Dict, Dict, Dict]:
    """Configure training without some classes and their evaluation.

    Args:
        train_dataloader (dict): Config of the data loader.
        vocabulary (str): Key of the vocabulary of its classes.
        unseen (Sequence[str]): Names of the classes to hide.
        before (str): Type of the transform that they are hidden in front of,
            the first behind ``LoadAnnotations`` that looks at labels.

    Returns:
        tuple[dict, dict, dict]: ``text_branch`` of the text head (to be
        merged into what it has), ``train_dataloader`` and ``val_evaluator``
        for a config.

    Raises:
        ValueError: If a class is not in the vocabulary, or as of
            :func:`insert_transform`.
    """
    names = Vocabulary.from_spec(vocabulary).names
    unknown = [name for name in unseen if name not in names]
    if unknown:
        raise ValueError(f'there are no classes {unknown} in the vocabulary '
                         f'{vocabulary!r}, which has {list(names)}.')
    indices = sorted(names.index(name) for name in unseen)
    train_dataloader = insert_transform(
        train_dataloader, dict(type='HideClasses', classes=indices), before)
    evaluator = dict(
        type='ZeroShotIoUMetric', iou_metrics=['mIoU'], unseen=list(unseen))
    return dict(unseen=indices, bias=False), train_dataloader, evaluator


def add_region_embeddings(dataloader: Dict, transform: Dict) -> Dict:
    """Add the loading of region embeddings to every training pipeline.

    Args:
        dataloader (dict): Config of the data loader.
        transform (dict): Config of the ``LoadRegionEmbeddings``, which is put
            directly behind ``LoadAnnotations``.

    Returns:
        dict: Config of the new data loader, whose pipelines end in
        ``PackRegionInputs`` instead of ``PackSegInputs``.

    Raises:
        ValueError: If no pipeline has a ``LoadAnnotations`` and a
            ``PackSegInputs``.
    """
    dataloader = copy.deepcopy(dict(dataloader))
    pipelines = _pipelines(dataloader, 'LoadAnnotations', 'PackSegInputs')
    for pipeline in pipelines:
        types = _types(pipeline)
        pipeline[types.index('PackSegInputs')]['type'] = 'PackRegionInputs'
        pipeline.insert(
            types.index('LoadAnnotations') + 1, copy.deepcopy(transform))
    if not pipelines:
        raise ValueError('no pipeline of the data loader has '
                         "'LoadAnnotations' and 'PackSegInputs'.")
    return dataloader


def _pipelines(dataloader: Dict, *types: str) -> List[List[Dict]]:
    """Pipelines with these transforms; data sets may share one."""
    return list({
        id(part): part
        for part in walk(dataloader) if {*types} <= {*_types(part)}
    }.values())


def _types(part: Any) -> List[str]:
    """Types of the transforms if a part of a config is a pipeline."""
    return [type_name(t) for t in part] if isinstance(part, list) else []
