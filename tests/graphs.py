# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Run what was exported."""
import io

import onnxruntime
import torch


def run_graph(data, image):
    """Run an ONNX graph or a TorchScript, by its bytes."""
    if data.startswith(b'PK'):
        return torch.jit.load(io.BytesIO(data))(image)
    session = onnxruntime.InferenceSession(data)
    return torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
