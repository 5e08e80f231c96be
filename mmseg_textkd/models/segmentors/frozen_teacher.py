# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.utils.checkpoint import (build_segmentor, checksum,
                                           class_names, read_checkpoint)
from mmseg_textkd.utils.config import load_config
from ..record_calls import record_calls
from .normalization import renormalize


@MODELS.register_module()
class FrozenTeacher:
    """Frozen segmentation network used as teacher.

    It is no module: it is in no module tree, state dict or optimizer, and
    gets no gradient. It is loaded on first use and moved to the device of its
    inputs. Copies of a student share it.

    Args:
        config (str): Path of its config, of a stock network or one of ours.
        checkpoint (str): Path of its checkpoint; auxiliary heads, which are
            not needed, may be missing.
        cfg_options (dict, optional): Settings of the config to override.
            Defaults to None.
        embeddings (bool): Whether it outputs pixel embeddings in the space of
            text, as :class:`EBSeg` has them, instead of logits and features.
            It may have other classes than the student then. Defaults to False.
    """

    def __init__(self,
                 config: str,
                 checkpoint: str,
                 cfg_options: Optional[Dict] = None,
                 embeddings: bool = False) -> None:
        self.embeddings = embeddings
        self.config, self.checkpoint = osp.normpath(config), checkpoint
        self.cfg_options = cfg_options
        self._model: Any = None
        self._classes: Optional[Tuple[str, ...]] = None

    def __deepcopy__(self, memo: Dict) -> 'FrozenTeacher':
        return self

    @property
    def model(self) -> nn.Module:
        """nn.Module: The network, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such config or checkpoint.
            ValueError: If the checkpoint is damaged or of another network.
        """
        if self._model is None:
            self._load()
        return self._model

    @property
    def classes(self) -> Optional[Tuple[str, ...]]:
        """tuple[str], optional: Its classes, as the checkpoint names them."""
        self.model
        return self._classes

    @property
    def name(self) -> str:
        """str: Name of the teacher in messages."""
        return self.config

    @property
    def num_classes(self) -> Optional[int]:
        """int, optional: Number of classes of its logits, if it has any."""
        if self.embeddings:
            return None
        model: Any = self.model
        head = model.decode_head
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        channels: Any = head.out_channels
        return channels

    def checksum(self) -> str:
        """Hash all weights, to prove that training has not changed them.

        Returns:
            str: See :func:`mmseg_textkd.utils.checkpoint.checksum`.
        """
        return checksum(self.model)

    def _load(self) -> None:
        path = Path(self.checkpoint)
        if not path.is_file():
            raise FileNotFoundError(
                f'There is no checkpoint {path} of the teacher '
                f'{self.config}. Train it (`python tools/train.py '
                f'{self.config}`), or name another: --cfg-options '
                'model.teacher.checkpoint=PATH')
        cfg = load_config(self.config, self.cfg_options)
        saved = read_checkpoint(path)
        # The random numbers of the student must not depend on its teacher.
        with torch.random.fork_rng(devices=[]):
            model = build_segmentor(cfg.model, saved['state_dict'], path)
        self._model = model.requires_grad_(False)
        self._classes = class_names(saved['meta'])

    @torch.no_grad()
    def __call__(self, inputs: Tensor,
                 preprocessor: SegDataPreProcessor) -> Dict[str, Tensor]:
        """Compute logits and features, or embeddings, of a batch.

        Args:
            inputs (Tensor): Normalized images of the student, with shape
                (N, 3, H, W).
            preprocessor (SegDataPreProcessor): That of the student.

        Returns:
            dict[str, Tensor]: ``logits`` with shape (N, K, h, w) and, of a
            head with a ``conv_seg``, what enters it, ``features``, with shape
            (N, C, h, w). Or ``embeddings``, with shape (N, D, h, w).

        Raises:
            ValueError: If the network gives no such logits or embeddings.
        """
        model: Any = self.model.to(inputs.device)
        inputs = renormalize(inputs, preprocessor, model.data_preprocessor)
        if self.embeddings:
            if not hasattr(model, 'pixel_embeddings'):
                raise ValueError(
                    f'the {type(model).__name__} of the teacher {self.config} '
                    'has no pixel embeddings, as EBSeg has them, to distill; '
                    'leave `embeddings` out.')
            return dict(embeddings=model.pixel_embeddings(inputs))
        head = model.decode_head
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        classifier = getattr(head, 'conv_seg', None)
        with record_calls(classifier) as calls:
            logits = model(inputs, mode='tensor')
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            raise ValueError(
                f'the head {type(head).__name__} of the teacher '
                f'{self.config} gives no logits for each pixel and class and '
                'cannot be a teacher.')
        if hasattr(model, 'pixel_embeddings') and logits.shape[1] > 1:
            # EBSeg gives scores in [0, 1], but of one class, for logits.
            logits = logits.clamp(min=1e-8).log()
        if len(calls) != 1:
            return dict(logits=logits)
        return dict(logits=logits, features=calls[0][0])
