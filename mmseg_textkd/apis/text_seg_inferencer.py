# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import os.path as osp
import re
import threading
from inspect import isclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import cv2
import mmcv
import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.apis import MMSegInferencer
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import SampleList
from torch import Tensor, nn

from mmseg_textkd.clip.weights import PathLike
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.deploy.words import united_cfg
from mmseg_textkd.models import EBSeg, TextHeadMixin
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.text import TextEmbeddings, Vocabulary
from mmseg_textkd.utils.checkpoint import build_segmentor, read_checkpoint
from mmseg_textkd.utils.config import first_dataset, load_config
from mmseg_textkd.utils.io import MAX_PIXELS, UnknownImageError, check_image
from .adapters import build_adapter
from .drawing import GRAY, draw_labels, draw_similarity, palette_for
from .label_maps import predict_labels
from .model_zoo import find_model

Names = Union[str, Sequence[str]]
MAX_CLASSES = 65535  # label maps are written as 16-bit PNG


class TextSegInferencer(MMSegInferencer):
    """Inferencer whose classes can be changed after the training.

    The classifier of a network that has learned with text is the product of a
    projection and of the vectors of its class names. :meth:`set_classes`
    takes vectors of other names and folds again; nothing is trained, nothing
    else in the network changes, and it costs as much as a stock network with
    that many classes. :class:`EBSeg` compares its masks with the new vectors.
    Everything else is as of MMSegmentation's inferencer, but for label maps
    of more than 256 classes, similarities, and a legend and paths in any
    script.

    With a folded checkpoint, in which the projection is not any more, only
    its own classes, or some of them, can be chosen.

    Args:
        config (str | Path | Config): Config of a text network, of the stock
            network that it has been folded into, or of an EBSeg. Without
            ``checkpoint`` the name of a released model.
        checkpoint (str | Path, optional): Its weights. Defaults to None:
            those of the released model.
        device (str, optional): Defaults to None: a GPU if there is one.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.class_encoder.default_cache_dir`.
        max_pixels (int): Image files with more pixels are refused before they
            are decoded. Defaults to 89478485, Pillow's own limit.
        font (str, optional): A TrueType font for legends. Defaults to None:
            DejaVu Sans.
        cfg_options (dict, optional): Settings of the config to override.
            Defaults to None.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If the checkpoint is damaged or of another network, no
            config is given, or there is no such model.

    Examples:
        >>> inferencer = TextSegInferencer('CONFIG.py', 'CHECKPOINT.pth')
        >>> inferencer.set_classes(['road', 'tree', 'bus stop'])
        >>> inferencer('picture.png', out_dir='results')
    """

    forward_kwargs = {'similarity'}
    visualize_kwargs = {
        'show', 'wait_time', 'img_out_dir', 'opacity', 'return_vis', 'legend'
    }

    def __init__(self,
                 config: Union[str, Path, Config],
                 checkpoint: Optional[Union[str, Path]] = None,
                 device: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None,
                 font: Optional[str] = None,
                 max_pixels: int = MAX_PIXELS,
                 cfg_options: Optional[Dict] = None) -> None:
        if config is None:
            # MMEngine would execute the one in the checkpoint.
            raise ValueError('give the config of the network: one that came '
                             'in a checkpoint would be run as code.')
        if checkpoint is None:
            if isinstance(config, Config) or osp.isfile(config):
                raise ValueError('give the checkpoint too: only released '
                                 'models, by their names, have one.')
            config, checkpoint = find_model(str(config), text=True)
        config = load_config(config, cfg_options)
        if not config.get('test_dataloader'):
            if not config.get('val_dataloader'):
                raise ValueError('the config has neither test_dataloader nor '
                                 'val_dataloader, whose pipeline tells how '
                                 'images are read and resized.')
            config.test_dataloader = config.val_dataloader
        # Of several data sets the first says how images are prepared.
        config.test_dataloader = dict(
            config.test_dataloader, dataset=first_dataset(config))
        config.setdefault('visualizer', dict(type='SegLocalVisualizer'))
        self.cache_dir, self.font = cache_dir, font
        self.max_pixels = max_pixels
        self.threshold: Optional[float] = None
        # A call puts layers of its own into the network while it lasts.
        self.lock = threading.RLock()
        self.source = 'as trained'
        super().__init__(config, str(checkpoint), device=device)

    def _init_model(self,
                    cfg: Config,
                    weights: str,
                    device: str = 'cpu') -> nn.Module:
        """Load the network and build its adapter."""
        model, self.own_meta = load_network(cfg, Path(weights))
        model.dataset_meta = dict(self.own_meta)
        model.to(device).eval()
        self.channels = input_channels(model)
        self.adapter = build_adapter(model, self.own_meta['classes'],
                                     self.cache_dir)
        if self.adapter.binary:
            names, palette = with_background(**self.own_meta)
            model.dataset_meta = dict(classes=names, palette=palette)
        return model

    @property
    def classes(self) -> Sequence[str]:
        """Sequence[str]: Names of the labels, in their order."""
        return self.model.dataset_meta['classes']

    @property
    def vectors(self) -> Optional[Tensor]:
        """Tensor, optional: Vectors of the classes, shape (K, D)."""
        return self.adapter.vectors

    def set_classes(self,
                    classes: Any = None,
                    other: Optional[str] = None,
                    threshold: Optional[float] = None,
                    new_bias: float = 0.,
                    new_words: Optional[str] = None,
                    tower: Optional[str] = None,
                    pretrained: Optional[str] = None,
                    templates: Any = None,
                    embeddings: Optional[PathLike] = None) -> None:
        """Set the classes to predict.

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
                :meth:`TextHeadAdapter.fold`; not for EBSeg. Defaults to 0.
            new_words (str, optional): How vectors of new classes are used:
                'unit', 'projected', 'ridge' or 'raw', see
                :func:`.place_new_words`. Defaults to None: 'unit', or 'raw'
                where the classifier compares by cosines.
            tower, pretrained, templates, embeddings: See
                :meth:`ClassEncoder.encode`.

        Raises:
            FileNotFoundError: If there is no such file.
            TextTowerError: If the tower cannot be had.
            ValueError: If there is no class, one occurs twice or is too long,
                an argument is out of range, or the network cannot predict the
                new classes. The classes stay as they were then.
        """
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError('`threshold` is a probability between 0 and 1, '
                             f'but got {threshold}.')
        if not np.isfinite(new_bias):
            raise ValueError(f'`new_bias` must be finite, but got {new_bias}.')
        if classes is None:
            classes = list(self.own_meta['classes'])
            if embeddings is not None:
                classes = TextEmbeddings.load(embeddings).names
        if other is not None:
            words = Vocabulary.from_spec(classes)
            classes = Vocabulary((*words.names, other),
                                 (*words.phrases, (other, )))
        found = self.adapter.encode(
            classes,
            tower=tower,
            pretrained=pretrained,
            templates=templates,
            embeddings=embeddings)
        names, number = found.names, len(found.names)
        if number > MAX_CLASSES:
            raise ValueError(f'{number} classes are more than the '
                             f'{MAX_CLASSES} that a label map can hold.')
        own = self.own_meta['palette']
        colors = [None if k is None else own[k] for k in found.trained]
        if other is not None:
            colors[-1] = GRAY
        palette = palette_for(colors)
        if self.adapter.stays_binary(found):
            names, palette = with_background(names, palette)
        elif threshold is not None and other is None:
            if 'other' in names:
                raise ValueError("a class is called 'other' already; give it "
                                 'as `other`.')
            names, palette = (*names, 'other'), [*palette, GRAY]
        with self.lock:
            self.adapter.set_classes(found, new_bias, new_words)
            self.model.dataset_meta = dict(
                classes=tuple(names), palette=palette)
            self.threshold, self.source = threshold, found.source
        print_log(f'{number} classes: {self.source}', 'current')

    def __call__(self,
                 inputs: Any,
                 *args,
                 out_dir: str = '',
                 img_out_dir: str = 'vis',
                 pred_out_dir: str = 'pred',
                 **kwargs) -> Any:
        """Segment images, see :class:`MMSegInferencer`.

        Args:
            inputs: A path, a folder, a list, or arrays (H, W, 3), uint8, BGR.
            *args: As of :class:`MMSegInferencer`.
            out_dir (str): Folder of results. Defaults to '', none.
            img_out_dir (str): Folder in it for images. Defaults to 'vis'.
            pred_out_dir (str): Folder in it for label maps. Defaults to
                'pred'.
            **kwargs: As of :class:`MMSegInferencer`, :meth:`forward`,
                :meth:`visualize` and :meth:`postprocess`.

        Returns:
            dict: See :meth:`postprocess`.

        Raises:
            ValueError: If an array is no image, a file is none or too large,
                or results would be written into the folder of an input.
        """
        inputs = self._inputs_to_list(inputs)
        written = [] if out_dir == '' else [
            osp.realpath(osp.join(out_dir, folder))
            for folder in (img_out_dir, pred_out_dir)
        ]
        for item in inputs:
            if isinstance(item, np.ndarray):
                continue
            if osp.isfile(item):
                try:
                    check_image(item, self.max_pixels)
                except UnknownImageError:
                    # Other bands may be in other formats.
                    if self.channels == 3:
                        raise
            folder = osp.dirname(osp.realpath(item))
            if folder in written:
                raise ValueError(
                    f'results would be written to {folder}, the folder of the '
                    f'input {item}, and could replace it. Give another '
                    '`out_dir`.')
        with self.lock:  # one list of classes from first to last
            return super().__call__(
                inputs,
                *args,
                out_dir=out_dir,
                img_out_dir=img_out_dir,
                pred_out_dir=pred_out_dir,
                **kwargs)

    def __deepcopy__(self, memo: Dict) -> 'TextSegInferencer':
        """Copy all but the lock, of which the copy has its own."""
        other = memo[id(self)] = object.__new__(type(self))
        memo[id(self.lock)] = threading.RLock()
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def _inputs_to_list(self, inputs: Any) -> list:
        """Convert paths to strings, and check arrays."""
        if isinstance(inputs, Path):
            inputs = str(inputs)
        return [
            _checked_image(item, self.channels) if isinstance(
                item, np.ndarray) else
            str(item) if isinstance(item, Path) else item
            for item in super()._inputs_to_list(inputs)
        ]

    @torch.no_grad()
    def forward(self, inputs: dict, similarity: Names = ()) -> SampleList:
        """Predict a batch.

        Args:
            inputs (dict): A batch of the pipeline.
            similarity (str | Sequence[str]): Classes whose cosine with every
                pixel is wanted too: one, a list, or a vocabulary's key or
                file. Defaults to ().

        Returns:
            list[SegDataSample]: With ``pred_sem_seg`` and, if it is wanted,
            ``similarity``, float32, shape (n, H, W).

        Raises:
            ValueError: If there is no such class.
        """
        with self.lock:  # videos call this alone
            names, rows = self._rows(similarity)
            batch = self.model.data_preprocessor(inputs, False)
            images, samples = batch['inputs'], batch['data_samples']
            samples = predict_labels(self.adapter, images, samples,
                                     self.threshold,
                                     len(self.classes) - 1)
            found = self.adapter.similarities(images, samples,
                                              rows) if rows else []
        for sample, maps in zip(samples, found):
            sample.similarity = PixelData(
                metainfo=dict(names=names), data=maps)
        return samples

    def _rows(self, names: Names) -> Tuple[Tuple[str, ...], List[int]]:
        """Get names and indices of classes that have vectors."""
        # A label that is no class, as of a threshold, has no vector.
        known = list(self.classes[:self.model.out_channels])
        if self.adapter.binary and self.vectors is not None:
            known = list(self.classes[-len(self.vectors):])
        if isinstance(names, str):
            names = [names
                     ] if names in known else Vocabulary.from_spec(names).names
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f'no similarity with {unknown}: the classes are '
                             f'{known[:20]}; call `set_classes` first.')
        return tuple(names), [known.index(name) for name in names]

    def visualize(self,
                  inputs: list,
                  preds: List[SegDataSample],
                  return_vis: bool = False,
                  show: bool = False,
                  wait_time: int = 0,
                  img_out_dir: str = '',
                  opacity: float = 0.5,
                  legend: bool = True) -> Optional[List[np.ndarray]]:
        """Draw images with their classes, see :class:`MMSegInferencer`.

        ``legend`` draws the names of the classes beside the image. With
        ``img_out_dir`` similarities are written too.
        """
        if not (show or img_out_dir or return_vis):
            return None
        meta, shown = self.model.dataset_meta, []
        for image, pred in zip(inputs, preds):
            name = f'{self.num_visualized_imgs:08d}_vis.jpg'
            if isinstance(image, str):
                name = osp.basename(image)
                image = mmcv.imfrombytes(mmengine.fileio.get(image))
            labels = pred.pred_sem_seg.data[0].cpu().numpy()
            image = _as_picture(image, labels.shape)
            drawn = draw_labels(image[..., ::-1], labels, meta['classes'],
                                meta['palette'], opacity, legend, self.font)
            if show:
                self.visualizer.show(drawn, name, wait_time)
            if img_out_dir:
                path = osp.join(img_out_dir, name)
                try:
                    mmcv.imwrite(drawn[..., ::-1], path)
                except (AttributeError, cv2.error) as error:
                    # Of an ending that OpenCV reads and does not write.
                    raise OSError(f'cannot write {path}') from error
                words, maps = _similarity(pred)
                files = [re.sub(r'[^\w-]+', '-', w)[:40] for w in words]
                for k, (word, values) in enumerate(zip(words, maps)):
                    file = files[k]
                    if files.count(file) > 1:
                        file += f'-{k}'
                    shown_map = draw_similarity(
                        values,
                        image[..., ::-1],
                        f'cosine with {word}',
                        font=self.font)
                    mmcv.imwrite(shown_map[..., ::-1],
                                 osp.join(img_out_dir, f'{name}_{file}.png'))
            if return_vis:
                shown.append(drawn)
            self.num_visualized_imgs += 1
        return shown if return_vis else None

    def postprocess(self,
                    preds: List[SegDataSample],
                    visualization: Optional[List[np.ndarray]],
                    return_datasample: bool = False,
                    pred_out_dir: str = '') -> Any:
        """Pack and write the predictions, see :class:`MMSegInferencer`.

        Label maps are PNG of 8 bits up to 256 labels, else of 16.

        Returns:
            dict: ``predictions``, ``visualization`` and, if wanted,
            ``similarity``; lists, or with one image its own.
        """
        results: Dict[str, List] = dict(
            predictions=[], visualization=visualization or [])
        dtype = np.uint16 if len(self.classes) > 256 else np.uint8
        for pred in preds:
            labels = pred.pred_sem_seg.data[0].cpu().numpy()
            results['predictions'].append(labels)
            if 'similarity' in pred:
                results.setdefault('similarity',
                                   []).append(_similarity(pred)[1])
            if pred_out_dir:
                mmcv.imwrite(
                    labels.astype(dtype),
                    osp.join(pred_out_dir,
                             f'{self.num_pred_imgs:08d}_pred.png'))
            self.num_pred_imgs += 1
        if return_datasample:
            return preds[0] if len(preds) == 1 else preds
        if len(preds) == 1:
            return {k: v[0] if v else v for k, v in results.items()}
        return results


def load_network(cfg: Config, checkpoint: Path) -> Tuple[nn.Module, Dict]:
    """Build a network without auxiliary heads, and load it strictly.

    Args:
        cfg (Config): Config of a text network, or of the stock network that
            it has been folded into, or of an EBSeg. Its ``model`` is changed
            to what is built.
        checkpoint (Path): Its weights.

    Returns:
        tuple[nn.Module, dict]: The network, and ``classes`` and ``palette``
        of its training.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is damaged or of another network.
    """
    saved = read_checkpoint(checkpoint)
    state = {
        k: v
        for k, v in saved['state_dict'].items()
        if not k.startswith('auxiliary_head.')
    }
    faults = [
        k for k, v in state.items()
        if k.endswith('.class_embeddings') and not v.any(dim=-1).all()
    ]
    if faults:
        raise ValueError(
            f'{checkpoint} has class embeddings that are all zero: {faults}')
    if isinstance(cfg.model.decode_head, list):
        raise ValueError('a cascade of decode heads is not supported.')
    old = saved['meta']  # of MMSegmentation 0.x
    meta = dict(
        old.get('dataset_meta')
        or dict(classes=old.get('CLASSES'), palette=old.get('PALETTE')))
    kind = MODELS.get(cfg.model.decode_head.type)
    has_text = any(k.endswith('.class_embeddings') for k in state)
    if not has_text and isclass(kind) and issubclass(kind, TextHeadMixin):
        united = united_cfg(cfg, meta)
        cfg.model = to_stock_cfg(united, strip_auxiliary=True).model
    if MODELS.get(cfg.model.type) is EBSeg:
        head = cfg.model.decode_head
        # Other classes of a config; here they come by their names.
        head.pop('test_text', None)
        # The checkpoint knows the names where their file is missing.
        if not osp.exists(head.text.get('file', '')) and meta.get('classes'):
            head.setdefault('train_classes', list(meta['classes']))
    model = build_segmentor(cfg.model, state, checkpoint)
    model.cfg = cfg
    number = model.decode_head.num_classes
    classes = meta.get('classes') or [f'class {i}' for i in range(number)]
    if number == 1 and len(classes) == 2:
        # Those of the labels, of which the first is what has no logit.
        classes = classes[1:]
        meta['palette'] = (meta.get('palette') or [None, None])[1:]
    if len(classes) != number:
        raise ValueError(f'the network has {number} classes, but its '
                         f'checkpoint names {len(classes)}: {classes}')
    palette = palette_for(meta.get('palette') or [None] * number)
    return model, dict(classes=tuple(classes), palette=palette)


def with_background(
        classes: Sequence[str],
        palette: Sequence) -> Tuple[Tuple[str, ...], List[Sequence[int]]]:
    """Name both labels of a binary network, also where it has one class.

    Args:
        classes (Sequence[str]): Its one or two classes.
        palette (Sequence): Their colors.

    Returns:
        tuple: Names and colors of the labels 0 and 1.
    """
    if len(classes) > 1:
        return tuple(classes), list(palette)
    return ('background', *classes), [GRAY, *palette]


def _checked_image(image: np.ndarray, channels: int = 3) -> np.ndarray:
    """Require uint8 of shape (H, W, 3); repeat a single channel.

    Of networks for other channels than three, of any type.
    """
    if channels != 3:
        image = image[..., None] if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[2] != channels or not image.size:
            raise ValueError(f'the network takes images of shape (H, W, '
                             f'{channels}), but got {image.shape}.')
        return image
    if image.ndim == 2:
        image = image[..., None]
    if (image.dtype != np.uint8 or image.ndim != 3 or image.size == 0
            or image.shape[2] not in (1, 3)):
        raise ValueError(
            'an image must be uint8, in [0, 255], BGR, with shape (H, W, 3), '
            f'but got {image.dtype} of shape {image.shape}. Convert it, for '
            'instance by `(255 * image).round().astype(np.uint8)` from [0, '
            '1], or `(image // 257).astype(np.uint8)` from 16 bits.')
    return image.repeat(3, axis=2) if image.shape[2] == 1 else image


def _as_picture(image: Optional[np.ndarray],
                shape: Sequence[int]) -> np.ndarray:
    """Bring an image of any channels to uint8, BGR, for drawing on it."""
    if image is None:  # of a format that OpenCV does not know
        return np.zeros((*shape, 3), np.uint8)
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return image
    image = image.reshape(*image.shape[:2], -1)
    # The first three bands, or one of them as gray.
    image = image[..., :3] if image.shape[2] > 2 else image[..., :1]
    low, high = np.nanmin(image), np.nanmax(image)
    scaled = 255. * (image - low) / max(high - low, 1e-12)
    return np.nan_to_num(scaled).astype(np.uint8).repeat(
        3 // image.shape[2], axis=2)


def _similarity(pred: SegDataSample) -> Tuple[Sequence[str], np.ndarray]:
    """Get names and maps of the similarities of an image, if any."""
    if 'similarity' not in pred:
        return (), np.empty(0)
    return pred.similarity.names, pred.similarity.data.cpu().numpy()
