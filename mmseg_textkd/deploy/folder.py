# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Folder of a deployed network: files, metadata, and its check."""
import hashlib
import json
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..utils.io import new_folder
from ..utils.report import count_cost
from ..version import __version__
from . import run
from .export_check import check, mean_iou
from .exportable import ExportableSegmentor
from .int8 import QUANTIZERS, quantize
from .run import CLASSES, NETWORK, Network
from .runtimes import RUNTIMES, Files, Form, Runtime, lacking
from .tensorrt import trtexec

CARD = '''\
# {name}

| | |
|---|---|
| runtime | {runtime}: `pip install numpy opencv-python {needs}` |
| precision | {precision} |
| input | {input} |
| output | {output} |
| normalization | {normalization} |
| size | {size} |
| network | {params:,} parameters, {flops:.3f} GFLOPs |
| made of | `{config}`, `{checkpoint}` |
| made with | {versions} |
| SHA-256 | {hashes} |

`{classes_file}` has a line for each class, in the order of the labels: red,
green, blue, name. `{network_file}` has the rest of this page for programs.

```shell
python run.py street.jpg --out shown.png
python run.py drive.mp4 --out shown.mp4
```

## Compared with PyTorch

{checks}
'''
NOT_RUN = ('Not run in TensorRT: by its documentation the graph holds only '
           'what TensorRT takes, and it was run in ONNX Runtime ({provider}).')
ENGINE = '''
## TensorRT

Where its GPU is, one of

```shell
{trtexec}
python build.py
```

builds `model.engine`. `run.py` needs none: it takes ONNX Runtime's TensorRT
provider (`onnxruntime-gpu`) where there is one.
'''


def require(name: str, precision: str, dynamic: bool = False) -> Runtime:
    """Get a runtime, or say why it cannot be had.

    Args:
        name (str): Its name.
        precision (str): 'fp32', 'fp16' or 'int8'.
        dynamic (bool): Whether it is to take several sizes. Defaults to
            False.

    Returns:
        Runtime: The runtime.

    Raises:
        ImportError: If something is not installed, with what to install.
        ValueError: If it has no such precision or takes one size only.
    """
    runtime = RUNTIMES[name]
    if precision not in runtime.precisions:
        raise ValueError(f'{name} has no {precision} here, only '
                         f'{", ".join(runtime.precisions)}.')
    if dynamic and not runtime.dynamic:
        able = [k for k, v in RUNTIMES.items() if v.dynamic]
        raise ValueError(f'{name} takes one size, not --dynamic, which only '
                         f'{", ".join(able)} have.')
    missing = lacking(runtime.modules)
    if precision == 'int8':
        missing += lacking(QUANTIZERS[name].modules)
    if missing:
        raise ImportError(
            f'{name} needs {", ".join(missing)}, not installed here: pip '
            f'install -r requirements/{name}.txt')
    return runtime


def deploy(out: Path,
           name: str,
           network: ExportableSegmentor,
           form: Form,
           classes: Mapping[str, Sequence],
           images: Mapping[str, Sequence[Tensor]],
           calibration: Sequence[np.ndarray] = (),
           evaluate: Optional[str] = None,
           source: Optional[Mapping[str, str]] = None) -> Dict[str, Any]:
    """Export a network, run it, compare it, and write its folder.

    Args:
        out (Path): The folder, which must not exist.
        name (str): The runtime.
        network (ExportableSegmentor): The network.
        form (Form): What is wanted of it.
        classes (Mapping): ``classes`` and ``palette`` (RGB).
        images (Mapping[str, Sequence[Tensor]]): Inputs to compare on, by what
            they are.
        calibration (Sequence[np.ndarray]): For 'int8': inputs to calibrate
            on. Defaults to ().
        evaluate (str, optional): Config on whose validation set the mIoU is
            measured; in 'int8' layers stay in float32 if it falls by more
            than 1. Defaults to None.
        source (Mapping[str, str], optional): Names of ``config`` and
            ``checkpoint``. Defaults to None.

    Returns:
        dict[str, Any]: What is in ``network.json``.

    Raises:
        FileExistsError: If OUT exists.
        ImportError: As of :func:`require`.
        ValueError: As of :func:`require` and :func:`check`, if the network
            does not export, or the runtime does not take it.
    """
    runtime = require(name, form.precision, form.dynamic)
    network.check_size(form.size, form.dynamic)
    example = network.example(form.size)
    cost = count_cost(network, lambda: network(example))
    meta: Dict[str, Any] = dict(
        name=out.name,
        runtime=name,
        needs=runtime.needs,
        precision=form.precision,
        size=None if form.dynamic else list(form.size),
        input=dict(
            shape=list(example.shape),
            dtype=str(example.dtype).split('.')[-1],
            layout='NHWC' if network.preprocess else 'NCHW'),
        output=network.output,
        preprocess=None if network.preprocess else network.spec(),
        params=cost.params,
        flops=cost.flops,
        versions=_versions(runtime),
        **(source or dict(config='', checkpoint='')))
    with new_folder(out) as folder:
        files = runtime.export(network, form)
        if form.precision == 'int8':
            files, kept, meta['mIoU_fp32'] = _to_int8(name, files, meta,
                                                      classes, calibration,
                                                      evaluate)
            meta['float32_layers'] = kept
        write(folder, files, meta, classes)
        reader = Network(folder)

        def predict(x: Tensor) -> Tensor:
            return torch.from_numpy(
                np.asarray(reader.predict(np.ascontiguousarray(x.numpy()))))

        exact = form.precision == 'fp32'
        compared = [
            check(k, network, predict, v, exact) for k, v in images.items()
        ]
        meta['checks'] = [dict(c._asdict(), text=str(c)) for c in compared]
        if evaluate:
            meta['mIoU'] = mean_iou(reader, evaluate)
        if name == 'tensorrt':
            meta['provider'] = reader.meta['provider']
        write(folder, files, meta, classes)
    return meta


def write(folder: Path, files: Files, meta: Dict[str, Any],
          classes: Mapping[str, Sequence]) -> None:
    """Write or write anew what is in a folder.

    Args:
        folder (Path): The folder, which is there.
        files (dict[str, bytes]): Files of the runtime.
        meta (dict): For ``network.json``; ``sha256`` of the files is added.
        classes (Mapping): ``classes`` and ``palette`` (RGB).
    """
    meta['sha256'] = {
        k: hashlib.sha256(v).hexdigest()
        for k, v in files.items()
    }
    rows = (' '.join([*map(str, color), ' '.join(name.split())])
            for name, color in zip(classes['classes'], classes['palette']))
    texts = {
        NETWORK: json.dumps(meta, indent=2) + '\n',
        CLASSES: '\n'.join(rows) + '\n'
    }
    if 'checks' in meta:
        texts['README.md'] = card(meta)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding='utf-8')
    shutil.copyfile(run.__file__, folder / 'run.py')


def card(meta: Mapping[str, Any]) -> str:
    """Write the page that explains a folder.

    Args:
        meta (Mapping): What is in ``network.json``.

    Returns:
        str: Markdown.
    """
    shape = ' x '.join(map(str, meta['input']['shape']))
    spec, size = meta['preprocess'], meta['size']
    normalization = 'in the graph'
    order = 'BGR as OpenCV reads it'
    if spec:
        order = 'RGB' if spec['swap_channels'] else 'BGR'
        normalization = (f'yours to do: (x - {spec["mean"]}) / {spec["std"]}'
                         if spec['mean'] else 'none')
    checks = [f'- {c["text"]}' for c in meta['checks']]
    if meta.get('float32_layers'):
        checks.append(f'- in float32: {", ".join(meta["float32_layers"])}')
    for key, what in (('mIoU_fp32', 'float32'), ('mIoU', meta['precision'])):
        if meta.get(key) is not None:
            checks.append(f'- mIoU, {what}: {meta[key]:.2f}')
    half = meta['precision'] == 'fp16'
    if meta['runtime'] == 'tensorrt' and 'Tensorrt' not in meta['provider']:
        checks.append(f'- {NOT_RUN.format(**meta)}')
    page = CARD.format(
        name=meta['name'],
        runtime=meta['runtime'],
        needs=meta['needs'],
        precision=meta['precision'],
        input=f'{shape}, {meta["input"]["dtype"]}, {meta["input"]["layout"]}, '
        f'{order}',
        output=f'{meta["output"]} of each pixel, of the size of the input',
        normalization=normalization,
        size=f'{size[0]} x {size[1]}, to which `run.py` resizes'
        if size else 'any that the network takes',
        params=meta['params'],
        flops=meta['flops'] / 1e9,
        config=meta['config'],
        checkpoint=meta['checkpoint'],
        versions=', '.join(f'{k} {v}' for k, v in meta['versions'].items()),
        hashes=', '.join(f'{k} `{v}`' for k, v in meta['sha256'].items()),
        classes_file=CLASSES,
        network_file=NETWORK,
        checks='\n'.join(checks))
    if meta['runtime'] == 'tensorrt':
        page += ENGINE.format(trtexec=trtexec(half))
    return page


def _to_int8(name: str, files: Files, meta: Dict[str, Any],
             classes: Mapping[str, Sequence], inputs: Sequence[np.ndarray],
             evaluate: Optional[str]):
    """Quantize; returns files, layers in float32, and mIoU in float32."""
    if not inputs:
        raise ValueError('int8 needs images to calibrate on.')
    with tempfile.TemporaryDirectory() as root:

        def reader(files: Files) -> Network:
            folder = Path(tempfile.mkdtemp(dir=root))
            write(folder, files, dict(meta), classes)
            return Network(folder)

        plain = reader(files)
        reference = [_labels(plain, image) for image in inputs]
        miou = mean_iou(plain, evaluate) if evaluate else None

        def disagreement(files: Files) -> float:
            other = reader(files)
            return float(
                np.mean([(_labels(other, image) != labels).mean()
                         for image, labels in zip(inputs, reference)]))

        def loss(files: Files) -> float:
            assert miou is not None and evaluate is not None
            return miou - mean_iou(reader(files), evaluate)

        found = quantize(QUANTIZERS[name], files, inputs,
                         loss if evaluate else None, disagreement)
    return found.files, found.kept, miou


def _labels(network: Network, image: np.ndarray) -> np.ndarray:
    """Labels of an input."""
    output = network.predict(image)
    return output if output.ndim == 3 else output.argmax(1)


def _versions(runtime: Runtime) -> Dict[str, str]:
    """Versions of what made a folder."""
    found = dict(mmseg_textkd=__version__)
    for name in (m.replace('_', '-') for m in ('torch', *runtime.modules)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # under another name, as for a GPU
            found[name] = 'unknown'
    return found
