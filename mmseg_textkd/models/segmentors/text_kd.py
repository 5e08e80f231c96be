# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
from fnmatch import fnmatch
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import SampleList, add_prefix
from torch import Tensor, nn

from ...utils.config import as_list, type_name
from ..label_spaces import refuse_label_spaces
from ..layers.score_map import ScoreMap
from ..record_calls import record_calls

# Module whose last output is the feature, and the convolutions that read the
# score map, by the type of the backbone. Only that of STDC is published.
_POOLING = ('backbone.spp.scales.*conv', 'backbone.spp.shortcut.conv')
_GLOBAL = 'backbone.global_feature_extractor'
SITES: Dict[str, Tuple[str, Sequence[str]]] = {
    'STDCContextPathNet':
    ('backbone.backbone', ('backbone.conv_avg.conv',
                           'backbone.arms.0.conv_layer.conv')),
    'BiSeNetV1': ('backbone.context_path.backbone',
                  ('backbone.context_path.gap_conv.1.conv',
                   'backbone.context_path.arm32.conv_layer.conv')),
    'BiSeNetV2':
    ('backbone.semantic.stage4_CEBlock', ('decode_head.convs.0.conv', )),
    'DDRNet': ('backbone.context_branch_layers.2', _POOLING),
    'PIDNet': ('backbone.i_branch_layers.2', _POOLING),
    'FastSCNN': (f'{_GLOBAL}.bottleneck3', (f'{_GLOBAL}.ppm.*.conv',
                                            f'{_GLOBAL}.out.conv')),
    'ICNet': ('backbone.backbone.layer4', ('backbone.psp_modules.*.conv',
                                           'backbone.psp_bottleneck.conv')),
    'MixVisionTransformer': ('backbone', ('decode_head.convs.3.conv', )),
}


@MODELS.register_module()
class TextKD(EncoderDecoder):
    r"""``EncoderDecoder`` with a score map of text, as TextKD is published.

    The cosine of the trunk's last feature with the text embedding of each
    class is a score map of K channels. Convolutions of the network read it
    beside their own input, which is what a concatenation before its context
    path is, and an alignment loss compares it with the labels.

    Backbone and heads are the stock ones, of any kind: what is new is
    ``score_map.*`` in the state dict, so that weights of the stock network
    load. At inference the text embeddings are constants.

    Source: `A Lightweight Enhancement Approach for Real-Time Semantic
    Segmentation by Distilling Rich Knowledge from Pre-Trained Vision-Language
    Model <https://doi.org/10.1561/116.20240015>`_; code:
    https://github.com/ChiaYi-LIN/mmsegmentation.

    Args:
        score_map (dict): ``in_channels``, ``text`` and further arguments of
            :class:`ScoreMap`, and where it is:

            - feature (str): Name of the module whose output is the feature,
              such as 'backbone.backbone'.
            - convs (Sequence[str]): Names of the convolutions that read the
              score map; ``*`` stands for any characters.
            - in_index (int): Which output of the module, where it has
              several. Defaults to -1, the last.

            The first two default to those of the backbone's type, where
            there are any: STDC (as published), BiSeNetV1, BiSeNetV2, DDRNet,
            PIDNet, Fast-SCNN, ICNet and SegFormer.
        alignment_head (dict, optional): Arguments of :class:`ScoreMapHead`
            that replace the default ones: temperature 0.07, cross entropy of
            weight 1.0, and the sampler, or the ``OhemCrossEntropy``, of the
            decode head. Defaults to None.
        text_loss (dict, optional): Loss between learned and fixed text in
            stage 2, such as ``dict(type='TextToTextContrastiveLoss')``.
            Defaults to None.
        **kwargs: As of ``EncoderDecoder``.

    Raises:
        ValueError: If a module does not exist, the backbone's type is unknown
            and ``feature`` or ``convs`` is missing, there is one class, or
            ``text_loss`` has no learned text.

    Examples:
        >>> model = dict(
        >>>     type='TextKD',
        >>>     score_map=dict(
        >>>         in_channels=1024,
        >>>         text=dict(type='ClassEmbeddings', file=...)))
    """

    def __init__(self,
                 score_map: dict,
                 alignment_head: Optional[dict] = None,
                 text_loss: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        options = dict(score_map)
        feature, convs = SITES.get(type(self.backbone).__name__, (None, None))
        feature = options.pop('feature', feature)
        convs = options.pop('convs', convs)
        if feature is None or convs is None:
            raise ValueError(
                f'TextKD has no sites for {type(self.backbone).__name__}; '
                'give `feature` (the module whose output is the feature) and '
                '`convs` (the convolutions that read the score map) in '
                '`score_map`.')
        if self.num_classes == 1:
            raise ValueError(
                'a score map needs the text of both classes: give the '
                'background a name too and set num_classes=2, out_channels=1.')
        self.in_index = options.pop('in_index', -1)
        readers = self._find_convs(convs)
        # With the same seed the network is initialized as the stock one.
        with torch.random.fork_rng(devices=[]):
            self.score_map = ScoreMap(
                num_classes=self.num_classes, convs=readers, **options)
            self.alignment_head = MODELS.build(
                self._alignment_cfg(kwargs['decode_head'], alignment_head))
        self.text_loss = None
        if text_loss is not None:
            self.text_loss = MODELS.build(text_loss)
            if not hasattr(self.score_map.text, 'base'):
                raise ValueError(
                    '`text_loss` needs prompts that learn, but `text` is a '
                    f'{type(self.score_map.text).__name__}.')
        # During a forward: the score map, and the input of the alignment loss,
        # which is the score map at the largest size that is read.
        self._scores: Optional[Tensor] = None
        self._largest: Optional[Tensor] = None
        self._find(feature).register_forward_hook(self._compute_scores)
        for name, conv in readers.items():
            conv.register_forward_hook(partial(self._add_scores, name))

    def _find(self, name: str) -> nn.Module:
        """Get a module by its name, or raise with the names that exist."""
        found: nn.Module = self
        for i, part in enumerate(parts := name.split('.')):
            children = dict(found.named_children())
            if part not in children:
                raise ValueError(
                    f'`score_map` names {name!r}, but '
                    f'{".".join(parts[:i]) or "the model"} has no {part!r}; '
                    f'it has {sorted(children)}.')
            found = children[part]
        return found

    def _find_convs(self, patterns: Sequence[str]) -> Dict[str, nn.Conv2d]:
        convs = {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        found: Dict[str, nn.Conv2d] = {}
        for pattern in patterns:
            own = {n: c for n, c in convs.items() if fnmatch(n, pattern)}
            if not own:
                raise ValueError(
                    f'{pattern!r} in `convs` of `score_map` is no convolution '
                    f'of the network; there are, among {len(convs)}, '
                    f'{list(convs)[-3:]}.')
            found.update(own)
        return found

    def _alignment_cfg(self, decode_head: dict,
                       changes: Optional[dict]) -> Dict[str, Any]:
        cfg = dict(
            type='mmseg.ScoreMapHead',
            num_classes=self.num_classes,
            ignore_index=self.decode_head.ignore_index,
            sampler=copy.deepcopy(decode_head.get('sampler')),
            loss_decode=dict(type='mmseg.CrossEntropyLoss', loss_weight=1.0))
        for loss in as_list(decode_head.get('loss_decode')):
            if type_name(loss) == 'OhemCrossEntropy':
                cfg['loss_decode'] = dict(loss, loss_weight=1.0)
        return dict(cfg, **(changes or {}))

    def _compute_scores(self, module: nn.Module, args: tuple,
                        output: Any) -> None:
        if isinstance(output, (list, tuple)):
            output = output[self.in_index]
        self._scores = self._largest = self.score_map(output)

    def _add_scores(self, name: str, conv: nn.Module, args: Tuple[Tensor],
                    output: Tensor) -> Tensor:
        if self._scores is None:
            raise RuntimeError(
                f'{name} reads the score map before it has been computed; '
                'name a `feature` that the network computes earlier.')
        scores, size = self._scores, args[0].shape[2:]
        if size[0] < scores.shape[2] or size[1] < scores.shape[3]:
            # The average of a concatenation is that of its parts.
            scores = F.adaptive_avg_pool2d(scores, (size[0], size[1]))
        elif size != scores.shape[2:]:
            scores = F.interpolate(scores, size=size, mode='nearest')
            assert self._largest is not None
            # Not the last: several scales may read it, in any order.
            if size.numel() > self._largest.shape[2:].numel():
                self._largest = scores
        return output + self.score_map.read(name, scores.to(output.dtype))

    def forward(self, *args, **kwargs) -> Any:
        """Run in one of the modes of ``BaseSegmentor.forward``.

        Returns:
            Any: As of ``BaseSegmentor``.
        """
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._scores = self._largest = None

    def loss(self, inputs: Tensor,
             data_samples: SampleList) -> Dict[str, Tensor]:
        """Compute the losses of the network and the alignment loss.

        Args:
            inputs (Tensor): Images with shape (N, 3, H, W).
            data_samples (list[:obj:`SegDataSample`]): Their labels.

        Returns:
            dict[str, Tensor]: Losses by name, the alignment loss under
            'align.'.

        Raises:
            ValueError: If the images are of a :class:`MultiDataset`.
        """
        refuse_label_spaces(self, data_samples)
        text = self.score_map.text
        with record_calls(text) as calls:
            losses = super().loss(inputs, data_samples)
        if self.text_loss is not None and text.learning:
            # Not encoded a second time.
            losses[self.text_loss.loss_name] = self.text_loss(
                calls[0][1], text.base)
        alignment = self.alignment_head.loss([self._largest], data_samples,
                                             self.train_cfg)
        losses.update(add_prefix(alignment, 'align'))
        return losses

    @torch.no_grad()
    def fold(self) -> Dict[str, Tensor]:
        """Fold the score map into the weights of the stock network.

        Returns:
            dict[str, Tensor]: State dict of the stock network.

        Raises:
            RuntimeError: In training mode.
            ValueError: With ``norm='l2'``, or if a convolution that reads the
                score map does not also read the feature itself.
        """
        if self.training:
            raise RuntimeError('only a model in evaluation mode can be '
                               'folded; call `.eval()` first.')
        state = {
            key: value
            for key, value in self.state_dict().items()
            if not key.startswith('score_map.')
        }
        for name in self.score_map.convs:
            name = name.replace('/', '.')
            if self.score_map.norm == 'rms' and not self._reads_feature(name):
                raise ValueError(
                    f'{name} reads the score map beside another input than '
                    'the feature that it is computed of, so that it does not '
                    'fold into it. Deploy the network as it is.')
            key = f'{name}.weight'
            state[key] = self.score_map.fold(name, state[key])
        return state

    def _reads_feature(self, name: str) -> bool:
        """Whether a convolution reads the feature or its average."""
        channels = self.get_submodule(name).in_channels
        if channels != self.score_map.in_channels:
            return False
        first = next(self.parameters())
        size = (1,
                next(m.in_channels for m in self.backbone.modules()
                     if isinstance(m, nn.Conv2d)), 128, 128)
        image = torch.randn(
            size, generator=torch.Generator().manual_seed(0)).to(first)
        with record_calls(self.score_map) as seen, \
                record_calls(self.get_submodule(name)) as calls:
            self.forward(image, mode='tensor')
        feature, read = seen[0][0], calls[0][0]
        if feature.shape != read.shape:
            feature = F.adaptive_avg_pool2d(feature,
                                            (read.shape[2], read.shape[3]))
        return torch.allclose(feature, read, rtol=1e-3, atol=1e-6)
