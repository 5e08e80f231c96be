# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.utils import SampleList
from torch import Tensor, nn

from mmseg_textkd.text import TextEmbeddings, Vocabulary
from .drawing import GREY, palette_for
from .label_map_inferencer import LabelMapInferencer
from .label_maps import predict_labels
from .open_network import classifier_of, load_network

Names = Sequence[str]
MAX_CLASSES = 65535  # label maps are written as 16-bit PNG


class TextSegInferencer(LabelMapInferencer):
    """Segment pictures into classes that are named after the training.

    The classifier of a network that has learned with text is the product of a
    projection and of the vectors of its class names. :meth:`set_classes`
    takes vectors of other names and folds again; nothing is trained, nothing
    else in the network changes, and it costs as much as a stock network with
    that many classes. :class:`EBSeg` compares its masks with the new vectors.
    Everything else is as of MMSegmentation's inferencer.

    With a folded checkpoint, in which the projection is not any more, only
    its own classes, or some of them, can be chosen.

    Args:
        config (str | Path | Config): Config of a text network, of the stock
            network that it has been folded into, or of an EBSeg.
        checkpoint (str | Path): Its weights.
        device (str, optional): Defaults to None: a GPU if there is one.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
        font (str, optional): A TrueType font for legends. Defaults to None:
            DejaVu Sans.
        cfg_options (dict, optional): Settings of the config to override.
            Defaults to None.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If the checkpoint is damaged or of another network.

    Examples:
        >>> inferencer = TextSegInferencer('CONFIG.py', 'CHECKPOINT.pth')
        >>> inferencer.set_classes(['road', 'tree', 'bus stop'])
        >>> inferencer('picture.png', out_dir='results')
    """

    def __init__(self,
                 config: Union[str, Path, Config],
                 checkpoint: Union[str, Path],
                 device: Optional[str] = None,
                 cache_dir: Optional[Union[str, os.PathLike]] = None,
                 font: Optional[str] = None,
                 cfg_options: Optional[Dict] = None) -> None:
        if not isinstance(config, Config):
            config = Config.fromfile(config)
        config.merge_from_dict(cfg_options or {})
        config.setdefault('visualizer', dict(type='SegLocalVisualizer'))
        self.cache_dir, self.font = cache_dir, font
        self.threshold: Optional[float] = None
        super().__init__(config, str(checkpoint), device=device)

    def _init_model(self,
                    cfg: Config,
                    weights: str,
                    device: str = 'cpu') -> nn.Module:
        """Load the network, and find out how it takes words."""
        model, meta = load_network(cfg, Path(weights))
        self._load_weights_to_model(model, dict(meta=meta), cfg)
        model.to(device).eval()
        self.own_meta = dict(model.dataset_meta)
        self.classifier = classifier_of(model, self.own_meta['classes'],
                                        self.cache_dir)
        self.source = 'as trained'
        return model

    def _load_weights_to_model(self, model: nn.Module, checkpoint: Dict,
                               cfg: Config) -> None:
        """Note the classes; the weights have been loaded."""
        meta = checkpoint['meta'].get('dataset_meta') or {}
        number = model.decode_head.num_classes
        classes = meta.get('classes') or [f'class {i}' for i in range(number)]
        if len(classes) != number:
            raise ValueError(f'the network has {number} classes, but its '
                             f'checkpoint names {len(classes)}: {classes}')
        palette = meta.get('palette') or [None] * number
        model.dataset_meta = dict(
            classes=tuple(classes), palette=palette_for(palette))

    @property
    def vectors(self) -> Optional[Tensor]:
        """Tensor, optional: Vectors of the classes, shape (K, D)."""
        return self.classifier.vectors

    def set_classes(
            self,
            classes: Any = None,
            other: Optional[str] = None,
            threshold: Optional[float] = None,
            new_bias: float = 0.,
            tower: Optional[str] = None,
            pretrained: Optional[str] = None,
            templates: Any = None,
            embeddings: Optional[Union[str, os.PathLike]] = None) -> None:
        """Choose the classes.

        Args:
            classes: Names (a list), names with phrases (a dict), a
                vocabulary's key or file. None: those of ``embeddings``, or
                the trained ones.
            other (str, optional): A word for everything else, such as
                'other': one more class, the last. Defaults to None.
            threshold (float, optional): Pixels whose most probable class is
                less probable than this become ``other``; with EBSeg, whose
                score is lower. With ``other=None`` that is a label named
                'other' which is no class. Defaults to None.
            new_bias (float): Added to the logits of new classes, see
                :meth:`TextHeadClassifier.fold`; not for EBSeg. Defaults to 0.
            tower, pretrained, templates, embeddings: See
                :meth:`WordEncoder.encode`.

        Raises:
            FileNotFoundError: If there is no such file.
            TextTowerError: If the tower cannot be had.
            ValueError: If there is no class, one occurs twice or is too long,
                or the network cannot know the new ones. The classes stay as
                they were then.
        """
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError('`threshold` is a probability between 0 and 1, '
                             f'but got {threshold}.')
        if classes is None:
            classes = list(self.own_meta['classes'])
            if embeddings is not None:
                classes = TextEmbeddings.load(embeddings).names
        if other is not None:
            words = Vocabulary.from_spec(classes)
            classes = Vocabulary((*words.names, other),
                                 (*words.phrases, (other, )))
        found = self.classifier.encode(
            classes,
            tower=tower,
            pretrained=pretrained,
            templates=templates,
            embeddings=embeddings)
        names, number = found.names, len(found.names)
        if len(names) > MAX_CLASSES:
            raise ValueError(f'{len(names)} classes are more than the '
                             f'{MAX_CLASSES} that a label map can hold.')
        own = self.own_meta['palette']
        colours = [None if k is None else own[k] for k in found.trained]
        if other is not None:
            colours[-1] = GREY
        palette = palette_for(colours)
        if threshold is not None and other is None:
            names, palette = (*names, 'other'), [*palette, GREY]
        if len(set(names)) < len(names):
            raise ValueError("a class is called 'other' already; give it as "
                             '`other`.')
        self.classifier.take(found, new_bias)
        self.model.dataset_meta = dict(classes=tuple(names), palette=palette)
        self.threshold, self.source = threshold, found.source
        print_log(f'{number} classes: {self.source}', 'current')

    @torch.no_grad()
    def forward(self, inputs: dict, similarity: Names = ()) -> SampleList:
        """Predict a batch.

        Args:
            inputs (dict): A batch of the pipeline.
            similarity (Sequence[str]): Classes whose cosine with every pixel
                is wanted too. Defaults to ().

        Returns:
            list[SegDataSample]: With ``pred_sem_seg`` and, if it is wanted,
            ``similarity``, float32, shape (n, H, W).
        """
        batch = self.model.data_preprocessor(inputs, False)
        images, samples = batch['inputs'], batch['data_samples']
        other = len(self.classes) - 1
        samples = predict_labels(self.classifier, images, samples,
                                 self.threshold, other)
        if similarity:
            found = self.classifier.similarities(images, samples,
                                                 self._rows(similarity))
            for sample, maps in zip(samples, found):
                sample.similarity = PixelData(
                    metainfo=dict(names=tuple(similarity)), data=maps)
        return samples

    def _rows(self, names: Names) -> List[int]:
        """Numbers of classes that have vectors."""
        # A label that is no class, as of a threshold, has no vector.
        known = list(self.classes[:self.model.out_channels])
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f'no similarity with {unknown}: the classes are '
                             f'{known[:20]}; call `set_classes` first.')
        return [known.index(name) for name in names]
