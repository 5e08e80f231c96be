# Copyright (c) mmseg_textkd contributors. All rights reserved.
import warnings
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.clip.text_tower import TextTower, load_tower
from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.text.vocabulary import Vocabulary
from .prompt_learner import PromptLearner


@MODELS.register_module()
class ContextPromptLearner(PromptLearner):
    r"""Learnable context vectors in the token space of the text tower.

    The prompt of class k is ``[SOS] v_1 ... v_M name_k . [EOS]``, encoded by
    the frozen tower, through which the gradient flows to the vectors
    :math:`v_m`. The tower is there when stage 2 starts and not before (but to
    be looked at once), is no part of the module tree, and so is in no
    optimizer and no checkpoint.

    Source: `Learning to Prompt for Vision-Language Models
    <https://arxiv.org/abs/2109.01134>`_, section 3.2. With
    ``context_length=16, class_specific=True, suffix=''`` the prompts are
    those of `Lin, Chen and Wu
    <https://doi.org/10.1109/APSIPAASC58517.2023.10317179>`_.

    Args:
        embeddings (dict): Config of the fixed provider for stage 1, made with
            the same tower.
        num_classes (int): Number of classes K. The head passes its own.
        model (str): Name of the tower, see :class:`TextTower`.
        pretrained (str, optional): Tag or file of its weights. Defaults to
            None.
        token_dim (int): Width d of the tower's tokens, needed here because
            the optimizer is built before the tower is loaded. Defaults to
            512.
        n_ctx (int, optional): Number of context vectors M. Defaults to None:
            16, or what ``context_length`` leaves.
        context_length (int, optional): Greatest number of tokens of a whole
            prompt. Without ``n_ctx`` five of them are for SOS, the class name
            and EOS, as Lin, Chen and Wu have it, and the rest are context
            vectors. Defaults to None: that of the tower.
        class_specific (bool): Whether each class has vectors of its own.
            Defaults to False.
        suffix (str): What follows the class name. Defaults to '.'.
        init (str, optional): Words to start the context from, of as many
            tokens as ``n_ctx``. Defaults to None: N(0, 0.02²).
        vocabulary (str | dict | Sequence[str], optional): Where the names to
            encode come from; the first phrase of each class is taken.
            Defaults to None: the phrases in the embeddings file.
        cache_dir (str, optional): Folder of downloaded weights. Defaults to
            None: that of open_clip.
        position (str, optional): Deprecated.
    """

    def __init__(self,
                 embeddings: dict,
                 num_classes: int,
                 model: str,
                 pretrained: Optional[str] = None,
                 token_dim: int = 512,
                 n_ctx: Optional[int] = None,
                 context_length: Optional[int] = None,
                 class_specific: bool = False,
                 suffix: str = '.',
                 init: Optional[str] = None,
                 vocabulary: Optional[Union[str, dict, Sequence[str]]] = None,
                 cache_dir: Optional[str] = None,
                 position: Optional[str] = None) -> None:
        super().__init__(embeddings, num_classes)
        if position is not None:
            if position != 'end':
                raise ValueError(
                    f'`position`={position!r} is not known any more: the '
                    'class name stands at the end. Leave the key out.')
            warnings.warn('`position` is deprecated: leave it out, the class '
                          'name stands at the end.')
        if n_ctx is None:
            n_ctx = 16 if context_length is None else context_length - 5
        if n_ctx < 1:
            raise ValueError(
                f'`n_ctx` must be at least 1, but got {n_ctx}'
                f'{f" of {context_length} tokens" if context_length else ""}.')
        self.model, self.pretrained = model, pretrained
        self.token_dim, self.n_ctx = token_dim, n_ctx
        self.context_length = context_length
        self.suffix, self.init = suffix, init
        self.vocabulary, self.cache_dir = vocabulary, cache_dir
        shape = (num_classes, n_ctx,
                 token_dim) if class_specific else (n_ctx, token_dim)
        self.context = nn.Parameter(torch.empty(shape).normal_(std=0.02))
        # Out of nn.Module's sight on purpose: see the class docstring.
        self.__dict__['tower'] = None

    @property
    def can_compute(self) -> bool:
        """bool: Whether the tower is loaded."""
        return self.__dict__['tower'] is not None

    def class_rows(self) -> List[str]:
        """Name the weights with a row for each class.

        Returns:
            list[str]: Their names; a context that all classes share is none.
        """
        shared = self.context.dim() == 2
        return [
            k for k in super().class_rows() if not shared or k != 'context'
        ]

    def phrases(self) -> List[str]:
        """Get the phrase of each class in its prompt.

        Returns:
            list[str]: One phrase for each class.

        Raises:
            ValueError: If their number is not the number of classes.
        """
        if self.vocabulary is not None:
            vocabulary = Vocabulary.from_spec(self.vocabulary, self.names)
            if self.names is not None and vocabulary.names != self.names:
                raise ValueError(
                    'the prompts\' vocabulary has the classes '
                    f'{list(vocabulary.names)}, but the embeddings have '
                    f'{list(self.names)}.')
            phrases = [p[0] for p in vocabulary.phrases]
        elif self.record is not None:
            phrases = [words[0] for words in self.record.phrases]
        else:
            raise ValueError('ContextPromptLearner has no class names; give '
                             '`vocabulary`.')
        if len(phrases) != self.num_classes:
            raise ValueError(f'{len(phrases)} class names for '
                             f'{self.num_classes} classes: {phrases}')
        return phrases

    def prepare(self) -> None:
        """Load the tower and tokenize the prompts.

        Raises:
            ValueError: If the widths differ, a prompt is longer than the
                tower's context, or the words of ``init`` are not ``n_ctx``
                tokens.
        """
        tower = load_tower(self.model, self.pretrained, self.cache_dir)
        if (tower.token_dim, tower.dim) != (self.token_dim, self.dim):
            raise ValueError(
                f'the tower {self.model!r} has tokens of width '
                f'{tower.token_dim} and embeddings of width {tower.dim}, but '
                f'the config says token_dim={self.token_dim} and its class '
                f'embeddings have width {self.dim}. Use embeddings made with '
                f'this tower and token_dim={tower.token_dim}.')
        self.__dict__['tower'] = tower.to(self.context.device)
        self.__dict__['prompts'] = self._build_prompts(tower, self.phrases(),
                                                       self.context_length)
        if self.init is not None and not self.started:
            self._init_from_words(tower)

    def check_stage2(self) -> None:
        """Check before stage 1 what stage 2 will need, and keep nothing.

        Raises:
            RuntimeError: If the vectors to start from are missing.
            ValueError: As of :meth:`prepare`.
        """
        super().check_stage2()
        # A run goes on as one that has not looked.
        context = self.context.detach().clone()
        with torch.random.fork_rng(devices=[]):
            self.prepare()
        self.context.data.copy_(context)
        self._forget_tower()

    def _forget_tower(self) -> None:
        self.__dict__['tower'] = None
        del self.__dict__['prompts']

    def check_loaded(self, resumed: bool) -> Optional[str]:
        """Compare loaded class embeddings with those of the config.

        Prompts that have learned in a run before this one need the tower for
        it.

        Args:
            resumed (bool): Whether the run is a resumed one.

        Returns:
            str, optional: What was done, if there was a difference.

        Raises:
            TextTowerError: If the run is resumed and has no tower.
            ValueError: If the run is resumed and its text has changed.
        """
        if self.can_compute or not (self.started and self.has_base):
            return super().check_loaded(resumed)
        try:
            with torch.random.fork_rng(devices=[]):
                self.prepare()
        except TextTowerError as error:
            if resumed:
                raise
            return f'the text is that of the checkpoint, since {error}'
        message = super().check_loaded(resumed)
        self._forget_tower()
        return message

    def _build_prompts(self,
                       tower: TextTower,
                       phrases: Sequence[str],
                       max_length: Optional[int] = None) -> Tuple[Tensor, int]:
        """Get the token ids of the prompts, with room for the context, and
        where it starts.
        """
        return tower.build_prompts(phrases, self.n_ctx, self.suffix,
                                   max_length)

    @torch.no_grad()
    def _init_from_words(self, tower: TextTower) -> None:
        assert self.init is not None
        ids, start, (num, ) = tower.find_word_tokens([self.init])
        if num != self.n_ctx:
            raise ValueError(
                f'init={self.init!r} has {num} tokens, so set n_ctx={num} '
                f'(it is {self.n_ctx}).')
        words = tower.embed_tokens(ids)
        self.context.copy_(words[0, start:start + num].expand_as(self.context))
        print_log(
            f'Prompt context starts from the words {self.init!r}.',
            logger='current')

    def compute(self) -> Tensor:
        """Encode the prompts with the frozen tower.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D).
        """
        return self._encode(self.tower, *self.prompts)

    @torch.no_grad()
    def encode_phrases(self, tower: TextTower,
                       phrases: Sequence[str]) -> Tensor:
        """Encode phrases of other classes in the learned context.

        Args:
            tower (TextTower): The tower of the training.
            phrases (Sequence[str]): One phrase for each of K' classes.

        Returns:
            Tensor: Unit rows, float32, with shape (K', D).

        Raises:
            ValueError: If a prompt is longer than the tower's context.
        """
        return self._encode(tower, *self._build_prompts(tower, phrases))

    def _encode(self, tower: TextTower, ids: Tensor, start: int) -> Tensor:
        """Insert the context into the prompts and encode them."""
        device = self.context.device
        tower, ids = tower.to(device), ids.to(device)
        tokens = tower.embed_tokens(ids)
        context = self.context.expand(len(ids), -1, -1).to(tokens.dtype)
        tokens = torch.cat(
            [tokens[:, :start], context, tokens[:, start + self.n_ctx:]],
            dim=1)
        return self.center(
            F.normalize(tower.encode_prompts(tokens, ids), dim=1))
