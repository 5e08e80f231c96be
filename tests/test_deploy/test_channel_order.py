# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Networks that see BGR, as files are read, and networks that see RGB."""
import cv2
import numpy as np
import torch
from each_case import each_case
from mmseg.apis import inference_model
from mmseg.registry import MODELS
from tiny import CLASSES, tiny_config

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.deploy import fold
from mmseg_textkd.deploy.export import to_torchscript
from mmseg_textkd.deploy.exportable import ExportableSegmentor

# No two channels are treated alike.
MEAN, STD = [10., 100., 200.], [30., 60., 90.]


@each_case('rgb', [False, True])
def test_fold_inference_and_export(tmp_path, rgb):
    text = dict(type='ControlEmbeddings', kind='random', dim=16)
    cfg = tiny_config(tmp_path, text)
    cfg.model.data_preprocessor.update(mean=MEAN, std=STD, bgr_to_rgb=rgb)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(tmp_path / 'config.py')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(.2 * torch.randn_like(param))
    model.cfg, model.dataset_meta = cfg, dict(classes=CLASSES)
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=model.dataset_meta)),
        tmp_path / 'weights.pth')
    path = str(tmp_path / 'data/img/0.png')
    image = cv2.imread(path)

    def by_hand(pixels):
        pixels = (pixels.astype(np.float32) - MEAN) / STD
        inputs = torch.tensor(pixels.transpose(2, 0, 1)[None]).float()
        with torch.no_grad():
            logits = model.encode_decode(inputs,
                                         [dict(img_shape=image.shape[:2])])
        return logits[0]

    orders = [by_hand(image), by_hand(image[..., ::-1])]
    expected, other = orders[::-1] if rgb else orders
    assert (expected - other).abs().max() > .1
    assert (expected.argmax(0) != other.argmax(0)).any()

    def assert_near(logits):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    assert_near(inference_model(model, image).seg_logits.data)
    stock = fold(model, cfg)
    assert_near(inference_model(stock, image).seg_logits.data)
    inferencer = TextSegInferencer(
        str(tmp_path / 'config.py'),
        str(tmp_path / 'weights.pth'),
        device='cpu')
    inferencer.show_progress = False
    for inputs in (path, image):
        found = inferencer(inputs)['predictions']
        assert np.array_equal(found, expected.argmax(0).numpy())
    # With the preprocessing in the graph, and as it is described beside it.
    network = ExportableSegmentor(stock, preprocess=True)
    graph = to_torchscript(network, image.shape[:2], False, '{}')
    assert_near(graph.run(torch.from_numpy(image)[None])[0])
    assert ExportableSegmentor(stock).spec() == dict(
        mean=MEAN, std=STD, swap_channels=rgb)
