# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Inference of exported networks with ONNX Runtime."""
import json
from pathlib import Path

import cv2
import numpy as np


class OnnxNetwork:
    """Network exported by ``tools/deployment/export_onnx.py``.

    ``demo/onnx_runtime_demo.py`` has the same in short, for it is to run
    where this package is not installed.

    Args:
        path (Path): The ONNX file.

    Raises:
        ValueError: If it is no ONNX file, or not one of ours.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider'])
        except Exception as error:  # it has its own
            raise ValueError(f'{path} is not a graph that ONNX Runtime takes: '
                             f'{error}') from error
        found = self.session.get_modelmeta().custom_metadata_map
        if 'mmseg_textkd' not in found:
            raise ValueError(f'{path} has not been exported by '
                             'tools/deployment/export_onnx.py.')
        self.meta = json.loads(found['mmseg_textkd'])
        shape = self.session.get_inputs()[0].shape
        height, width = shape[2:] if self.meta['preprocess'] else shape[1:3]
        # Names instead of numbers: any size.
        self.size = None if isinstance(height, str) else (height, width)

    def inputs(self, image: np.ndarray) -> np.ndarray:
        """Preprocess an image.

        Args:
            image (np.ndarray): (H, W, 3), uint8, BGR. It is resized if the
                graph takes one size only.

        Returns:
            np.ndarray: The image, normalized unless the graph does that.
        """
        if self.size is not None:
            image = cv2.resize(image, self.size[::-1])
        spec = self.meta['preprocess']
        if spec is None:
            return image[None]
        if spec['swap_channels']:
            image = image[..., ::-1]
        image = image.astype(np.float32)
        if spec['mean'] is not None:
            image -= np.float32(spec['mean'])
            image /= np.float32(spec['std'])
        return np.ascontiguousarray(image.transpose(2, 0, 1)[None])

    def labels(self, image: np.ndarray) -> np.ndarray:
        """Predict the labels of an image.

        Args:
            image (np.ndarray): (H, W, 3), uint8, BGR.

        Returns:
            np.ndarray: Labels (H, W), uint16.
        """
        output, = self.session.run(None, {'image': self.inputs(image)})
        if output.ndim == 4:
            output = output.argmax(1)
        return cv2.resize(
            output[0].astype(np.uint16),
            image.shape[1::-1],
            interpolation=cv2.INTER_NEAREST)
