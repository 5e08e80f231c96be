# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
import warnings
from typing import Dict, List, Set

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.phrases import (ambiguous_phrases, phrase_confidence,
                                       phrase_vectors)
from .class_embeddings import ClassEmbeddings
from .phrase_bank import PhraseBank

MODES = ('uniform', 'weighted', 'mean', 'max')


@MODELS.register_module()
class SynonymSampler(ClassEmbeddings):
    """Class embeddings that sample synonyms of the class names in training.

    In training a phrase of each class is sampled for each image, so that the
    network learns what the phrases have in common.
    The class embeddings, which are evaluated, folded and saved, are those of
    the first phrase of each class, the plain name. In stage 2 of a provider
    that learns, and for the scale and bias of this one, they are used in
    training too.

    Not used are phrases below the threshold, and those that stand for another
    class as well.

    Source: text diversification of `Global Knowledge Calibration
    <https://arxiv.org/abs/2303.09181>`_, section 3.2.

    Args:
        file (str): Embeddings file with a bank of phrases
            (``tools/encode_text.py KEY+synonyms --keep-bank``).
        num_classes (int): Number of classes K. The head passes its own.
        mode (str): 'uniform': each phrase is as probable. 'weighted': by its
            confidence. 'mean': their mean, for all images. 'max': all of
            them, of which the most similar one counts at each pixel.
            Defaults to 'uniform'.
        threshold (float): Least confidence of a phrase, see
            :func:`.phrases.phrase_confidence`. A class without a phrase above
            it keeps its plain name. Defaults to 0.1, as in the source.
        **kwargs: ``dim``, ``center``, ``classes`` and ``build``, see
            :class:`ClassEmbeddings`.

    Raises:
        ValueError: If an argument or the file does not fit, or the file has
            no bank.
    """

    def __init__(self,
                 file: str,
                 num_classes: int,
                 mode: str = 'uniform',
                 threshold: float = 0.1,
                 **kwargs) -> None:
        if mode not in MODES:
            raise ValueError(f'`mode` must be one of {MODES}, but got '
                             f'{mode!r}.')
        confidence = kwargs.pop('confidence', None)
        if confidence is not None:
            if confidence != 'text':
                raise ValueError(
                    f'`confidence`={confidence!r} is not known any more: the '
                    'confidence of a phrase is that of its text. Leave the '
                    'key out.')
            warnings.warn('`confidence` is deprecated: leave it out, there is '
                          'only that of the text.')
        if not 0 <= threshold < 1:
            raise ValueError(
                f'`threshold` must lie in [0, 1), but got {threshold}.')
        super().__init__(file, num_classes, **kwargs)
        self.mode, self.threshold = mode, threshold
        self._bank_hint = self._missing_hint
        if self.record is not None:
            self.phrase_bank = self._make_bank(phrase_confidence(self.record))

    def _rows(self, record: TextEmbeddings) -> Tensor:
        """Get the vectors of the class names."""
        try:
            return phrase_vectors(record)[0][:, 0]
        except ValueError as error:
            raise ValueError(f'{self.file}: {error}') from None

    def _make_bank(self, scores: Tensor) -> PhraseBank:
        """Build the bank of phrases to sample with their probabilities."""
        record = self.record
        assert record is not None
        vectors, mask = phrase_vectors(record)
        if self.shift is not None:
            vectors = F.normalize(vectors - self.shift, dim=2)
        ambiguous = ambiguous_phrases(record)
        clear = torch.zeros_like(mask)
        for k, phrases in enumerate(record.phrases):
            for r, phrase in enumerate(phrases):
                clear[k, r] = phrase not in ambiguous.get(k, ())
        used = clear & (scores >= self.threshold)
        # A class has its plain name, if nothing else.
        used[:, 0] |= ~used.any(dim=1)
        weight = used.float()
        if self.mode == 'weighted':
            weight = weight * scores.clamp(min=1e-6)
        self._log(ambiguous, used, clear)
        mode = 'draw' if self.mode in ('uniform', 'weighted') else self.mode
        return PhraseBank(vectors, weight / weight.sum(dim=1, keepdim=True),
                          mode)

    def _log(self, ambiguous: Dict[int, Set[str]], used: Tensor,
             clear: Tensor) -> None:
        """Log which phrases are used and which are not."""
        record = self.record
        assert record is not None
        number = sum(map(len, record.phrases))
        doubtful: List[str] = [
            f'{phrase!r} ({name})' for k, name in enumerate(record.names)
            for r, phrase in enumerate(record.phrases[k])
            if clear[k, r] and not used[k, r]
        ]
        print_log(
            f'{self.file}: {int(used.sum())} of {number} phrases of '
            f'{len(record)} classes are used in training. Below the threshold '
            f'{self.threshold}: {", ".join(doubtful) or "none"}.', 'current')
        if ambiguous:
            words = sorted({p for ps in ambiguous.values() for p in ps})
            print_log(
                f'{self.file}: not used because they stand for another class '
                f'too: {words}.', 'current', logging.WARNING)

    def start_learning(self) -> None:
        """Enter stage 2, in which scale and bias learn with what is deployed.
        """
        self.learning = self.can_compute
