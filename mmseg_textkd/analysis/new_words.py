# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What a trained network does with words that it was not trained with."""
import hashlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from torch import Tensor, nn

from ..apis.class_encoder import ClassEncoder
from ..apis.text_seg_inferencer import load_network
from ..models import TextHeadMixin
from ..models.new_words import NEW_WORDS, place_new_words
from ..models.record_calls import record_calls
from ..utils.checkpoint import read_checkpoint
from ..utils.progress import track

TRAINED, ALL_NEW, RANDOM = 'trained names', 'all new', 'random vectors'
MAPS = 16  # at the size of the label map, at a time; fewer than twice that


class Arm(NamedTuple):
    """A list of words, and how the vectors of new ones are used.

    Attributes:
        name (str): What it is called in the ledger.
        rows (list[int]): For each class the map that stands for it.
        words (list[str]): The words.
    """
    name: str
    rows: List[int]
    words: List[str]


def measure_new_words(cfg: Config,
                      checkpoint: Path,
                      data: Config,
                      words: Mapping[str, str],
                      embeddings: Path,
                      study: str = 'new_words',
                      network: str = '',
                      stride: int = 2) -> Iterator[Dict[str, Any]]:
    """Ask a network for other words, and score the answers.

    The features of each image are computed once; then all words are
    classified, and each list of words takes the most probable of its own.

    Args:
        cfg (Config): Config of a network with a linear text classifier.
        checkpoint (Path): Its weights.
        data (Config): Config whose ``val_dataloader`` has the images.
        words (Mapping[str, str]): For classes of these data a word that was
            not trained.
        embeddings (Path): Embeddings file with the vectors of these words.
        study (str): Name in the ledger. Defaults to 'new_words'.
        network (str): Name in the ledger. Defaults to '', the backbone.
        stride (int): Every how many pixels of the label maps are scored.
            Defaults to 2.

    Yields:
        dict: Entries for a :class:`Ledger`: with the trained names, if they
        are those of the data; all words new; random vectors; and, beside
        trained names, one word new at a time.

    Raises:
        ValueError: If a word is for no class, a class has neither a trained
            name nor a word, the network has no linear text classifier, or it
            tests in windows.
    """
    model, meta = load_network(cfg, checkpoint)
    model.eval()
    head = model.decode_head
    if not (isinstance(head, TextHeadMixin) and head.role == 'classifier'
            and head.text_branch.projection.norm != 'l2'):
        raise ValueError('a text classifier that is linear in its vectors is '
                         f'needed, but {cfg.model.decode_head.type} has none.')
    if model.test_cfg.get('mode') == 'slide':
        raise ValueError('the config tests in windows, but whole images are '
                         'scored: --cfg-options model.test_cfg.mode=whole')
    dataset = DATASETS.build(data.val_dataloader.dataset)
    classes, trained = list(dataset.metainfo['classes']), meta['classes']
    unknown = sorted(set(words) - set(classes))
    lost = [k for k in classes if k not in trained and k not in words]
    if unknown or lost:
        raise ValueError(
            f'words are given for {unknown}, which are no classes of the '
            f'data, and none for {lost}, which were not trained.')
    branch = head.text_branch
    encoder = ClassEncoder(branch.text, cfg.model.decode_head.text, trained)
    new = encoder.encode(
        list(dict.fromkeys(words.values())), embeddings=embeddings)
    own, seen = branch.text.class_embeddings, branch.text.trained_vectors()
    bias = own.new_zeros(len(own))
    if branch.logit_bias is not None:
        bias = branch.logit_bias.detach()
    random = F.normalize(
        torch.randn(
            len(classes),
            own.shape[1],
            generator=torch.Generator().manual_seed(0)),
        dim=1)
    # Maps: the trained words, the new ones in each way, random ones.
    blocks = [own] + [
        place_new_words(new.vectors, seen, how) for how in NEW_WORDS
    ] + [place_new_words(random, seen, how) for how in ('unit', 'raw')]
    biases = torch.cat([bias, bias.mean().expand(sum(map(len, blocks[1:])))])
    conv = branch.as_conv(torch.cat(blocks), biases)
    arms = _arms(classes, trained, words, list(new.names))
    confusions = _score(model, conv, dataset, arms, stride)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    saved = read_checkpoint(checkpoint)['meta']
    for arm, confusion in zip(arms, confusions):
        both = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = 100 * confusion.diagonal().double() / both
        yield dict(
            study=study,
            network=network or type(model.backbone).__name__,
            arm=arm.name,
            seed=int(saved.get('seed') or 0),
            train_fraction=1.,
            config_hash=digest,
            iterations=int(saved.get('iter', 0)),
            classes=classes,
            words=arm.words,
            images=len(dataset),
            stride=stride,
            aligned=True,
            checkpoint=checkpoint.name,
            val=dict(
                mIoU=round(iou[both > 0].mean().item(), 2),
                IoU=[
                    round(v, 2) if n else None
                    for v, n in zip(iou.tolist(), both.tolist())
                ]),
            curve=[])


def _arms(classes: Sequence[str], trained: Sequence[str],
          words: Mapping[str, str], new: Sequence[str]) -> List[Arm]:
    """The lists of words, and where their maps are."""
    number = len(trained)

    def place(word: str, how: str) -> int:
        block = NEW_WORDS.index(how)
        return number + block * len(new) + new.index(word)

    def row(name: str, how: str, replaced: Sequence[str]) -> int:
        if name in replaced or name not in trained:
            return place(words[name], how)
        return list(trained).index(name)

    arms = []
    if all(name in trained for name in classes):
        arms.append(
            Arm(TRAINED, [list(trained).index(n) for n in classes],
                list(classes)))
    for how in NEW_WORDS:
        arms.append(
            Arm(f'{ALL_NEW}, {how}', [row(n, how, words) for n in classes],
                [words.get(n, n) for n in classes]))
    start = number + len(NEW_WORDS) * len(new)
    for block, how in enumerate(('unit', 'raw')):
        first = start + block * len(classes)
        arms.append(
            Arm(f'{RANDOM}, {how}', list(range(first, first + len(classes))),
                ['-'] * len(classes)))
    if arms[0].name == TRAINED:
        for name in words:
            for how in ('unit', 'raw'):
                arms.append(
                    Arm(f'{name} -> {words[name]}, {how}',
                        [row(n, how, [name]) for n in classes],
                        [words[n] if n == name else n for n in classes]))
    return arms


@torch.no_grad()
def _score(model: nn.Module, conv: nn.Module, dataset: Any,
           arms: Sequence[Arm], stride: int) -> List[Tensor]:
    """Confusions (label, prediction) of each list of words."""
    number = len(dataset.metainfo['classes'])
    confusions = [torch.zeros(number, number, dtype=torch.long) for _ in arms]
    head = model.decode_head
    for index in track(range(len(dataset)), 'Scoring'):
        batch = model.data_preprocessor(
            pseudo_collate([dataset[index]]), False)
        sample, = batch['data_samples']
        with record_calls(head.conv_seg) as calls:
            model.encode_decode(batch['inputs'], [sample.metainfo])
        labels = sample.gt_sem_seg.data[0, ::stride, ::stride]
        scores = conv(calls[0][0])
        # As the network itself resizes and crops, some maps at a time.
        maps = torch.cat([
            model.postprocess_result(
                head.predict_by_feat(part, [sample.metainfo]),
                [sample])[0].seg_logits.data[:, ::stride, ::stride].clone()
            for part in scores.tensor_split(
                max(scores.shape[1] // MAPS, 1), dim=1)
        ])
        valid = labels < number
        truth, maps = number * labels[valid], maps[:, valid]
        for arm, confusion in zip(arms, confusions):
            predicted = maps[arm.rows].argmax(dim=0)
            confusion += torch.bincount(
                truth + predicted, minlength=number**2).view(number, number)
    return confusions
