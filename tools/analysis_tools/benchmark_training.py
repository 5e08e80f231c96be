# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Time training iterations of stock, of both stages, and of LSeg's classifier.

All are built in one process and train in turn on the same random images:
data preprocessor, forward, backward and the optimizer of the config, and what
PromptLearnerHook does; no data loading. `stock again` is a second stock
network: what it differs by is noise. No checkpoint, vectors or data needed: a
teacher of the config is there, with random weights, and so are embeddings of
regions. A stock network with a teacher is compared as `distilled`.
"""
import argparse
import copy
import math
import os.path as osp
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from benchmark_options import add_options, parse_options


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='training configs')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: that of the data preprocessor)')
    parser.add_argument(
        '--batch-size',
        type=int,
        help='images in a batch (default: of the config)')
    parser.add_argument(
        '--batch', dest='old_batch', type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    add_options(parser, runs=20, warmup=3)
    return parse_options(parser, argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_textkd.analysis.benchmark import (interleave, num_bytes,
                                             peak_memory, randomize_clip,
                                             randomize_text, stopwatch,
                                             summarize)
from mmseg_textkd.analysis.benchmark_report import (TIME_HEADER, time_cells,
                                                    write_results)
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models.segmentors.frozen_clip_teacher import \
    FrozenCLIPTeacher
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.utils.arguments import read_config, warn_renamed
from mmseg_textkd.utils.report import describe, environment, table

STOCK = 'stock'


class Training:
    """A network in training, an iteration at a time.

    One iteration, of stage 1, is done at once: then the optimizer has all the
    state that it will have, also of what rests in stage 2.

    Args:
        cfg (Config): Config of the network.
        batch (dict): What a data loader yields.
        device (str): Where to train.
        hook (dict, optional): Config of the hook of the stages. Defaults to
            None.
    """

    def __init__(self,
                 cfg: Config,
                 batch: dict,
                 device: str,
                 hook: Optional[dict] = None) -> None:
        torch.manual_seed(0)
        self.batch = batch
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
        self.teacher = getattr(self.model, 'teacher', None)
        if isinstance(self.teacher, FrozenCLIPTeacher):
            randomize_clip(self.teacher.tower)
        self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.hook = HOOKS.build(hook) if hook else Hook()
        # All of a runner that the hook asks for.
        self.runner = SimpleNamespace(
            cfg=cfg,
            model=self.model,
            optim_wrapper=self.optim_wrapper,
            hooks=[],
            iter=0,
            max_iters=sys.maxsize,
            train_dataloader=(),
            train_loop=None,
            val_loop=None,
            message_hub=MessageHub.get_current_instance(),
            _resume=False)
        self.hook.before_train(self.runner)
        self.iterate()

    def iterate(self) -> None:
        """Do one iteration, as the training loop does.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        self.model.train()
        self.hook.before_train_iter(self.runner, self.runner.iter)
        losses = self.model.train_step(self.batch, self.optim_wrapper)
        self.hook.after_train_iter(self.runner, self.runner.iter)
        self.runner.iter += 1
        if not math.isfinite(losses['loss'].item()):
            raise RuntimeError('the training diverges on random images; '
                               'its time would tell nothing.')

    def peak_bytes(self, device: str) -> int:
        """Measure weights, also of a teacher, optimizer state and the peak."""
        state = [
            value for values in self.optim_wrapper.optimizer.state.values()
            for value in values.values() if torch.is_tensor(value)
        ]
        own = [*self.model.parameters(), *self.model.buffers(), *state]
        if isinstance(self.teacher, FrozenCLIPTeacher):
            own += self.teacher.tower.network.state_dict().values()
        elif self.teacher is not None:
            own += self.teacher.model.state_dict().values()
        return num_bytes(own) + peak_memory(self.iterate, device)


def random_batch(cfg: Config, size: Tuple[int, int], number: int,
                 device: str) -> dict:
    """Make random images with labels of all classes and edge maps."""
    unseen = torch.tensor(_unseen(cfg), dtype=int)
    generator = torch.Generator().manual_seed(0)
    channels = len(cfg.model.data_preprocessor.get('mean') or [0] * 3)
    inputs, samples = [], []
    for _ in range(number):
        inputs.append(
            torch.randint(
                256, (channels, *size), dtype=torch.uint8,
                generator=generator).to(device))
        labels = torch.randint(
            cfg.model.decode_head.num_classes, (1, *size), generator=generator)
        # As `HideClasses` does.
        labels[torch.isin(labels, unseen)] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=labels % 2)
        samples.append(sample.to(device))
    return dict(inputs=inputs, data_samples=samples)


def _unseen(cfg: Config) -> Sequence[int]:
    """Classes that the text head must not see labels of."""
    branch = cfg.model.decode_head.get('text_branch') or {}
    return branch.get('unseen') or []


def random_teacher(cfg: Config, folder: str) -> None:
    """Give the teacher of a config random weights, in place.

    Args:
        cfg (Config): Config of a network; without a segmentation network as
            its teacher it is left as it is.
        folder (str): Where to write config and weights of the teacher.
    """
    teacher = cfg.model.get('teacher') or {}
    if 'config' not in teacher:
        return
    teacher = Config.fromfile(cfg.model.teacher.config)
    teacher.merge_from_dict(cfg.model.teacher.get('cfg_options') or {})
    teacher = randomize_text(teacher)
    paths = [osp.join(folder, f'teacher{end}') for end in ('.py', '.pth')]
    teacher.dump(paths[0])
    torch.save(
        dict(state_dict=MODELS.build(teacher.model).state_dict()), paths[1])
    cfg.model.teacher = dict(config=paths[0], checkpoint=paths[1])


def add_regions(batch: dict, model: nn.Module) -> None:
    """Give images random embeddings of the regions of all classes, in place.

    Args:
        batch (dict): What a data loader yields.
        model (nn.Module): The text network that is to have them.
    """
    provider = next(iter(text_providers(model).values()))
    generator = torch.Generator().manual_seed(0)
    for sample in batch['data_samples']:
        vectors = torch.randn(
            provider.num_classes, provider.dim, generator=generator)
        regions = InstanceData(
            labels=torch.arange(len(vectors)), vectors=F.normalize(vectors))
        sample.region_embeddings = regions.to(sample.gt_sem_seg.data.device)


def build_trainings(cfg: Config, size: Tuple[int, int], number: int,
                    device: str) -> Dict[str, Training]:
    """Build what is compared.

    Args:
        cfg (Config): Config of a text network, or of one with a teacher.
        size (tuple[int, int]): Height and width of the images.
        number (int): Number of images in a batch.
        device (str): Where to train.

    Returns:
        dict[str, Training]: By name.

    Raises:
        ValueError: If the config has neither text nor teacher.
    """
    cfg = randomize_text(cfg)
    cfg.model.data_preprocessor.size = size
    has_text = 'text' in cfg.model.decode_head
    if not has_text and 'teacher' not in cfg.model:
        raise ValueError('the decode head of the config has no text; give a '
                         'text config, from which the stock one is derived.')
    stock, batch = to_stock_cfg(cfg), random_batch(cfg, size, number, device)
    with tempfile.TemporaryDirectory() as folder:
        random_teacher(cfg, folder)
        if has_text:
            if not _unseen(cfg):  # regions would tell of them
                add_regions(batch, MODELS.build(cfg.model))
            return _text_trainings(cfg, stock, batch, device)
        return {
            STOCK: Training(stock, batch, device),
            'stock again': Training(stock, batch, device),
            'distilled': Training(cfg, batch, device)
        }


def _text_trainings(cfg: Config, stock: Config, batch: dict,
                    device: str) -> Dict[str, Training]:
    lseg = copy.deepcopy(cfg)
    lseg.model.decode_head.update(
        role='classifier', text_branch=dict(norm='l2'))
    hook = dict(type='PromptLearnerHook')
    for other in cfg.get('custom_hooks') or []:
        if other['type'] == hook['type']:
            # There is no checkpoint to load.
            hook = dict(other, load_best=False)
    return {
        STOCK: Training(stock, batch, device),
        'stock again': Training(stock, batch, device),
        'stage 1': Training(cfg, batch, device, dict(hook, switch_at=None)),
        'stage 2': Training(cfg, batch, device, dict(hook, switch_at=1)),
        'LSeg-style': Training(lseg, batch, device, dict(hook, switch_at=None))
    }


def page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown."""
    parts = [
        f'{results["runs"]} rounds after {results["warmup"]} on '
        f'{results["device"]}; {describe(results["environment"])}'
    ]
    for path, entry in results['configs'].items():
        arms, (height, width) = entry['arms'], entry['size']
        peaks = {name: row['peak_bytes'] for name, row in arms.items()}
        rows = [(name, *time_cells(row), f'{peaks[name] / 2**20:.1f}',
                 f'{peaks[name] / peaks[STOCK]:.3f}')
                for name, row in arms.items()]
        parts += [
            f'`{path}`, {entry["batch"]} images of {height}x{width}:',
            table(('training', *TIME_HEADER, 'peak memory, MiB', 'ratio'),
                  rows)
        ]
    return '\n\n'.join(parts) + '\n'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, batch='--batch-size', json='--out', markdown='--out')
    args.batch_size = args.batch_size or args.old_batch
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = args.device or get_device()
    results = dict(
        runs=args.runs,
        warmup=args.warmup,
        device=args.device,
        environment=environment(),
        configs={})
    init_default_scope('mmseg')
    # Which parameters learn would be listed for each.
    MMLogger.get_current_instance().setLevel('WARNING')
    for path in args.configs:
        try:
            cfg = read_config(path)
            size = tuple(args.size or cfg.model.data_preprocessor.size)
            number = args.batch_size or cfg.train_dataloader.batch_size
            trainings = build_trainings(cfg, size, number, args.device)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f'Error: {path}: {error}')
        seconds = interleave(
            {
                name: stopwatch(training.iterate, args.device)
                for name, training in trainings.items()
            }, args.runs, args.warmup)
        arms = summarize(seconds, STOCK)
        for name, training in trainings.items():
            arms[name]['peak_bytes'] = training.peak_bytes(args.device)
        results['configs'][path] = dict(
            size=list(size), batch=number, arms=arms)
    write_results(results, page(results), args.out)


if __name__ == '__main__':
    main()
