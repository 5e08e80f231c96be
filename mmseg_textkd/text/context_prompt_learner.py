# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List, Optional, Sequence, Union

import torch
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor, nn

from .prompt_learner import PromptLearner
from .text_tower import TextTower, load_tower
from .vocabulary import Vocabulary


@MODELS.register_module()
class ContextPromptLearner(PromptLearner):
    r"""Learnable context vectors in the token space of the text tower.

    The prompt of class k is ``[SOS] v_1 ... v_M name_k . [EOS]``, encoded by
    the frozen tower, through which the gradient flows to the vectors
    :math:`v_m`. The tower is loaded when stage 2 starts and not before, is
    no part of the module tree, and so is in no optimizer and no checkpoint.

    Source: `Learning to Prompt for Vision-Language Models
    <https://arxiv.org/abs/2109.01134>`_, section 3.2.

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
        n_ctx (int): Number of context vectors M. Defaults to 16.
        class_specific (bool): Whether each class has vectors of its own.
            Defaults to False.
        position (str): Where the class name stands, 'end' or 'middle'.
            Defaults to 'end'.
        init (str, optional): Words to start the context from, of as many
            tokens as ``n_ctx``. Defaults to None: N(0, 0.02²).
        vocabulary (str | dict | Sequence[str], optional): Where the names to
            encode come from; the first phrase of each class is taken.
            Defaults to None: the phrases in the embeddings file.
    """

    def __init__(
            self,
            embeddings: dict,
            num_classes: int,
            model: str,
            pretrained: Optional[str] = None,
            token_dim: int = 512,
            n_ctx: int = 16,
            class_specific: bool = False,
            position: str = 'end',
            init: Optional[str] = None,
            vocabulary: Optional[Union[str, dict,
                                       Sequence[str]]] = None) -> None:
        super().__init__(embeddings, num_classes)
        if position not in ('end', 'middle'):
            raise ValueError("`position` must be 'end' or 'middle', but got "
                             f'{position!r}.')
        if n_ctx < 1:
            raise ValueError(f'`n_ctx` must be at least 1, but got {n_ctx}.')
        self.model, self.pretrained = model, pretrained
        self.token_dim, self.n_ctx = token_dim, n_ctx
        self.position, self.init = position, init
        self.vocabulary = vocabulary
        shape = (num_classes, n_ctx,
                 token_dim) if class_specific else (n_ctx, token_dim)
        self.context = nn.Parameter(torch.empty(shape).normal_(std=0.02))
        # Out of nn.Module's sight on purpose: see the class docstring.
        self.__dict__['tower'] = None

    @property
    def can_compute(self) -> bool:
        """bool: Whether the tower is loaded."""
        return self.__dict__['tower'] is not None

    def phrases(self) -> List[str]:
        """Get the words that stand for each class in its prompt.

        Returns:
            list[str]: One phrase for each class.

        Raises:
            ValueError: If their number is not the number of classes.
        """
        if self.vocabulary is not None:
            vocabulary = Vocabulary.from_spec(self.vocabulary)
            if self.names is not None and vocabulary.names != self.names:
                raise ValueError(
                    'the prompts\' vocabulary has the classes '
                    f'{list(vocabulary.names)}, but the embeddings have '
                    f'{list(self.names)}.')
            phrases = [p[0] for p in vocabulary.phrases]
        elif self.record is not None:
            # By name: `set_classes` may have reordered the classes.
            of = dict(zip(self.record.names, self.record.phrases))
            phrases = [of[name][0] for name in self.names]
        else:
            raise ValueError(
                'ContextPromptLearner does not know the class names; give '
                '`vocabulary`.')
        if len(phrases) != self.num_classes:
            raise ValueError(f'{len(phrases)} class names for '
                             f'{self.num_classes} classes: {phrases}')
        return phrases

    def prepare(self) -> None:
        """Load the tower and lay out the prompts.

        Raises:
            ValueError: If the widths differ, a prompt is longer than the
                tower's context, or the words of ``init`` are not ``n_ctx``
                tokens.
        """
        tower = load_tower(self.model, self.pretrained)
        if (tower.token_dim, tower.dim) != (self.token_dim, self.dim):
            raise ValueError(
                f'the tower {self.model!r} has tokens of width '
                f'{tower.token_dim} and embeddings of width {tower.dim}, but '
                f'the config says token_dim={self.token_dim} and its class '
                f'embeddings have width {self.dim}. Use embeddings made with '
                f'this tower and token_dim={tower.token_dim}.')
        self.__dict__['tower'] = tower.to(self.context.device)
        self._lay_out(tower)
        if self.init is not None and not self.started:
            self._init_from_words(tower)

    def _lay_out(self, tower: TextTower) -> None:
        """Find the token ids of the prompts and the places of the context."""
        before = self.n_ctx if self.position == 'end' else self.n_ctx // 2
        (self.__dict__['prompt_ids'],
         self.__dict__['context_places']) = tower.lay_out_prompts(
             self.phrases(), self.n_ctx, before)

    @torch.no_grad()
    def _init_from_words(self, tower: TextTower) -> None:
        ids, start, (num, ) = tower.find_words([self.init])
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
        device = self.context.device
        tower = self.__dict__['tower'].to(device)
        ids = self.__dict__['prompt_ids'].to(device)
        places = self.__dict__['context_places'].to(device)
        tokens = tower.embed_tokens(ids)
        context = self.context.expand(len(ids), -1, -1)
        index = places[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, index, context.to(tokens.dtype))
        return self._centred(tower.encode_prompts(tokens, ids))

    def _select_rows(self, rows: Tensor) -> None:
        super()._select_rows(rows)
        if self.context.dim() == 3:
            self.context = nn.Parameter(self.context[rows.to(
                self.context.device)])
        for name in ('prompt_ids', 'context_places'):
            if name in self.__dict__:
                self.__dict__[name] = self.__dict__[name][rows]
