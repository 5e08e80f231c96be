# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Train stock BiSeNetV2 and its text twin on ToyScenes and compare them.

Then segment street pictures with a released model.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir',
        default='work_dirs/quickstart',
        help='folder to write (default: %(default)s)')
    parser.add_argument(
        '--seed', type=int, default=0, help='of both arms (default: 0)')
    parser.add_argument(
        '--iters', type=int, help="iterations (default: the configs' own)")
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import mmseg_textkd  # before mmseg, which it makes importable

# isort: split
import cv2
import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmseg.apis import init_model
from mmseg.evaluation import IoUMetric

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.datasets import ToyScenesDataset
from mmseg_textkd.datasets.toy_scenes_generator import MANIFEST
from mmseg_textkd.models.record_calls import record_calls
from mmseg_textkd.utils.io import make_folder, write_files

matplotlib.use('Agg')

ROOT = Path(__file__).resolve().parents[1]
DATA = Path('data/toy_scenes')
STOCK = 'configs/stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py'
TEXT = ('configs/text_classifier/'
        'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py')
ARMS = dict(stock=STOCK, textkd=TEXT)
CLASSES = ToyScenesDataset.METAINFO['classes']
PALETTE = np.array(ToyScenesDataset.METAINFO['palette'], np.uint8)
NOTE = ('ToyScenes and ToyCLIP are toys, and this is one seed of a short '
        'run: the table shows that everything works, not that text helps.')
# A released model, and other words in the places of those it was trained with.
STREETS = ('textkd_efficientnet-lite0_in1k-pre_segformer_vit-b16-fixed_1xb8-'
           '1600i_camvid-360x480')
VECTORS = ROOT / 'model_zoo/street-words_vit-b16-openai.safetensors'
WORDS = dict(
    sky='clouds',
    building='house',
    pole='sign pole',
    road='street',
    pavement='sidewalk',
    tree='vegetation',
    signsymbol='direction sign',
    fence='railing',
    car='SUV',
    pedestrian='person',
    bicyclist='rider')
NEXT = """What next?
  your data   python tools/train.py YOUR_CONFIG.py   # see README.md
  Cityscapes  python tools/train.py {cityscapes}
  CamVid      python tools/train.py {camvid}"""


def run(args: List[str], log: Path, echo: str = '') -> None:
    """Run one of the tools; show the lines that match ``echo``.

    Args:
        args (list[str]): Tool and arguments.
        log (Path): Where its whole output goes.
        echo (str): Regular expression. Defaults to '': show nothing.

    Raises:
        SystemExit: If the tool fails, with the last line that it printed.
    """
    command = [sys.executable, '-W', 'ignore', *args]
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED='1')
    # Threads that wait must not spin on cores that others need: with one busy
    # process beside it on two cores an iteration takes 2.5 s, not 3.4; on
    # idle cores 1.4 s, not 1.2.
    env.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    env.setdefault('KMP_BLOCKTIME', '0')
    last = ''
    with open(log, 'w') as file, subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
            # A group of its own, so that it ends with its data loaders.
            start_new_session=True) as process:
        try:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                if echo and re.search(echo, line):
                    print(
                        '   ', line.split(' - ')[-1].strip()[:110], flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        sys.exit(f'quickstart: {args[0]} failed: {last}\n'
                 f'quickstart: its whole output is in {log}')


def stop(number: int, frame: Any) -> None:
    """Leave by way of an exception, so that :func:`run` cleans up."""
    sys.exit(f'quickstart: stopped by {signal.Signals(number).name}')


def train_and_test(config: str, work_dir: Path,
                   args: argparse.Namespace) -> None:
    """Train one arm with tools/train.py and test it with tools/test.py."""
    options = [f'randomness.seed={args.seed}']
    if args.iters:
        options += [
            f'train_cfg.max_iters={args.iters}',
            f'train_cfg.val_interval={args.iters}'
        ]
    print(f'Training {work_dir.name}: {config}', flush=True)
    run([
        'tools/train.py', config, '--work-dir',
        str(work_dir), '--cfg-options', *options
    ], work_dir / 'train.log', r'Iter\(train\)|Stage|Made|ToyCLIP')
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    print(f'Testing {work_dir.name}: {checkpoint}', flush=True)
    run([
        'tools/test.py', config, checkpoint, '--work-dir',
        str(work_dir), '--out',
        str(work_dir / 'predictions')
    ], work_dir / 'test.log', r'mIoU: ')


def class_iou(predictions: Path) -> np.ndarray:
    """Get the IoU of each class in percent, as IoUMetric does.

    Args:
        predictions (Path): Folder of predicted label maps.

    Returns:
        np.ndarray: IoU in percent, shape (K, ), NaN for a class that is
        neither in the labels nor predicted.
    """
    total = None
    for truth in sorted((DATA / 'ann_dir/val').glob('*.png')):
        areas = IoUMetric.intersect_and_union(
            torch.from_numpy(read_labels(predictions / truth.name)).long(),
            torch.from_numpy(read_labels(truth)).long(), len(CLASSES), 255)
        areas = torch.stack(areas[:2]).double()
        total = areas if total is None else total + areas
    return (100 * total[0] / total[1]).numpy()  # 0 / 0 is NaN, no warning


def read_labels(path: Path) -> np.ndarray:
    """Read a label map."""
    labels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if labels is None:
        sys.exit(f'quickstart: {path} is missing or broken')
    return labels


def print_table(iou: Dict[str, np.ndarray]) -> None:
    """Print the arms beside each other."""
    row = '{:<10} {:>8} {:>8} {:>8}'
    print('\n' + row.format('IoU in %', 'stock', 'text', 'gain'))
    lines = [*CLASSES, 'mIoU']
    for k, name in enumerate(lines):
        a, b = (
            float(np.nanmean(v) if name == 'mIoU' else v[k])
            for v in (iou['stock'], iou['textkd']))
        print(row.format(name, f'{a:.1f}', f'{b:.1f}', f'{b - a:+.1f}'))
    print(f'\n{NOTE}\n')


@torch.no_grad()
def similarity(model: torch.nn.Module, image: np.ndarray,
               class_index: int) -> np.ndarray:
    """Get the cosine between the pixels and the text of one class.

    Args:
        model (nn.Module): The trained text arm.
        image (np.ndarray): BGR image, uint8, shape (H, W, 3).
        class_index (int): Index of the class.

    Returns:
        np.ndarray: Cosines, float, at the resolution of the features.
    """
    head = model.decode_head
    data = model.data_preprocessor(
        dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)]))
    with record_calls(head.text_branch.projection) as calls:
        model.encode_decode(data['inputs'], [dict(img_shape=image.shape[:2])])
    pixels = torch.nn.functional.normalize(calls[0][1][0], dim=0)
    text = head.text_branch.text()[class_index]
    return torch.einsum('dhw,d->hw', pixels, text).numpy()


def draw(work_dir: Path, checkpoint: str, rows: int = 3) -> Path:
    """Draw images, truth, both predictions and a similarity map."""
    from matplotlib import pyplot as plt
    model = init_model(TEXT, checkpoint, device='cpu')
    class_index = CLASSES.index('car')
    truths = {
        p.name: read_labels(p)
        for p in sorted((DATA / 'ann_dir/val').glob('*.png'))
    }
    # The images that show the most classes, with the class among them.
    names = sorted(
        truths,
        key=lambda n:
        (class_index in truths[n], len(np.unique(truths[n]))))[-rows:]
    figure, axes = plt.subplots(
        rows, 5, figsize=(16, 1.75 * rows + 0.8), layout='constrained')
    for row, name in zip(axes, names):
        image = cv2.imread(str(DATA / 'img_dir/val' / name))
        panels = [image[..., ::-1], color(truths[name])]
        panels += [
            color(read_labels(work_dir / arm / 'predictions' / name))
            for arm in ARMS
        ]
        for axis, panel in zip(row, panels):
            axis.imshow(panel)
        shown = row[4].imshow(
            similarity(model, image, class_index),
            cmap='magma',
            interpolation='bilinear',
            extent=(0, image.shape[1], image.shape[0], 0))
        figure.colorbar(shown, ax=row[4], fraction=0.025, pad=0.01)
    titles = ('image', 'truth', 'stock', 'text classifier',
              f'cosine of pixels and the text of "{CLASSES[class_index]}"')
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis('off')
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=PALETTE[k] / 255)
        for k in range(len(CLASSES))
    ]
    figure.legend(
        handles, CLASSES, loc='outside lower center', ncols=len(CLASSES))
    path = work_dir / 'report.png'
    figure.savefig(path, dpi=110)
    return path


def draw_streets(work_dir: Path) -> Path:
    """Draw what a released model sees in street pictures.

    Once in the names that it was trained with, once in other words.
    """
    from matplotlib import pyplot as plt
    inferencer = TextSegInferencer(STREETS, device='cpu')
    inferencer.show_progress = False
    palette = np.array(inferencer.model.dataset_meta['palette'], np.uint8)
    names = [*inferencer.classes]
    words = [WORDS[name] for name in names]
    files = sorted(map(str, (ROOT / 'demo/pictures').glob('*.jpg')))
    trained = inferencer(files)['predictions']
    inferencer.set_classes(words, embeddings=VECTORS)
    asked = inferencer(files)['predictions']
    figure, axes = plt.subplots(
        len(files), 3, figsize=(10, 2.55 * len(files)), layout='constrained')
    for row, file, *labels in zip(axes, files, trained, asked):
        image = cv2.imread(file)[..., ::-1]
        row[0].imshow(image)
        for axis, found in zip(row[1:], labels):
            axis.imshow(image // 2 + color(found, palette) // 2)
    titles = ('picture', 'in the trained names', 'in other words')
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis('off')
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c / 255) for c in palette],
        [' / '.join(pair) for pair in zip(names, words)],
        loc='outside lower center',
        ncols=4)
    path = work_dir / 'demo.png'
    figure.savefig(path, dpi=80)
    return path


def color(labels: np.ndarray, palette: np.ndarray = PALETTE) -> np.ndarray:
    """Color a label map; unlabeled pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[labels]


def main() -> None:
    """Run the quickstart."""
    start = time.time()
    args = parse_args()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    work_dir = Path(args.work_dir).resolve()
    os.chdir(ROOT)  # where data and configs are looked for
    try:
        for name in ARMS:  # before anything takes time
            make_folder(work_dir / name)
    except OSError as error:
        sys.exit(f'quickstart: {error}')
    if (DATA / MANIFEST).is_file():  # whole, of any number of images
        print(f'Taking the ToyScenes images in {DATA}', flush=True)
    else:
        print('Making the ToyScenes images', flush=True)
        run(['tools/dataset_converters/toy_scenes.py', '--out',
             str(DATA)], work_dir / 'data.log', 'ToyScenes')
    for name, config in ARMS.items():
        train_and_test(config, work_dir / name, args)
    iou = {name: class_iou(work_dir / name / 'predictions') for name in ARMS}
    print_table(iou)
    checkpoint = (work_dir / 'textkd/last_checkpoint').read_text().strip()
    picture = draw(work_dir, checkpoint)
    report = dict(
        note=NOTE,
        seed=args.seed,
        iterations=args.iters or Config.fromfile(STOCK).train_cfg.max_iters,
        configs=ARMS,
        classes=CLASSES,
        iou={
            k: [None if np.isnan(x) else round(float(x), 2) for x in v]
            for k, v in iou.items()
        },
        miou={
            k: round(float(np.nanmean(v)), 2)
            for k, v in iou.items()
        },
        versions=dict(
            mmseg_textkd=mmseg_textkd.__version__, torch=torch.__version__),
        seconds=round(time.time() - start))
    write_files(
        {work_dir / 'report.json': json.dumps(report, indent=1).encode()})
    print(f'Wrote {picture} and {work_dir / "report.json"} after '
          f'{report["seconds"]} s')
    print('Segmenting five street pictures with a released model', flush=True)
    print(f'Wrote {draw_streets(work_dir)}\n')
    bisenetv2 = 'configs/text_classifier/textkd_bisenetv2_fcn_vit-b16'
    print(
        NEXT.format(
            cityscapes=f'{bisenetv2}_4xb4-160k_cityscapes-1024x1024.py',
            camvid=f'{bisenetv2}_1xb8-10k_camvid-360x480.py'))


if __name__ == '__main__':
    main()
