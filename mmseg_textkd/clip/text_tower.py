# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List, Optional, Sequence, Tuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..utils.progress import track
from .frozen_clip import FrozenCLIP
from .loading import load_clip
from .weights import BPE_NAME, PathLike, TextTowerError

__all__ = ['TextTower', 'TextTowerError', 'load_tower']

_towers: 'WeakValueDictionary[Tuple, TextTower]' = WeakValueDictionary()


class TextTower(FrozenCLIP):
    """Frozen text encoder of a CLIP model, through open_clip.

    The image side is dropped after loading. The weights take no gradient, the
    module stays in evaluation mode whatever :meth:`train` is told, and all
    arithmetic is in float32, also under autocast. Gradient flows *through* it
    to soft prompts.

    Where that is exact, sequences are cut to the longest prompt of the batch
    instead of being padded to the full context: under a causal mask, the end
    token, which is the one that is pooled, does not see what follows it. Other
    towers are recognized and run at full length.

    Args:
        model (str): ``'toyclip'`` (the tiny model in this package), an
            architecture of open_clip (``'ViT-B-16'``), ``hf-hub:org/name`` or
            ``local-dir:/path``. Weights that were trained with QuickGELU and
            are given as a file need the ``-quickgelu`` architecture.
        pretrained (str, optional): For an architecture, the tag or the file
            of its weights. Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None, the cache of the hub.

    Raises:
        TextTowerError: If open_clip or the weights are missing, or the model
            has no text side that gives one vector per sentence.

    Attributes:
        dim (int): Width D of the text embeddings.
        token_dim (int): Width d of the token embeddings.
        context_length (int): Number of tokens that a prompt may have.
        can_cut (bool): Whether cutting sequences is exact for this tower.
    """

    def __init__(self,
                 model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None) -> None:
        super().__init__(model, pretrained)
        self.clip, self.tokenizer, self.library = load_clip(
            model, pretrained, cache_dir)
        self.clip.eval()
        self._inspect()
        self.dim = self._freeze(self.encode_text(['a'], cut=False))

    def _inspect(self) -> None:
        """Determine context length, pooling and mask of the tower."""
        text = self._text
        # The tokenizer knows it better: Hugging Face's text models only tell
        # how many positions they have.
        self.context_length = int(
            getattr(self.tokenizer, 'context_length', None)
            or self.clip.context_length)
        pool = getattr(text, 'text_pool_type',
                       getattr(text, 'pool_type', 'argmax'))
        plain = all(
            hasattr(text, name)
            for name in ('token_embedding', 'positional_embedding',
                         'transformer', 'ln_final')) and getattr(
                             text, 'cls_emb', None) is None
        self._soft = plain and not getattr(text, 'use_pad_mask', False)
        if self._soft:
            self._pool = (pool,
                          getattr(text, 'text_eos_id',
                                  getattr(text, 'eos_id', None)))
        mask = getattr(text, 'attn_mask', None)
        causal = mask is not None and torch.equal(
            mask,
            torch.full_like(mask, float('-inf')).triu(1))
        self.can_cut = self._soft and causal and pool in ('argmax', 'eos')
        embedding = getattr(text, 'token_embedding', None)
        if embedding is None:
            config = getattr(text, 'config', None)
            self.token_dim = int(
                getattr(config, 'hidden_size', getattr(config, 'd_model', 0)))
        else:
            self.token_dim = embedding.embedding_dim
            words = getattr(self.tokenizer, 'vocab_size', 0)
            if words > embedding.num_embeddings:
                raise TextTowerError(
                    f'{self.model!r} knows {embedding.num_embeddings} tokens, '
                    f'but its tokenizer has {words}. A local-dir with a '
                    f'vocabulary of its own must hold it as {BPE_NAME}.')

    @property
    def _text(self) -> nn.Module:
        """nn.Module: Module that holds the layers of the text encoder."""
        # open_clip's CLIP holds the text layers itself, all others in `text`.
        return getattr(self.clip, 'text', self.clip)

    @property
    def device(self) -> torch.device:
        """torch.device: Device of the weights."""
        return self.clip.logit_scale.device

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Tokenize sentences.

        Args:
            sentences (Sequence[str]): N sentences.

        Returns:
            Tensor: Long tensor with shape (N, context_length), on the CPU.

        Raises:
            ValueError: If a sentence is longer than the context; open_clip
                would drop its end without a word.
        """
        sentences = [sentences] if isinstance(sentences,
                                              str) else list(sentences)
        if not sentences:
            raise ValueError('There are no sentences to tokenize.')
        length = self.context_length
        padded = self.tokenizer(sentences, context_length=4 * length)
        inner = getattr(self.tokenizer, 'tokenizer', None)
        pad = getattr(inner, 'pad_token_id', None) or 0
        # The 'clips' mode of HF tokenizers puts a token into the last place.
        last = bool(getattr(self.tokenizer, 'tokenizer_mode', ''))
        tail = padded[:, length:-1] if last else padded[:, length:]
        too_long = (tail != pad).any(dim=1).nonzero().flatten().tolist()
        if too_long:
            count = length + int((tail[too_long[0]] != pad).sum())
            raise ValueError(
                f'{len(too_long)} sentence(s) are longer than the {length} '
                f'tokens that {self.model!r} takes; the first has {count}'
                f'{" or more" if count >= 4 * length else ""}: '
                f'{sentences[too_long[0]]!r}. Shorten the phrase or the '
                'template.')
        if last:
            return self.tokenizer(sentences, context_length=length)
        # Tokenizing takes as long as a small tower; once is enough.
        return padded[:, :length].contiguous()

    @torch.no_grad()
    def encode_text(self,
                    sentences: Sequence[str],
                    batch_size: int = 256,
                    cut: bool = True,
                    progress: bool = False) -> Tensor:
        """Encode sentences.

        Args:
            sentences (Sequence[str]): N sentences.
            batch_size (int): Sentences at a time. Defaults to 256.
            cut (bool): Whether to cut sequences where it is exact. Defaults
                to True.
            progress (bool): Whether to show a progress bar. Defaults to
                False.

        Returns:
            Tensor: Float32, not normalized, with shape (N, D), on the tower's
            device.

        Raises:
            ValueError: If a sentence is longer than the context.
        """
        ids = self.tokenize(sentences)
        cut = cut and self.can_cut
        # Like lengths together, or one long prompt makes its batch long.
        order = self.end_positions(ids).argsort() if cut else torch.arange(
            len(ids))
        batches = track(
            order.split(batch_size), 'Encoding text', 'batch', show=progress)
        parts = [
            self._encode_ids(ids[b].to(self.device), cut) for b in batches
        ]
        return torch.cat(parts)[order.argsort().to(self.device)]

    def _encode_ids(self, ids: Tensor, cut: bool) -> Tensor:
        """Encode one batch of token ids, truncated to its longest sentence."""
        with torch.autocast(self.device.type, enabled=False):
            if cut:
                ids = ids[:, :int(self.end_positions(ids).max()) + 1]
                return self._forward(self._text.token_embedding(ids), ids)
            features = self.clip.encode_text(ids)
        if isinstance(features, tuple):
            features = features[0]
        if features.dim() != 2:
            raise TextTowerError(
                f'{self.model!r} gives a tensor of shape '
                f'{tuple(features.shape)} for {len(ids)} sentences; a tower '
                'must pool them to one vector each.')
        return features.float()

    def end_positions(self, ids: Tensor) -> Tensor:
        """Find the end token of each sentence, where it is pooled.

        Args:
            ids (Tensor): Token ids with shape (N, L).

        Returns:
            Tensor: Long tensor with shape (N, ).
        """
        self._require_soft()
        pool, eos = self._pool
        return ((ids == eos).int() if pool == 'eos' else ids).argmax(dim=1)

    def find_word_tokens(
            self, sentences: Sequence[str]) -> Tuple[Tensor, int, List[int]]:
        """Find the tokens of the words, without special tokens and padding.

        Start, end and padding tokens differ: CLIP has all three, SigLIP no
        start token and its end token for padding, CLIPA no end token. They
        are what the empty sentence consists of, so that no tokenizer needs to
        be known.

        Args:
            sentences (Sequence[str]): N sentences.

        Returns:
            tuple[Tensor, int, list[int]]: Token ids with shape (N, L), the
            place of the first word, and the number of tokens that the words
            of each sentence have.

        Raises:
            TextTowerError: If this kind of tower takes no soft prompts, or
                its tokenizer adds other special tokens.
            ValueError: If a sentence is longer than the context.
        """
        self._require_soft()
        ids, empty = self.tokenize(sentences), self._empty_ids()
        max_length = len(empty)
        starts = (ids == empty).int().cumprod(dim=1).sum(dim=1)
        start = int(starts.min())
        counts = []
        for row, sentence in zip(ids, sentences):
            count = next(
                (n for n in range(1, max_length - start)
                 if torch.equal(row[start + n:], empty[start:max_length - n])),
                None)
            if count is None:
                raise TextTowerError(
                    f'{self.model!r} takes no soft prompts: its tokenizer '
                    f'({type(self.tokenizer).__name__}) encodes {sentence!r} '
                    f'to {row[:16].tolist()}, which differs in more than the '
                    'words from the empty sentence. '
                    'Use the `residual` or `mixture` prompts, which need no '
                    'tower.')
            counts.append(count)
        return ids, start, counts

    def build_prompts(self,
                      phrases: Sequence[str],
                      num_context: int,
                      suffix: str = '.',
                      max_length: Optional[int] = None) -> Tuple[Tensor, int]:
        """Build token ids of prompts with placeholders for context vectors.

        Args:
            phrases (Sequence[str]): K phrases.
            num_context (int): Number of context vectors M.
            suffix (str): What follows a phrase. Defaults to '.'.
            max_length (int, optional): Maximum number of tokens of a prompt.
                Defaults to None: that of the tower.

        Returns:
            tuple[Tensor, int]: Token ids with shape (K, L), and the place of
            the first of the M that the context vectors are to replace.

        Raises:
            TextTowerError: As of :meth:`find_word_tokens`.
            ValueError: If a prompt is longer than ``max_length``.
        """
        ids, start, lengths = self.find_word_tokens(
            [p + suffix for p in phrases])
        empty = self._empty_ids()
        max_length = min(max_length or len(empty), len(empty))
        # At least one place is the end token's, also where that is padding.
        end = max(1, int((empty[start:] != empty[-1]).sum()))
        for phrase, length in zip(phrases, lengths):
            length += start + end
            if length + num_context > max_length:
                raise ValueError(
                    f'the prompt of class {phrase!r} has {length} tokens and '
                    f'{num_context} context vectors, but there is room for '
                    f'{max_length}. Give a shorter phrase, a smaller `n_ctx`, '
                    'or a greater `context_length`, if the tower allows it.')
        # The ids tell the tower where the token is that it pools, which is
        # none of these.
        filler = int(self._pool[0] == 'eos' and self._pool[1] == 0)
        context = ids.new_full((len(ids), num_context), filler)
        ids = torch.cat([ids[:, :start], context, ids[:, start:]], dim=1)
        return ids[:, :len(empty)], start

    def _empty_ids(self) -> Tensor:
        """Get the token ids of the empty sentence, shape (L, )."""
        return self.tokenize([''])[0]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Look up token embeddings, without positional embeddings.

        Args:
            ids (Tensor): Token ids with shape (N, L).

        Returns:
            Tensor: Float32 tensor with shape (N, L, d).
        """
        self._require_soft()
        return self._text.token_embedding(ids.to(self.device))

    def encode_prompts(self, token_embeddings: Tensor, ids: Tensor) -> Tensor:
        """Encode prompts given as token embeddings, with gradient.

        Args:
            token_embeddings (Tensor): Float tensor with shape (N, L, d).
            ids (Tensor): Token ids with shape (N, L), which tell where the
                end token is.

        Returns:
            Tensor: Float32, not normalized, with shape (N, D).

        Raises:
            TextTowerError: If this kind of tower takes no soft prompts.
            ValueError: If the shapes do not fit each other or the tower.
        """
        self._require_soft()
        length = ids.shape[1]
        if tuple(token_embeddings.shape) != (*ids.shape, self.token_dim):
            raise ValueError(
                f'Prompts of shape {tuple(token_embeddings.shape)} do not fit '
                f'token ids of shape {tuple(ids.shape)} and a tower with '
                f'tokens of width {self.token_dim}.')
        if length > self.context_length or (length < self.context_length
                                            and not self.can_cut):
            raise ValueError(
                f'Prompts have {length} tokens, but {self.model!r} takes '
                f'{"up to" if self.can_cut else "exactly"} '
                f'{self.context_length}.')
        ids = ids.to(self.device)
        if self.can_cut:
            length = int(self.end_positions(ids).max()) + 1
        with torch.autocast(self.device.type, enabled=False):
            return self._forward(
                token_embeddings[:, :length].to(self.device).float(),
                ids[:, :length])

    def _forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Run the text transformer on token embeddings of any length."""
        from open_clip.transformer import text_global_pool
        text, length = self._text, tokens.shape[1]
        mask = text.attn_mask
        if mask is not None:
            mask = mask[:length, :length]
        x = tokens + text.positional_embedding[:length]
        x = text.ln_final(text.transformer(x, attn_mask=mask))
        pool, eos = self._pool
        x = text_global_pool(x, ids, pool, eos_token_id=eos)
        projection = text.text_projection
        if projection is None:
            return x
        if isinstance(projection, nn.Linear):
            return projection(x)
        return x @ projection

    def _require_soft(self) -> None:
        """Require a tower that supports soft prompts."""
        if not self._soft:
            raise TextTowerError(
                f'{self.model!r} ({type(self._text).__name__}) takes no soft '
                'prompts: only text transformers of open_clip without class '
                'token and padding mask do. Use the `residual` or `mixture` '
                'prompts, which need no tower.')

    def extra_repr(self) -> str:
        """Describe the tower in one line of ``repr``."""
        return (f'{self.model}, pretrained={self.pretrained}, dim={self.dim}, '
                f'token_dim={self.token_dim}, can_cut={self.can_cut}')


def load_tower(model: str,
               pretrained: Optional[str] = None,
               cache_dir: Optional[PathLike] = None) -> TextTower:
    """Load a tower, shared by all callers with the same arguments.

    It is kept for as long as there is a reference to it.

    Args:
        model (str): See :class:`TextTower`.
        pretrained (str, optional): See :class:`TextTower`. Defaults to None.
        cache_dir (str or PathLike, optional): See :class:`TextTower`.
            Defaults to None.

    Returns:
        TextTower: The shared tower.
    """
    key = (model, pretrained, None if cache_dir is None else str(cache_dir))
    tower = _towers.get(key)
    if tower is None:
        tower = _towers[key] = TextTower(model, pretrained, cache_dir)
    return tower
