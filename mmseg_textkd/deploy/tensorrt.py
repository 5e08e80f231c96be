# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What TensorRT takes of ONNX, and how its engine is built.

Nothing here needs TensorRT or a GPU.
"""
from typing import List

# Its table of operators (onnx/onnx-tensorrt, docs/operators.md, TensorRT
# 10.0), those that networks of this kind may have; opsets 9 to 20.
OPSETS = range(9, 21)
OPERATORS = frozenset(
    'Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip '
    'Concat Constant ConstantOfShape Conv ConvTranspose Cos CumSum '
    'DepthToSpace Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor '
    'Gather GatherElements GatherND Gelu Gemm GlobalAveragePool '
    'GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid '
    'HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu '
    'Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg '
    'Not Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMax '
    'ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape '
    'Resize Round Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus '
    'SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose '
    'Unsqueeze Where Xor'.split())
# Attributes that it restricts: operator, attribute, default, values.
RESTRICTED = (
    ('Resize', 'mode', b'nearest', (b'nearest', b'linear')),
    ('Resize', 'coordinate_transformation_mode', b'half_pixel',
     (b'half_pixel', b'pytorch_half_pixel', b'tf_half_pixel_for_nn',
      b'asymmetric', b'align_corners')),
    ('Resize', 'nearest_mode', b'round_prefer_floor',
     (b'floor', b'ceil', b'round_prefer_floor', b'round_prefer_ceil')),
    ('Resize', 'keep_aspect_ratio_policy', b'stretch', (b'stretch', )),
    ('Resize', 'antialias', 0, (0, )),
    ('TopK', 'sorted', 1, (1, )),
)
TRTEXEC = 'trtexec --onnx=model.onnx --saveEngine=model.engine'
BUILDER = '''\
"""Build model.engine of model.onnx, where TensorRT and its GPU are."""
from pathlib import Path

import tensorrt as trt

FOLDER = Path(__file__).resolve().parent
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(FOLDER / 'model.onnx')):
    raise SystemExit('\\n'.join(
        str(parser.get_error(i)) for i in range(parser.num_errors)))
config = builder.create_builder_config()
if {half} and hasattr(trt.BuilderFlag, 'FP16'):
    config.set_flag(trt.BuilderFlag.FP16)
engine = builder.build_serialized_network(network, config)
if engine is None:
    raise SystemExit('TensorRT has built nothing; see its messages above')
(FOLDER / 'model.engine').write_bytes(engine)
'''


def check_graph(data: bytes) -> None:
    """Refuse a graph that TensorRT would not take, by its documentation.

    Args:
        data (bytes): The ONNX file.

    Raises:
        ValueError: With all that is wrong: the opset, operators, modes of
            resizing, or sizes that are not fixed.
    """
    import onnx
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    faults: List[str] = []
    opset = next(o.version for o in model.opset_import if not o.domain)
    if opset not in OPSETS:
        faults.append(f'opset {opset} is not in {OPSETS[0]} to {OPSETS[-1]}')
    graph = model.graph
    faults += [
        f'no operator {kind}'
        for kind in sorted({node.op_type
                            for node in graph.node} - OPERATORS)
    ]
    for node in graph.node:
        attributes = {
            a.name: onnx.helper.get_attribute_value(a)
            for a in node.attribute
        }
        faults += [
            f'{node.name or kind}: {name} {attributes.get(name, default)!r}'
            for kind, name, default, values in RESTRICTED
            if kind == node.op_type
            and attributes.get(name, default) not in values
        ]
    for value in (*graph.input, *graph.output, *graph.value_info):
        shape = value.type.tensor_type.shape.dim
        if any(not dim.HasField('dim_value') for dim in shape):
            faults.append(f'{value.name} has no fixed size')
    if faults:
        raise ValueError('TensorRT does not take it: ' + '; '.join(faults))


def build_script(half: bool) -> str:
    """Write the Python that builds the engine.

    Args:
        half (bool): Whether it may compute in half precision.

    Returns:
        str: The source.
    """
    return BUILDER.replace('{half}', str(half))


def trtexec(half: bool) -> str:
    """Write the command that builds the engine.

    Args:
        half (bool): Whether it may compute in half precision.

    Returns:
        str: The command line.
    """
    return TRTEXEC + ' --fp16' * half
