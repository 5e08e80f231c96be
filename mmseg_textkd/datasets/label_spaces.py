# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Words that several data sets share, and what their labels mean in them."""
from typing import Dict, List, Mapping, Sequence, Set, Tuple

Relations = Mapping[str, Sequence[str]]


def all_words(lists: Sequence[Sequence[str]]) -> Tuple[str, ...]:
    """Unite lists of words; equal words are one.

    Args:
        lists (Sequence[Sequence[str]]): The words of each data set.

    Returns:
        tuple[str]: K words, in the order in which they first appear.
    """
    return tuple(dict.fromkeys(word for words in lists for word in words))


def narrower_words(relations: Relations,
                   words: Sequence[str]) -> Dict[str, Set[str]]:
    """Follow relations between wider and narrower words to their ends.

    Args:
        relations (Mapping[str, Sequence[str]]): For a wider word those that
            are narrower.
        words (Sequence[str]): The words that there are.

    Returns:
        dict[str, set[str]]: For each wider word all that are narrower, also
        over several steps.

    Raises:
        ValueError: If a word is unknown, or wider than itself.
    """
    named = set(relations).union(*relations.values())
    unknown = sorted(named - set(words))
    if unknown:
        raise ValueError(f'`relations` name the words {unknown}, which no '
                         f'data set has; there are {list(words)}.')
    found: Dict[str, Set[str]] = {}

    def follow(word: str, path: List[str]) -> Set[str]:
        if word in path:
            cycle = ' > '.join([*path[path.index(word):], word])
            raise ValueError(f'`relations` go in a circle: {cycle}. A word '
                             'cannot be wider than itself.')
        if word not in found:
            below = set(relations.get(word, ()))
            for other in relations.get(word, ()):
                below |= follow(other, [*path, word])
            found[word] = below
        return found[word]

    for word in relations:
        follow(word, [])
    return {word: below for word, below in found.items() if below}


def label_space(own: Sequence[str], words: Sequence[str],
                narrower: Mapping[str, Set[str]]) -> List[int]:
    """Tell what each word means in a data set.

    A word that the data set has means itself, one that is narrower than a
    word of the data set means that one (the narrowest, where several are
    wider), and all others mean nothing: they take no part in the softmax of
    its images.

    Args:
        own (Sequence[str]): The words of the data set.
        words (Sequence[str]): All K words.
        narrower (Mapping[str, set[str]]): As of :func:`narrower_words`.

    Returns:
        list[int]: For each of the K words the index of the word that it
        counts as, -1 for none.

    Raises:
        ValueError: If a word is narrower than two words of the data set of
            which neither is narrower than the other.
    """
    space = []
    for word in words:
        # Once each: several classes of a data set may have one word.
        wider = [w for w in dict.fromkeys(own) if word in narrower.get(w, ())]
        wider = [w for w in wider if not narrower[w].intersection(wider)
                 ] if word not in own else [word]
        if len(wider) > 1:
            raise ValueError(
                f'{word!r} is narrower than {wider}, which are different '
                'classes of one data set: its pixels could be either. Leave '
                'one of the relations out.')
        space.append(words.index(wider[0]) if wider else -1)
    return space
