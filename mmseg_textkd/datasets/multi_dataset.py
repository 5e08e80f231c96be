# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
import torch.nn.functional as F
from mmengine.dataset import ConcatDataset
from mmengine.structures import InstanceData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch import Tensor

from ..utils.config import as_list
from .label_spaces import Relations, all_words, label_space, narrower_words


@DATASETS.register_module()
class MultiDataset(ConcatDataset):
    """Several data sets with different classes, whose names are the labels.

    Each data set keeps its pipeline, its labels and its checks. Behind its
    pipeline the labels become words: classes of the same name, in whichever
    data sets, are one word, and the K words of all data sets, in the order in
    which they first appear, are the ``classes`` of this one. Each sample gets
    as ``metainfo`` the name of its ``dataset`` and, as its ``label_space``,
    for each of the K words the index of the word that it counts as in this
    data set, -1 for none, so that :class:`MultiDatasetEncoderDecoder` can
    train it against the names of its own data set only, and
    :class:`DatasetIoUMetric` can evaluate it among them.

    Classes that are the same but are called otherwise are made one by
    ``words``, and so are different ones of the same name told apart.
    ``relations`` say that a word is wider than others: a pixel that a data
    set labels with the wider word is right under any of those narrower ones
    that are not classes of the same data set themselves.

    Args:
        datasets (Sequence[dict]): Configs of the data sets, whose pipelines
            end in ``PackSegInputs``.
        names (Sequence[str]): A name for each of them.
        words (Mapping[str, Mapping[str, str]], optional): By the name of a
            data set, the words of those of its classes that are not to be
            called by their own names. Defaults to None.
        relations (Mapping[str, Sequence[str]], optional): For a wider word
            those that are narrower. Defaults to None.
        ignore_index (int): Label that stays as it is. Defaults to 255.
        lazy_init (bool): As of ``ConcatDataset``. Defaults to False.

    Raises:
        ValueError: If names do not fit, ``words`` name what is not there,
            ``relations`` go in a circle, name an unknown word or leave open
            what a word means, or there are more words than labels.

    Examples:
        >>> dataset = dict(
        >>>     type='MultiDataset',
        >>>     names=['camvid', 'cityscapes'],
        >>>     datasets=[camvid, cityscapes],
        >>>     words=dict(camvid=dict(pavement='sidewalk')),
        >>>     relations=dict(signsymbol=['traffic sign', 'traffic light']))
    """

    def __init__(self,
                 datasets: Sequence[dict],
                 names: Sequence[str],
                 words: Optional[Mapping[str, Mapping[str, str]]] = None,
                 relations: Optional[Relations] = None,
                 ignore_index: int = 255,
                 lazy_init: bool = False) -> None:
        names = list(names)
        if len(names) != len(datasets) or len(set(names)) < len(names):
            raise ValueError(
                f'`names` must be a name of its own for each of the '
                f'{len(datasets)} data sets, but are {names}.')
        unknown = sorted(set(words or {}) - set(names))
        if unknown:
            raise ValueError(f'`words` are given for {unknown}, but the data '
                             f'sets are {names}.')
        built = [DATASETS.build(dataset) for dataset in datasets]
        keys = {key for dataset in built for key in dataset.metainfo}
        super().__init__(built, lazy_init, ignore_keys=sorted(keys))
        self.names, self.ignore_index = names, ignore_index
        own = [
            _words_of(name, dataset.metainfo['classes'],
                      (words or {}).get(name) or {})
            for name, dataset in zip(names, built)
        ]
        union = all_words(own)
        if len(union) > ignore_index >= 0:
            raise ValueError(
                f'{len(union)} words need more labels than there are below '
                f'ignore_index={ignore_index}; set another one here, in heads '
                'and evaluators, and as `seg_pad_val` of the preprocessor.')
        below = narrower_words(relations or {}, union)
        colors: Dict[str, Any] = {}
        for labels, dataset in zip(own, built):
            palette = dataset.metainfo.get('palette') or []
            for word, color in zip(labels, palette):
                colors.setdefault(word, list(color))
        self._metainfo = dict(
            classes=union,
            palette=[colors.get(word, [0, 0, 0]) for word in union],
            label_spaces={
                name:
                dict(
                    words=list(dict.fromkeys(labels)),
                    space=label_space(labels, union, below))
                for name, labels in zip(names, own)
            })
        self._to_word = [
            torch.tensor([union.index(word) for word in labels])
            for labels in own
        ]

    def __getitem__(self, idx: int) -> Dict[str, Any]:
        """Get a sample, its labels turned into words.

        Args:
            idx (int): Index over all data sets.

        Returns:
            dict: ``inputs`` and ``data_samples``, as of ``PackSegInputs``.

        Raises:
            TypeError: If the pipeline does not end in ``PackSegInputs``.
            ValueError: If a label is beyond the classes of the data set.
        """
        results = super().__getitem__(idx)
        number = self._get_ori_dataset_idx(idx)[0]
        name = self.names[number]
        if not isinstance(results, dict) or 'data_samples' not in results:
            raise TypeError(f'the pipeline of {name!r} must end in '
                            'PackSegInputs.')
        space = self._metainfo['label_spaces'][name]['space']
        for sample in as_list(results['data_samples']):
            sample.set_metainfo(dict(dataset=name, label_space=space))
            self._translate(sample, number)
        return results

    def _translate(self, sample: SegDataSample, number: int) -> None:
        """Turn the labels of a data set into words, in place."""
        if 'region_embeddings' in sample:
            regions = sample.region_embeddings
            present, place = self._to_word[number][regions.labels].unique(
                return_inverse=True)
            # Of several classes by one word the mean of their regions.
            sums = regions.vectors.new_zeros(
                len(present), regions.vectors.shape[1])
            sums.index_add_(0, place, regions.vectors)
            sample.region_embeddings = InstanceData(
                labels=present, vectors=F.normalize(sums, dim=1))
        if 'gt_sem_seg' not in sample:
            return
        labels: Tensor = sample.gt_sem_seg.data.long()
        # The label maps may ignore another label than what becomes of them.
        own = getattr(self.datasets[number], 'ignore_index', 255)
        known = (labels != own) & (labels != self.ignore_index)
        to_word = self._to_word[number]
        odd = known & ((labels < 0) | (labels >= len(to_word)))
        if odd.any():
            raise ValueError(
                f'{self.names[number]}: the label map '
                f'{sample.metainfo.get("seg_map_path", "of a sample")} has '
                f'the labels {labels[odd].unique().tolist()[:10]}, beyond '
                f'its {len(to_word)} classes.')
        words = torch.full_like(labels, self.ignore_index)
        words[known] = to_word[labels[known]]
        sample.gt_sem_seg.data = words


def _words_of(name: str, classes: Sequence[str],
              renamed: Mapping[str, str]) -> List[str]:
    """The word of each class of a data set."""
    unknown = sorted(set(renamed) - set(classes))
    if unknown:
        raise ValueError(f'`words` rename the classes {unknown} of {name!r}, '
                         f'which has {list(classes)}.')
    return [renamed.get(label, label) for label in classes]
