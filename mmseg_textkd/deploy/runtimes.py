# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The runtimes that networks are deployed to: one exporter for each.

What loads and runs their files is in ``run.py``, which stands alone.
"""
import importlib.util
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Sequence, Tuple

import torch

from .export import OPSET, reasons, to_onnx, to_torchscript
from .exportable import ExportableSegmentor, Size
from .tensorrt import build_script, check_graph

# Contents of files by name.
Files = Dict[str, bytes]


class Form(NamedTuple):
    """What form of a network is wanted.

    Attributes:
        size (tuple[int, int]): Height and width of the input.
        dynamic (bool): Whether other sizes are taken too.
        precision (str): 'fp32', 'fp16' or, quantized afterwards, 'int8'.
        meta (str): Classes and the like, for formats that hold a text.
        opset (int): Version of the operators of ONNX.
    """
    size: Size
    dynamic: bool = False
    precision: str = 'fp32'
    meta: str = '{}'
    opset: int = OPSET


def onnx(network: ExportableSegmentor, form: Form) -> Files:
    """Export to ONNX Runtime."""
    data = to_onnx(network, form.size, form.dynamic, form.meta, form.opset)
    if form.precision == 'fp16':
        data = half_precision(data)
    return {'model.onnx': data}


def half_precision(data: bytes) -> bytes:
    """Convert a graph of ONNX to half precision, but for input and output.

    Args:
        data (bytes): The graph.

    Returns:
        bytes: The new one.
    """
    from onnx import load_from_string
    from onnxruntime.transformers.float16 import convert_float_to_float16
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of weights that round to zero
        model = convert_float_to_float16(
            load_from_string(data), keep_io_types=True)
    # A factor that several resizes share is cast for each, under one name.
    nodes = {node.SerializeToString(): node for node in model.graph.node}
    del model.graph.node[:]
    model.graph.node.extend(nodes.values())
    return model.SerializeToString()


def openvino(network: ExportableSegmentor, form: Form) -> Files:
    """Export to OpenVINO. Half precision is that of the stored weights.

    By way of ONNX: of SegNeXt as OpenVINO traces it, its compiler (2026.4)
    ends the process with a segmentation fault.
    """
    import openvino
    data = to_onnx(network, form.size, form.dynamic, form.meta, form.opset)
    with reasons(form.dynamic), tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'model.onnx')
        source.write_bytes(data)
        openvino.save_model(
            openvino.convert_model(source),
            Path(folder, 'model.xml'),
            compress_to_fp16=form.precision == 'fp16')
        return _read(folder, 'model.xml', 'model.bin')


def ncnn(network: ExportableSegmentor, form: Form) -> Files:
    """Export to ncnn, by its converter pnnx, which reads TorchScript.

    Raises:
        ValueError: If ncnn lacks a layer of the network, with its name.
    """
    import pnnx
    example = network.example(form.size)
    with reasons(form.dynamic), tempfile.TemporaryDirectory() as folder:
        torch.jit.save(
            torch.jit.trace(network, example, check_trace=False),
            Path(folder, 'model.pt'))
        shape = ','.join(map(str, example.shape))
        done = subprocess.run([
            pnnx.EXEC_PATH, 'model.pt', f'inputshape=[{shape}]',
            f'fp16={int(form.precision == "fp16")}'
        ],
                              cwd=folder,
                              capture_output=True,
                              text=True)
        param = Path(folder, 'model.ncnn.param')
        if done.returncode or not param.exists():
            raise ValueError(f'pnnx ended with {done.returncode}: '
                             f'{done.stderr.strip()[-300:]}')
        kinds = {line.split()[0] for line in param.read_text().split('\n')[2:]
                 if line}  # yapf: disable
        # Those of ncnn begin with a capital and have no dots.
        lacking = sorted(k for k in kinds if '.' in k or '::' in k)
        if lacking:
            raise ValueError(f'ncnn has no layer for {", ".join(lacking)}.')
        found = _read(folder, 'model.ncnn.param', 'model.ncnn.bin')
    return dict(zip(('model.param', 'model.bin'), found.values()))


def litert(network: ExportableSegmentor, form: Form) -> Files:
    """Export to LiteRT, once TensorFlow Lite."""
    import litert_torch
    with reasons(form.dynamic), tempfile.TemporaryDirectory() as folder:
        edge = litert_torch.convert(network, (network.example(form.size), ))
        edge.export(str(Path(folder, 'model.tflite')))
        return _read(folder, 'model.tflite')


def executorch(network: ExportableSegmentor, form: Form) -> Files:
    """Export to ExecuTorch; XNNPACK computes all that it can."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import \
        XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    with reasons(form.dynamic):
        program = torch.export.export(network, (network.example(form.size), ))
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()])
        return {'model.pte': bytes(edge.to_executorch().buffer)}


def tensorrt(network: ExportableSegmentor, form: Form) -> Files:
    """Export to ONNX as TensorRT takes it, with what builds the engine."""
    data = to_onnx(network, form.size, False, form.meta, form.opset)
    check_graph(data)
    half = form.precision == 'fp16'
    return {'model.onnx': data, 'build.py': build_script(half).encode()}


def torchscript(network: ExportableSegmentor, form: Form) -> Files:
    """Export to TorchScript."""
    return {
        'model.pt': to_torchscript(network, form.size, form.dynamic, form.meta)
    }


def _read(folder: str, *names: str) -> Files:
    """Read files of a folder."""
    return {name: Path(folder, name).read_bytes() for name in names}


def lacking(modules: Sequence[str]) -> Tuple[str, ...]:
    """Tell which modules are not installed.

    Args:
        modules (Sequence[str]): Their names.

    Returns:
        tuple[str]: Those that cannot be imported.
    """
    return tuple(m for m in modules if importlib.util.find_spec(m) is None)


class Runtime(NamedTuple):
    """A runtime.

    Attributes:
        export (Callable): Makes its files.
        modules (Sequence[str]): What it imports to export.
        needs (str): What to install to run a folder, for pip.
        precisions (Sequence[str]): Those that it has here.
        dynamic (bool): Whether it may take several sizes.
        preprocess (bool): Whether normalisation is put into the graph.
    """
    export: Callable[[ExportableSegmentor, Form], Files]
    modules: Sequence[str]
    needs: str
    precisions: Sequence[str] = ('fp32', )
    dynamic: bool = False
    preprocess: bool = True


RUNTIMES = {
    'onnx':
    Runtime(onnx, ('onnx', 'onnxscript', 'onnxruntime'), 'onnxruntime',
            ('fp32', 'fp16', 'int8'), True),
    'openvino':
    Runtime(openvino, ('onnx', 'onnxscript', 'openvino'), 'openvino',
            ('fp32', 'fp16', 'int8'), True),
    'ncnn':
    Runtime(
        ncnn, ('ncnn', 'pnnx'), 'ncnn', ('fp32', 'fp16'), preprocess=False),
    'litert':
    Runtime(litert, ('litert_torch', 'ai_edge_litert'), 'ai-edge-litert'),
    'executorch':
    Runtime(executorch, ('executorch', ), 'executorch'),
    'tensorrt':
    Runtime(
        tensorrt, ('onnx', 'onnxscript', 'onnxruntime'),
        'onnxruntime-gpu tensorrt', ('fp32', 'fp16'),
        preprocess=False),
    'torchscript':
    Runtime(torchscript, (), 'torch', dynamic=True),
}
