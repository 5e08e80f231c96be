# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Backends that benchmarks run a network with."""
import io
import warnings
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

Run = Callable[[], Any]


class Skipped(Exception):
    """Raised where a backend is not available, with the reason."""


def eager(model: nn.Module, inputs: Tensor) -> Run:
    """Run in PyTorch's eager mode."""
    return lambda: model(inputs)


def compiled(model: nn.Module, inputs: Tensor) -> Run:
    """Compile with torch.compile, without graph breaks."""
    # Without `fullgraph` what cannot be compiled would run in eager mode.
    function = torch.compile(model, fullgraph=True)
    try:
        function(inputs)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise Skipped('torch.compile failed; on the CPU it needs a C++ '
                      f'compiler: {reason}') from error
    return lambda: function(inputs)


def onnx(model: nn.Module, inputs: Tensor) -> Run:
    """Run with ONNX Runtime on the CPU."""
    if onnxruntime is None:
        raise Skipped('onnxruntime is not installed')
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(model, inputs, file, dynamo=False)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise Skipped(f'no ONNX export at this size: {reason}') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads would take the cores from whoever runs next.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


def cuda_graph(model: nn.Module, inputs: Tensor) -> Run:
    """Replay a captured CUDA graph."""
    # Not on the default stream: torch wants the warm-up elsewhere.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(inputs)
    return graph.replay


class Backend(NamedTuple):
    """A backend and its requirements.

    Attributes:
        prepare (Callable): Makes what is timed.
        device (str): Where.
        sees_memory (bool): Whether PyTorch allocates when it runs.
    """
    prepare: Callable[[nn.Module, Tensor], Run]
    device: str
    sees_memory: bool


BACKENDS = {
    'eager': Backend(eager, 'cpu', True),
    'compile': Backend(compiled, 'cpu', True),
    'onnxruntime': Backend(onnx, 'cpu', False),
    'cuda': Backend(eager, 'cuda', True),
    'cuda-graph': Backend(cuda_graph, 'cuda', False),
}
