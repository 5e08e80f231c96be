# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Class embeddings of several data sets as those of all their words."""
import logging
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from .embedding_file import EmbeddingFileError, PathLike, TextEmbeddings

# Vectors of one phrase that were encoded in other batches agree to this.
SAME = 1 - 1e-4


def load_united(paths: Sequence[PathLike]) -> TextEmbeddings:
    """Load class embeddings of several files; equal names are one class.

    Names that have other vectors in a later file are logged with the cosine
    of the two: "light" may be a lamp here and a traffic light there.

    Args:
        paths (Sequence[str or PathLike]): Embeddings files.

    Returns:
        TextEmbeddings: The classes in the order in which they first appear,
        with the vectors, phrases and bank of that file.

    Raises:
        FileNotFoundError: If a file is missing.
        EmbeddingFileError: If one is damaged, or they are not of one tower.
    """
    records = [TextEmbeddings.load(path) for path in paths]
    if len(records) == 1:
        return records[0]
    _check_towers(paths, records)
    rows = [(record, k) for record in records for k in range(len(record))]
    first: dict = {}
    for record, k in rows:
        first.setdefault(record.names[k], (record, k))
    _report(paths, records)
    chosen = list(first.values())
    bank, mask = _unite_banks(chosen)
    return TextEmbeddings(
        vectors=torch.stack([record.vectors[k] for record, k in chosen]),
        names=tuple(first),
        phrases=tuple(record.phrases[k] for record, k in chosen),
        templates=records[0].templates,
        model=records[0].model,
        pretrained=records[0].pretrained,
        library=records[0].library,
        bank=bank,
        bank_mask=mask)


def _check_towers(paths: Sequence[PathLike],
                  records: Sequence[TextEmbeddings]) -> None:
    """Require vectors of one space."""
    of = [(r.model, r.pretrained, r.dim, r.templates) for r in records]
    for path, other in zip(paths, of):
        if other != of[0]:
            raise EmbeddingFileError(
                'Vectors of different towers or templates cannot be compared: '
                f'{paths[0]} is of {of[0]}, but {path} of {other} (model, '
                'weights, width, templates). Make them alike.')


def _report(paths: Sequence[PathLike],
            records: Sequence[TextEmbeddings]) -> None:
    """Log the names whose vectors differ, with their cosine."""
    found: List[str] = []
    for b, later in enumerate(records):
        for a, record in enumerate(records[:b]):
            for name in sorted({*later.names} & {*record.names}):
                i, j = record.names.index(name), later.names.index(name)
                cosine = F.cosine_similarity(
                    record.vectors[i], later.vectors[j], dim=0).item()
                if not cosine >= SAME:
                    found.append(f'{name!r} ({", ".join(record.phrases[i])}, '
                                 f'{paths[a]}; {", ".join(later.phrases[j])}, '
                                 f'{paths[b]}): cosine {cosine:.3f}')
    if found:
        print_log(
            'These names have another vector in a later file, and get that '
            f'of the first: {"; ".join(found)}. Where one name stands for two '
            'things, give it another word in one of the data sets (`words` '
            'of MultiDataset), and in its embeddings file.', 'current',
            logging.WARNING)


def _unite_banks(
    chosen: Sequence[Tuple[TextEmbeddings, int]]
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Pad the phrases of the classes to one bank, if all files have one."""
    found = [(record.bank[k], record.bank_mask[k]) for record, k in chosen
             if record.bank is not None and record.bank_mask is not None]
    if len(found) < len(chosen):
        return None, None
    length = max(len(bank) for bank, _ in found)
    banks = [F.pad(b, (0, 0, 0, length - len(b))) for b, _ in found]
    masks = [F.pad(m, (0, length - len(m))) for _, m in found]
    return torch.stack(banks), torch.stack(masks)
