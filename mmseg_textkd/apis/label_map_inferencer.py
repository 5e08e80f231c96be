# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import os.path as osp
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import cv2
import mmcv
import mmengine
import numpy as np
from mmseg.apis import MMSegInferencer
from mmseg.structures import SegDataSample

from .drawing import draw_labels, draw_similarity


class LabelMapInferencer(MMSegInferencer):
    """MMSegmentation's inferencer with another output.

    Label maps of more than 256 classes, similarities, a legend in any script,
    and paths in any script.
    """

    forward_kwargs = {'similarity'}
    visualize_kwargs = {
        'show', 'wait_time', 'img_out_dir', 'opacity', 'return_vis', 'legend'
    }
    font: Optional[str] = None

    @property
    def classes(self) -> Sequence[str]:
        """Sequence[str]: Names of the labels, in their order."""
        return self.model.dataset_meta['classes']

    def _inputs_to_list(self, inputs: Any) -> list:
        """Take paths as well as texts."""
        if isinstance(inputs, Path):
            inputs = str(inputs)
        return [
            str(item) if isinstance(item, Path) else item
            for item in super()._inputs_to_list(inputs)
        ]

    def visualize(self,
                  inputs: list,
                  preds: List[SegDataSample],
                  return_vis: bool = False,
                  show: bool = False,
                  wait_time: int = 0,
                  img_out_dir: str = '',
                  opacity: float = 0.5,
                  legend: bool = True) -> Optional[List[np.ndarray]]:
        """Draw pictures with their classes.

        Args:
            inputs (list): Paths, or arrays (H, W, 3), BGR.
            preds (list[SegDataSample]): The predictions.
            return_vis (bool): Whether to return them. Defaults to False.
            show (bool): Whether to show them. Defaults to False.
            wait_time (float): Seconds to show each, 0 for ever. Defaults
                to 0.
            img_out_dir (str): Folder to write them, and similarities, to.
                Defaults to ''.
            opacity (float): Weight of the colours. Defaults to 0.5.
            legend (bool): Whether to draw a legend. Defaults to True.

        Returns:
            list[np.ndarray], optional: Pictures, uint8, RGB.
        """
        if not (show or img_out_dir or return_vis):
            return None
        meta, shown = self.model.dataset_meta, []
        for image, pred in zip(inputs, preds):
            name = f'{self.num_visualized_imgs:08d}_vis.jpg'
            if isinstance(image, str):
                name = osp.basename(image)
                image = mmcv.imfrombytes(mmengine.fileio.get(image))
            labels = pred.pred_sem_seg.data[0].cpu().numpy()
            drawn = draw_labels(image[..., ::-1], labels, meta['classes'],
                                meta['palette'], opacity, legend, self.font)
            if show:
                self.visualizer.show(drawn, name, wait_time)
            if img_out_dir:
                _write(osp.join(img_out_dir, name), drawn)
                self._write_similarities(img_out_dir, name, pred)
            if return_vis:
                shown.append(drawn)
            self.num_visualized_imgs += 1
        return shown if return_vis else None

    def _write_similarities(self, folder: str, name: str,
                            pred: SegDataSample) -> None:
        """Write the maps of similarity of one picture."""
        if 'similarity' not in pred:
            return
        for word, values in zip(pred.similarity.names, pred.similarity.data):
            word = re.sub(r'[^\w-]+', '-', word)[:40]
            _write(
                osp.join(folder, f'{osp.splitext(name)[0]}_{word}.png'),
                draw_similarity(values.cpu().numpy()))

    def postprocess(self,
                    preds: List[SegDataSample],
                    visualization: Optional[List[np.ndarray]],
                    return_datasample: bool = False,
                    pred_out_dir: str = '') -> Any:
        """Pack and write the predictions.

        Args:
            preds (list[SegDataSample]): The predictions.
            visualization (list[np.ndarray], optional): What was drawn.
            return_datasample (bool): Whether to return the samples. Defaults
                to False.
            pred_out_dir (str): Folder to write label maps to, as PNG: 8 bit
                up to 256 labels, else 16. Defaults to ''.

        Returns:
            dict: ``predictions``, ``visualization`` and, if wanted,
            ``similarity``; lists, or with one picture its own.
        """
        results: Dict[str, List] = dict(predictions=[], visualization=[])
        wide = len(self.classes) > 256
        for pred in preds:
            labels = pred.pred_sem_seg.data[0].cpu().numpy()
            results['predictions'].append(labels)
            if 'similarity' in pred:
                results.setdefault('similarity', []).append(
                    pred.similarity.data.cpu().numpy())
            if pred_out_dir:
                _write(
                    osp.join(pred_out_dir,
                             f'{self.num_pred_imgs:08d}_pred.png'),
                    labels.astype(np.uint16 if wide else np.uint8))
            self.num_pred_imgs += 1
        results['visualization'] = visualization or []
        if return_datasample:
            return preds[0] if len(preds) == 1 else preds
        if len(preds) == 1:
            return {k: v[0] if v else v for k, v in results.items()}
        return results


def _write(path: str, image: np.ndarray) -> None:
    """Write a picture, RGB or of one channel."""
    os.makedirs(osp.dirname(path), exist_ok=True)
    if image.ndim == 3:
        image = image[..., ::-1]
    # Not cv2.imwrite, which knows no paths in other scripts everywhere.
    done, data = cv2.imencode(osp.splitext(path)[1], image)
    if not done:
        raise OSError(f'cannot write {path}')
    Path(path).write_bytes(data.tobytes())
