# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Exporters to ONNX and TorchScript."""
import copy
import io
import json
import traceback
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Dict, Iterator

import torch
from mmseg.models.utils import resize

from ..version import __version__
from .adaptive_pool import replace_adaptive_pools
from .exportable import ExportableSegmentor, Size

OPSET = 20
META = 'mmseg_textkd'


def metadata(network: ExportableSegmentor, classes: Dict) -> str:
    """Make the metadata of an exported graph, as JSON.

    Args:
        network (ExportableSegmentor): The network.
        classes (dict): ``classes`` and ``palette`` (RGB).

    Returns:
        str: These, ``preprocess`` (see :meth:`ExportableSegmentor.spec`; None
        if it is in the graph), ``output`` and ``version``.
    """
    return json.dumps(
        dict(
            classes,
            preprocess=None if network.preprocess else network.spec(),
            output=network.output,
            version=__version__))


def to_onnx(network: ExportableSegmentor,
            size: Size,
            dynamic: bool,
            meta: str,
            opset: int = OPSET) -> bytes:
    """Export to ONNX by ``torch.export``.

    Args:
        network (ExportableSegmentor): The network.
        size (tuple[int, int]): Height and width of the input.
        dynamic (bool): Whether the graph is to take other sizes too.
        meta (str): Put into the file as the property ``mmseg_textkd``.
        opset (int): Version of the operators, at least 18. Defaults to 20,
            for which both tested versions of torch export.

    Returns:
        bytes: What the file will hold.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is missing.
        ValueError: If an operator does not export, and where it is.
    """
    import onnx
    import_module('onnxscript')  # torch needs it
    traced = copy.deepcopy(network)
    replace_adaptive_pools(traced)
    image = network.example(size)
    shapes = names = None
    if dynamic:
        axes = (1, 2) if network.preprocess else (2, 3)
        shapes = dict(image=dict.fromkeys(axes, torch.export.Dim.DYNAMIC))
        names = dict(image=dict(zip(axes, ('height', 'width'))))
    with reasons(dynamic), _silence_resize():
        program = torch.export.export(
            traced, (image, ), dynamic_shapes=shapes, strict=False)
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=['image'],
            # Not 'argmax': so torch calls a value on the way.
            output_names=[
                'labels' if network.output == 'argmax' else network.output
            ],
            # The program has symbols already; these name them.
            dynamic_shapes=names,
            verbose=False)
        graph = exported.model_proto
    if graph.opset_import[0].version != opset:
        raise ValueError(f'torch {torch.__version__} cannot export opset '
                         f'{opset}, only {graph.opset_import[0].version}.')
    _strip_metadata(graph)
    onnx.helper.set_model_props(graph, {META: meta})
    graph.producer_name, graph.producer_version = META, __version__
    onnx.checker.check_model(graph)
    return graph.SerializeToString()


@contextmanager
def _silence_resize() -> Iterator[None]:
    """Silence warnings of ``resize``, whose check makes sizes constant.

    Otherwise the sizes of the graph would be those of the trace.
    """
    defaults = resize.__defaults__
    resize.__defaults__ = (*defaults[:-1], False)  # `warning`
    try:
        yield
    finally:
        resize.__defaults__ = defaults


def _strip_metadata(graph) -> None:
    """Remove metadata of torch, such as paths of sources, from the graph."""
    graph = graph.graph
    for part in (graph, *graph.node, *graph.input, *graph.output,
                 *graph.initializer, *graph.value_info):
        part.ClearField('metadata_props')
        part.ClearField('doc_string')


def to_torchscript(network: ExportableSegmentor, size: Size, dynamic: bool,
                   meta: str) -> bytes:
    """Export to TorchScript, by tracing.

    Args:
        network (ExportableSegmentor): The network.
        size (tuple[int, int]): Height and width of the input.
        dynamic (bool): Whether other sizes are meant to work too; a trace is
            the same either way.
        meta (str): Put into the file as the extra file
            ``mmseg_textkd.json``.

    Returns:
        bytes: What the file will hold.

    Raises:
        ValueError: If it cannot be traced.
    """
    buffer = io.BytesIO()
    with reasons(dynamic):
        trace = torch.jit.trace(
            network, network.example(size), check_trace=False)
        torch.jit.save(
            torch.jit.freeze(trace.eval()), buffer, {f'{META}.json': meta})
    return buffer.getvalue()


@contextmanager
def reasons(dynamic: bool) -> Iterator[None]:
    """Say in one line what does not export, and where.

    Args:
        dynamic (bool): Whether a fixed size could help.

    Raises:
        ValueError: If an exporter raises anything.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except Exception as error:
        raise ValueError(_describe_failure(error, dynamic)) from error


def _describe_failure(error: Exception, dynamic: bool) -> str:
    """Name the operator that does not export, and its place."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = [
        frame for frame in traceback.extract_tb(cause.__traceback__)
        if '/torch/' not in frame.filename and frame.filename != __file__
    ]
    where = (f' at `{frames[-1].line}` ({frames[-1].filename}:'
             f'{frames[-1].lineno})' if frames else '')
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    hint = '. Export a fixed size: --size H W without --dynamic.'
    return f'it does not export{where}: {first}{hint if dynamic else ""}'
