# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A byte-pair vocabulary in the format of CLIP's ``SimpleTokenizer``."""
import gzip
import io
from collections import Counter
from typing import Dict, Iterable, List, Tuple

import regex

# The pattern of SimpleTokenizer: pairs are never merged across its pieces.
PIECES = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
# 256 bytes, 256 bytes at a word's end, start and end of the text.
NUM_FIXED = 256 + 256 + 2


def train_merges(texts: Iterable[str], max_merges: int) -> List[Tuple]:
    """Learn merges: always the most frequent pair next (Sennrich et al. 2016).

    Args:
        texts (Iterable[str]): The captions; lower-cased here.
        max_merges (int): Stop after so many.

    Returns:
        list[tuple[str, str]]: The merges in their order. Ties are broken by
        the alphabet, so equal texts give equal merges.
    """
    from open_clip.tokenizer import bytes_to_unicode
    encoder = bytes_to_unicode()
    counts = Counter(p for t in texts for p in PIECES.findall(t.lower()))
    words: Dict[Tuple[str, ...], int] = {}
    for piece, count in counts.items():
        chars = [encoder[b] for b in piece.encode('utf-8')]
        words[tuple(chars[:-1] + [chars[-1] + '</w>'])] = count
    merges: List[Tuple] = []
    while len(merges) < max_merges:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(word, best): n for word, n in words.items()}
    return merges


def _merge(word: Tuple[str, ...], pair: Tuple[str, str]) -> Tuple[str, ...]:
    """Join every occurrence of a pair in a word."""
    out: List[str] = []
    i = 0
    while i < len(word):
        if word[i:i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def pack_merges(merges: List[Tuple]) -> bytes:
    """The gzipped file content; the same bytes for the same merges."""
    # No newline at the end: SimpleTokenizer would read it as a merge.
    lines = ['#version: 0.2'] + [' '.join(pair) for pair in merges]
    buffer = io.BytesIO()
    with gzip.GzipFile('', 'wb', 9, buffer, mtime=0) as file:
        file.write('\n'.join(lines).encode('utf-8'))
    return buffer.getvalue()
