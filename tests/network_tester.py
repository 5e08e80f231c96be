# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What must hold for text on any network: a tester to inherit from."""
import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from graphs import run_graph
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, HOOKS, MODELS
from mmseg.structures import SegDataSample
from tiny import changed, predict_logits, run
from torch.utils.data import Dataset

from mmseg_textkd.deploy import fold_state_dict
from mmseg_textkd.deploy.export import to_onnx
from mmseg_textkd.deploy.export_check import check
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_parameters,
                                                 text_providers)

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
ROLES = ('classifier', 'auxiliary')


@functools.cache
def _read_config(path):
    return Config.fromfile(path)


def load_config(path):
    """The config in a file, one of the caller's own."""
    return copy.deepcopy(_read_config(path))


def offline(cfg):
    """Leave out weights that would be downloaded; in place."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'pretrained' or (isinstance(value, dict)
                                       and value.get('type') == 'Pretrained'):
                cfg[key] = None
            else:
                offline(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            offline(value)
    return cfg


def each_head(model):
    """The configs of all heads of a model's config."""
    auxiliary = model.get('auxiliary_head') or []
    if not isinstance(auxiliary, list):
        auxiliary = [auxiliary]
    return [model.decode_head, *auxiliary]


def load_model(path):
    """Config of the model in a file, for small images and no network."""
    model = offline(copy.deepcopy(load_config(path).model))
    for head in each_head(model):
        losses = head.loss_decode
        for loss in losses if isinstance(losses, list) else [losses]:
            if 'min_kept' in loss:
                loss.min_kept = 100
        if head.get('sampler'):
            head.sampler.min_kept = 100
    if 'text' in model.decode_head:
        # Vectors of the same width that need no file.
        provider = model.decode_head.text
        embeddings = provider.embeddings
        if provider.type == 'ContextPromptLearner':
            provider.vocabulary = embeddings.build.vocabulary
        provider.embeddings = dict(
            type='ControlEmbeddings', kind='random', dim=embeddings.dim)
    return model


def stock_twin(path, prefix='textkd_'):
    """The config of the same name without the text."""
    name = path.name[len(prefix):]
    # The text encoder, and what else it is about.
    name = re.sub('_(vit-b16|rn50|toyclip|random)(-[a-z0-9-]+)?_', '_', name)
    twin = CONFIGS / 'stock' / name
    assert twin.exists(), f'{path.name} has no stock twin'
    return twin


def samples(size, num_classes, batch=2):
    """Labels with every class, some ignored pixels, and an edge map."""
    out = []
    for _ in range(batch):
        labels = torch.randint(0, num_classes, (1, *size))
        labels[:, :3] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=(labels % 2))
        out.append(sample)
    return out


@DATASETS.register_module()
class RandomScenes(Dataset):
    """Two random images, with labels of all classes and edge maps."""

    def __init__(self, size, num_classes):
        torch.manual_seed(4)
        self.samples = samples(size, num_classes)
        self.images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(
            inputs=self.images[index],
            data_samples=copy.deepcopy(self.samples[index]))


@HOOKS.register_module()
class WatchHook(Hook):
    """Note what an iteration changes, and its loss."""

    priority = 'LOWEST'

    def __init__(self, noise=0.01):
        self.noise, self.changed, self.losses = noise, [], []

    def before_train(self, runner):
        # Some are initialized to keep the gradient of others at zero.
        with torch.no_grad():
            for param in runner.model.parameters():
                if param.requires_grad:
                    param.add_(self.noise * torch.randn_like(param))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        state = runner.model.state_dict()
        self.before = {k: v.clone() for k, v in state.items()}

    def after_train_iter(self, runner, outputs, **kwargs):
        state = runner.model.state_dict()
        self.changed.append(changed(self.before, state))
        self.losses.append(float(outputs['loss']))


def two_iterations(path, work_dir, size, role='classifier'):
    """Train the network of a config in earnest: an iteration of each stage.

    Model, optimizer, hooks and stages are those of the config; only data and
    schedule are not.
    """
    cfg = copy.deepcopy(load_config(path))
    cfg.model = load_model(path)
    if role == 'auxiliary':
        # What the guide says to change in a config.
        cfg.model.decode_head.role = role
        cfg.custom_hooks = cfg.auxiliary_hooks
    cfg.model.data_preprocessor.size = size
    classes = cfg.model.decode_head.num_classes
    cfg.train_dataloader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='RandomScenes', size=size, num_classes=classes))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    for key in ('val', 'test'):
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{key}_{part}'] = None
    # A warm-up would begin with steps too small for float32.
    cfg.param_scheduler = None
    hook, = (h for h in cfg.custom_hooks if h.type == 'PromptLearnerHook')
    hook.switch_at = 1
    cfg.custom_hooks.append(dict(type='WatchHook'))
    cfg.default_hooks = dict(checkpoint=None)
    cfg.visualizer = None
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=0)
    runner = run(cfg)
    watch, = (h for h in runner.hooks if isinstance(h, WatchHook))
    return runner, watch


def rates(cfg):
    """A model's learning rates and weight decays by parameter; the model."""
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    members = {id(p): g for g in groups for p in g['params']}
    members = {i: (g['lr'], g['weight_decay']) for i, g in members.items()}
    params = model.named_parameters()
    return model, {n: members[id(p)] for n, p in params if p.requires_grad}


class BaseSizeTester:
    """What must hold for text on each size of a network.

    A subclass names the network as the configs do, and the text head.
    """
    network = ''
    head = ''
    size = (64, 128)
    # Stock parameters that are never learned, with text or without.
    idle = set()
    # Of blocks that repeat, one of each kind is built; all are trained.
    shallow = {}

    @classmethod
    def main_config(cls):
        """The text config on Cityscapes."""
        name = f'textkd_{cls.network}_vit-b16_*_cityscapes-*.py'
        path, = (CONFIGS / 'text_classifier').glob(name)
        return path

    @pytest.fixture(scope='class')
    @classmethod
    def built(cls):
        """Models that are built once for the class, and given as copies."""
        return {}

    @pytest.fixture
    def build(self, built):
        """Get a function that builds the stock model or, in a role, ours."""

        def build(role=None, **text):
            key = role, repr(text)
            if key not in built:
                path = self.main_config()
                cfg = load_model(path if role else stock_twin(path))
                cfg.backbone.update(self.shallow)
                if role:
                    cfg.decode_head.update(role=role, **text)
                torch.manual_seed(0)
                model = MODELS.build(cfg)
                model.init_weights()
                built[key] = revert_sync_batchnorm(model)
            return copy.deepcopy(built[key])

        return build

    def losses(self, model):
        """Losses on the same image, with the same random numbers."""
        torch.manual_seed(1)
        inputs = torch.randn(2, 3, *self.size)
        labels = samples(self.size, model.decode_head.num_classes)
        return model.loss(inputs, labels)

    def without_gradient(self, model, losses):
        """Names of the parameters that the losses do not reach."""
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        return {n for n, p in model.named_parameters() if p.grad is None}

    @pytest.mark.stacks
    def test_config_is_built_alone_and_optimized_as_its_twin(self, bare):
        """Rate and decay; prompts and scales are not decayed."""
        path = self.main_config()
        cfg, twin = load_config(path), load_config(stock_twin(path))
        assert cfg.model.decode_head.type == self.head
        (model, ours), (plain, stock) = rates(cfg), rates(twin)
        assert not text_providers(plain)
        provider, = text_providers(model).values()
        # What comes from a file says how to make it.
        assert not provider.filled
        with pytest.raises(RuntimeError, match='tools/encode_text.py'):
            provider()
        text = {n for n in ours if '.text.' in n or n.endswith('log_scale')}
        assert text and {ours[n][1] for n in text} == {0}
        branch = {n for n in ours if n not in stock}
        assert text <= branch
        # The branch learns at the rate of the stock classifier.
        stock.pop('decode_head.conv_seg.weight')
        rate, _ = stock.pop('decode_head.conv_seg.bias')
        assert {ours[n][0] for n in branch} == {rate}
        assert {n: ours[n] for n in stock} == stock

    def test_stock_names_and_gradients(self, build):
        """The text head fits, and all but the prompts get a gradient."""
        model = build('classifier')
        self.check_names(model, build().state_dict(), 'classifier')
        idle = self.without_gradient(model, self.losses(model))
        assert idle == self.idle | set(prompt_parameters(model))

    def check_names(self, model, stock, role):
        """All outside the text branch have the names of the stock model."""
        text = model.state_dict()
        branch = 'conv_seg' if role == 'classifier' else 'text_branch'
        prefix = f'decode_head.{branch}.'
        losses = 'decode_head.text_losses.'
        extra = {k for k in text if k.startswith((prefix, losses))}
        missing = set(stock) - (set(text) - extra)
        replaced = {prefix + 'weight', prefix + 'bias'}
        assert missing == (replaced if role == 'classifier' else set())
        assert (set(text) - extra) <= set(stock)
        assert extra
        # Nothing of a stock checkpoint slips into the text branch.
        loaded = model.load_state_dict(stock, strict=False)
        assert set(loaded.unexpected_keys) == missing
        # torch itself is lenient about this counter of batch norms.
        counters = {k for k in extra if k.endswith('num_batches_tracked')}
        assert set(loaded.missing_keys) == extra - counters


class BaseNetworkTester(BaseSizeTester):
    """What must hold for text on one network, in both roles."""
    # Pooling to 1, 2, 3 and 6 bins exports where they divide the features.
    onnx_size = BaseSizeTester.size
    export = staticmethod(to_onnx)
    # Strides of 8 divide it and those of 16 do not, as for CamVid.
    odd_size = (72, 120)

    def test_stock_names_and_gradients(self, build):
        """Every parameter gets one, without which DDP complains; prompts rest.

        In the role auxiliary losses and prediction are those of the stock
        model with the same weights, and it folds by being left out.
        """
        stock = build()
        state = copy.deepcopy(stock.state_dict())
        expected = self.losses(stock)
        for role in ROLES:
            losses = [dict(type='TextAlignmentLoss', loss_weight=.4)]
            model = build(role, text_losses=losses)
            self.check_names(model, state, role)
            before = {n: set(vars(m)) for n, m in model.named_modules()}
            losses = self.losses(model)
            added, = losses.keys() - expected.keys()
            assert added == 'decode.loss_text_align'
            assert 0 < losses[added] < 0.4 * 20
            idle = self.without_gradient(model, losses)
            assert idle == self.idle | set(prompt_parameters(model))
            # Nothing is left on the modules.
            after = {n: set(vars(m)) for n, m in model.named_modules()}
            assert before == after
            assert not any(m._forward_hooks or m._forward_pre_hooks
                           for m in model.decode_head.modules())
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value)
        assert self.without_gradient(stock, expected) == self.idle
        torch.testing.assert_close(
            self.logits(model, self.size), self.logits(stock, self.size))
        torch.manual_seed(2)
        self.check_fold(self.settle(model), stock.eval())

    def settle(self, model):
        """Give batch norms statistics and text non-neutral values."""
        with torch.no_grad():
            for param in model.decode_head.text_branch.parameters():
                param.add_(torch.randn_like(param) * 0.1)
            for provider in text_providers(model).values():
                provider.refresh()
        model.train()
        for _ in range(2):
            self.losses(model)
        return model.eval()

    def logits(self, model, size):
        """Full-size logits in evaluation mode, always of one image."""
        torch.manual_seed(3)
        inputs = torch.randn(1, 3, *size)
        # Again: SegNeXt's head draws random numbers too.
        torch.manual_seed(3)
        return predict_logits(model.eval(), inputs)

    @pytest.mark.stacks
    def test_main_config_goes_through_both_stages(self, tmp_path):
        model = self.check_stages(tmp_path, 'classifier')
        # Evaluation, at the size of training and at another.
        for size in (self.size, self.odd_size):
            logits = self.logits(model, size)
            assert logits.shape == (1, model.decode_head.num_classes, *size)
            assert logits.isfinite().all() and logits.std() > 0
        # What has been trained survives being saved.
        torch.save(model.state_dict(), tmp_path / 'state.pth')
        copied = MODELS.build(load_model(self.main_config()))
        copied = revert_sync_batchnorm(copied)
        copied.load_state_dict(
            torch.load(tmp_path / 'state.pth', weights_only=True), strict=True)
        assert torch.equal(
            self.logits(copied, self.size), self.logits(model, self.size))

    def check_stages(self, folder, role):
        """What should learn in a stage moves, and nothing else."""
        runner, watch = two_iterations(self.main_config(), folder,
                                       self.odd_size, role)
        model = runner.model
        params = set(dict(model.named_parameters()))
        prompts = set(prompt_parameters(model))
        assert prompts and all('.text.' in name for name in prompts)
        first, second = (keys & params for keys in watch.changed)
        assert first ^ (params - prompts - self.idle) == set()
        # Batch norms too have learned.
        assert watch.changed[0] - params
        if role == 'auxiliary':
            assert second == params - self.idle
        else:
            assert second == set(text_parameters(model))
            # The network rests, and so do its statistics.
            texts = {k for k in watch.changed[1] if '.text.' in k}
            assert watch.changed[1] - second <= texts
        assert all(map(math.isfinite, watch.losses))
        assert watch.losses[0] != watch.losses[1]
        return model

    def test_classifier_folds_and_exports(self, build):
        model, stock = self.settle(build('classifier')), build().eval()
        self.check_fold(model, stock)
        self.fix_random_numbers(stock)
        network = ExportableSegmentor(stock)
        data = self.export(network, self.onnx_size, False, '{}')
        # It raises if they differ, with the difference.
        check('folded', network, functools.partial(run_graph, data),
              [network.example(self.onnx_size)])

    def check_fold(self, model, stock):
        """Fold into the stock model, which then predicts the same."""
        count = sum(p.numel() for p in stock.parameters())
        stock.load_state_dict(fold_state_dict(model), strict=True)
        for size in (self.size, (96, 160)):
            expected = self.logits(model, size)
            got = self.logits(stock, size)
            bound = 1e-4 * max(1., expected.abs().max().item())
            assert (got - expected).abs().max() < bound
            same = got.argmax(1) == expected.argmax(1)
            assert same.float().mean() > 0.9999
        assert count == sum(p.numel() for p in stock.parameters())

    def fix_random_numbers(self, model):
        """Take the chance out of evaluation: SegNeXt's head has it.

        It draws the bases of its matrix decomposition anew each time, or
        once and for all.
        """
        if self.head == 'TextLightHamHead':
            model.decode_head.hamburger.ham.rand_init = False
            self.logits(model, self.size)
