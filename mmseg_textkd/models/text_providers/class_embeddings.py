# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import warnings
from typing import Optional, Sequence, Union

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_textkd.text.embedding_file import TextEmbeddings
from mmseg_textkd.text.embedding_statistics import center as center_rows
from mmseg_textkd.text.encode_classes import build_command
from mmseg_textkd.text.united_embeddings import load_united
from mmseg_textkd.text.vocabulary import Vocabulary
from mmseg_textkd.utils.config import as_list
from .text_provider import FixedProvider


@MODELS.register_module()
class ClassEmbeddings(FixedProvider):
    """Fixed class embeddings from a file.

    The file is made by ``tools/encode_text.py``, or once, where ``build`` says
    how, by ``tools/train.py`` or :class:`PromptLearnerHook`. Building this
    module needs neither a network nor open_clip; where ``dim`` is given it
    does not even need the file, so that a checkpoint can be tested without
    it.

    Several files, one for each data set of a :class:`MultiDataset`, are
    united: words of the same name are one class. Where two files have
    different vectors for it, that of the first is taken, and the cosine of the
    two is logged: it may be one name for two things.

    Args:
        file (str | Sequence[str]): The embeddings file (safetensors), or
            several, relative to the working directory as ``data_root`` is.
        num_classes (int): Number of classes K. The head passes its own.
        dim (int, optional): Width D of the embeddings; needed only where the
            file may be missing. Defaults to None.
        center (bool): Whether to subtract the mean over the classes and
            renormalize. Raw CLIP text shares one large direction; see
            ``docs/en/user_guides/text.md``. Defaults to False.
        classes (str | Sequence[str], optional): A vocabulary key (such as
            'cityscapes') or the class names, which the file must have in
            this order. Defaults to None: the names are checked against the
            dataset when training starts.
        build (dict, optional): How to make a missing file: ``model``,
            ``pretrained``, ``cache_dir``, ``templates``, ``vocabulary``,
            ``keep_bank``. With several files one for each. Defaults to None.
        centre (bool, optional): Deprecated name of ``center``.

    Raises:
        FileNotFoundError: If the file is missing and ``dim`` is not given.
        ValueError: If the file is damaged, or for other classes or another
            width.
    """

    def __init__(self,
                 file: Union[str, Sequence[str]],
                 num_classes: int,
                 dim: Optional[int] = None,
                 center: bool = False,
                 classes: Optional[Union[str, Sequence[str]]] = None,
                 build: Optional[Union[dict, Sequence[dict]]] = None,
                 centre: Optional[bool] = None) -> None:
        if centre is not None:
            warnings.warn('`centre` is deprecated: call it `center`.')
            center = centre
        record = None
        files = as_list(file)
        missing = [path for path in files if not os.path.exists(path)]
        builds = dict(zip(files, as_list(build)))
        hint = ' '.join(f'the file {path!r} does not exist (working directory '
                        f'{os.getcwd()}). '
                        f'{build_command(path, builds.get(path))}'
                        for path in missing or files)
        if not missing:
            record = load_united(files)
            if dim is not None and record.dim != dim:
                raise ValueError(
                    f'{file} has embeddings of width {record.dim}, but the '
                    f'config says dim={dim}. Use vectors of the model that '
                    'the config names, or change `dim`.')
            if len(record.names) != num_classes:
                raise ValueError(
                    f'{file} has {len(record.names)} classes, but the head '
                    f'has num_classes={num_classes}. Its classes are '
                    f'{list(record.names)}.')
            if classes is not None:
                record.check_names(
                    Vocabulary.from_spec(classes).names, where=str(classes))
        elif dim is None:
            raise FileNotFoundError(
                f'The class embeddings cannot be loaded: {hint}')
        if record is not None:
            dim = record.dim
        assert dim is not None
        super().__init__(
            num_classes, dim, names=None if record is None else record.names)
        self.file = file
        self.record = record
        self._missing_hint = hint
        # Learners that start from this text are centered by the same vector.
        self.shift: Optional[Tensor] = None
        self.centered = center
        if record is not None:
            self._source = self._rows(record)
            if center:
                self.shift = self._source.mean(dim=0)
                self._source = center_rows(self._source)
            self.fill(self._source)

    def _rows(self, record: TextEmbeddings) -> Tensor:
        """Get the vectors of the classes."""
        return record.vectors
