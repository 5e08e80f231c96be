# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Quantization to 8 bits after training, with images to calibrate on.

Weights have 8 bits by channel. The classifier, the last convolution, stays in
float32, and so do layers without which the network would lose too much.
"""
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from ..utils.progress import track
from .runtimes import Files

GROUPS = 8
# With Clip (ReLU6): the range before it may be much larger.
OPERATORS = ['Conv', 'MatMul', 'Gemm', 'Relu', 'Clip', 'Add']


def onnx_layers(files: Files) -> List[str]:
    """Convolutions of an ONNX graph, in their order."""
    import onnx
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.load(_prepared(files, Path(folder))).graph
    return [node.name for node in graph.node if node.op_type == 'Conv']


def onnx_int8(files: Files, inputs: Sequence[np.ndarray],
              kept: Sequence[str]) -> Files:
    """Quantize for ONNX Runtime (QDQ).

    Activations are uint8, with ranges between the extremes that the images
    show. Weights are int8 of half the range: products of uint8 and int8
    saturate on CPUs with AVX2 but without VNNI, and silently.

    Args:
        files (dict[str, bytes]): What was exported.
        inputs (Sequence[np.ndarray]): Inputs of the network.
        kept (Sequence[str]): Layers that stay in float32.

    Returns:
        dict[str, bytes]: The quantized files.
    """
    import onnx
    import onnxruntime.quantization as ort

    class Reader(ort.CalibrationDataReader):

        def __init__(self) -> None:
            self.inputs = iter(inputs)

        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            image = next(self.inputs, None)
            return None if image is None else dict(image=image)

    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder, 'int8.onnx'), _prepared(files, Path(folder))
        graph = onnx.load(path).graph
        # No kernel takes weights that are a stack of matrices, as SegNeXt's.
        stacks = {w.name for w in graph.initializer if len(w.dims) > 2}
        products = [
            node.name for node in graph.node
            if node.op_type == 'MatMul' and stacks & {*node.input}
        ]
        ort.quantize_static(
            path,
            str(out),
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            reduce_range=True,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=[*kept, *products])
        return {'model.onnx': out.read_bytes()}


def _prepared(files: Files, folder: Path) -> str:
    """Let ONNX Runtime infer shapes and fuse what it will."""
    from onnxruntime.quantization.shape_inference import quant_pre_process
    plain, out = folder / 'plain.onnx', folder / 'prepared.onnx'
    plain.write_bytes(files['model.onnx'])
    # Its symbolic shape inference does not know all operators.
    quant_pre_process(str(plain), str(out), skip_symbolic_shape=True)
    return str(out)


def openvino_layers(files: Files) -> List[str]:
    """Convolutions of an OpenVINO model, in their order."""
    return [
        op.get_friendly_name() for op in _openvino(files).get_ordered_ops()
        if op.get_type_name() in ('Convolution', 'GroupConvolution')
    ]


def openvino_int8(files: Files, inputs: Sequence[np.ndarray],
                  kept: Sequence[str]) -> Files:
    """Quantize for OpenVINO, by NNCF; as of :func:`onnx_int8`."""
    import nncf
    import openvino
    model = nncf.quantize(
        _openvino(files),
        nncf.Dataset(list(inputs)),
        subset_size=len(inputs),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE),
        ignored_scope=nncf.IgnoredScope(names=list(kept)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.xml')
        openvino.save_model(model, path, compress_to_fp16=False)
        return {p.name: p.read_bytes() for p in sorted(path.parent.iterdir())}


def _openvino(files: Files):  # its model, which needs no file any more
    import openvino
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        return openvino.Core().read_model(Path(folder, 'model.xml')).clone()


class Quantizer(NamedTuple):
    """How a runtime gets to 8 bits."""
    layers: Callable[[Files], List[str]]
    quantize: Callable[[Files, Sequence[np.ndarray], Sequence[str]], Files]
    modules: Sequence[str]


QUANTIZERS = {
    'onnx': Quantizer(onnx_layers, onnx_int8, ('onnxruntime', )),
    'openvino': Quantizer(openvino_layers, openvino_int8, ('nncf', )),
}


class Quantized(NamedTuple):
    """What came out.

    Attributes:
        files (dict[str, bytes]): The files.
        kept (list[str]): Layers that stay in float32.
    """
    files: Files
    kept: List[str]


def quantize(quantizer: Quantizer,
             files: Files,
             inputs: Sequence[np.ndarray],
             loss: Optional[Callable[[Files], float]] = None,
             disagreement: Optional[Callable[[Files], float]] = None,
             allowed: float = 1.) -> Quantized:
    """Quantize, and leave layers in float32 while the loss is too large.

    Those layers are groups of consecutive convolutions, an eighth of all
    each. Which come first is found by leaving out one group at a time: those
    without which the labels come nearest to those of the network in float32.

    Args:
        quantizer (Quantizer): That of the runtime.
        files (dict[str, bytes]): What was exported.
        inputs (Sequence[np.ndarray]): Inputs to calibrate on.
        loss (Callable, optional): From files to the loss of mIoU against
            float32 in percentage points. Without, all layers are quantized
            but the classifier. Defaults to None.
        disagreement (Callable, optional): From files to the share of pixels
            with another class than in float32. Defaults to None.
        allowed (float): Largest loss. Defaults to 1.

    Returns:
        Quantized: The files, and the layers that stay in float32.
    """
    *layers, classifier = quantizer.layers(files)
    kept = [classifier]
    found = quantizer.quantize(files, inputs, kept)
    if loss is None or disagreement is None or loss(found) <= allowed:
        return Quantized(found, kept)
    groups = [list(g) for g in np.array_split(layers, GROUPS) if len(g)]
    apart = [
        disagreement(quantizer.quantize(files, inputs, [*g, classifier]))
        for g in track(groups, 'Trying layers in float32', 'group')
    ]
    for i in np.argsort(apart, kind='stable'):
        kept = [*kept, *map(str, groups[i])]
        found = quantizer.quantize(files, inputs, kept)
        if loss(found) <= allowed:
            break
    return Quantized(found, kept)
