# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""EBSeg as the teacher of a real-time network, by its pixel embeddings."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from network_tester import samples
from tiny import CLASSES, SIZE, tiny_config
from torch.testing import assert_close

from mmseg_textkd.engine import TeacherHook
from mmseg_textkd.models.segmentors.frozen_teacher import FrozenTeacher


def tiny_batch():
    """Two images without labels of cars and trucks."""
    batch = samples(SIZE, 8)
    for labels in (sample.gt_sem_seg.data for sample in batch):
        labels[(labels == 5) | (labels == 6)] = 255
    return batch


@pytest.fixture
def student(model_cfg, tmp_path):
    """A student of an EBSeg that was trained with the classes given."""
    torch.manual_seed(0)
    cfg, path = Config(dict(model=model_cfg())), tmp_path / 'ebseg.pth'
    cfg.dump(tmp_path / 'ebseg.py')
    teacher = MODELS.build(cfg.model).eval()
    teacher.image_encoder.init_weights()  # as training does

    def make(classes=CLASSES, embeddings=True):
        meta = dict(dataset_meta=dict(classes=classes))
        torch.save(dict(state_dict=teacher.state_dict(), meta=meta), path)
        ours = tiny_config(tmp_path,
                           cfg.model.decode_head.text.to_dict()).model
        ours.type = 'DistilledEncoderDecoder'
        ours.teacher = dict(config=f'{tmp_path}/ebseg.py')
        ours.teacher.update(checkpoint=str(path), embeddings=embeddings)
        ours.decode_head.text_branch = dict(
            type='BalancedTextClassifier', bias=False, unseen=[5, 6])
        return MODELS.build(ours), teacher

    return make


def test_its_pixel_embeddings_are_taught(student):
    model, teacher = student()
    pictures = 255 * torch.rand(2, 3, *SIZE)
    own, theirs = model.data_preprocessor, teacher.data_preprocessor
    inputs = (pictures.flip(1) - own.mean) / own.std
    with torch.no_grad():
        expected = teacher.pixel_embeddings(
            (pictures - theirs.mean) / theirs.std)
    found = model.teacher(inputs, own)
    assert found.keys() == {'embeddings'} and expected.shape[1] == 64
    assert_close(found['embeddings'], expected, rtol=1e-3, atol=1e-4)
    batch = tiny_batch()
    losses = model.loss(inputs, batch)
    assert losses['decode.loss_image_embedding'] > 0
    # It gives no logits that hidden classes could be told from.
    assert set(batch[0].teacher.keys()) == {'embeddings'}
    model, _ = student(embeddings=False)
    with pytest.raises(ValueError, match='teacher .* supervise'):
        model.loss(inputs, tiny_batch())


def test_its_scores_are_taught_as_probabilities(student):
    """Their logarithms are logits: the softmax divides by their sum."""
    model, teacher = student(embeddings=False)
    pictures = 255 * torch.rand(2, 3, *SIZE)
    own, theirs = model.data_preprocessor, teacher.data_preprocessor
    with torch.no_grad():
        scores = teacher((pictures - theirs.mean) / theirs.std, mode='tensor')
    found = model.teacher((pictures.flip(1) - own.mean) / own.std, own)
    assert_close(
        found['logits'].softmax(1),
        scores / scores.sum(1, keepdim=True),
        rtol=1e-3,
        atol=1e-5)


def test_of_one_class_it_has_logits(model_cfg):
    """One is all that the softmax of scores would leave."""
    text = dict(type='ControlEmbeddings', kind='random', dim=64)
    ebseg = MODELS.build(model_cfg(num_classes=1, text=text)).eval()
    teacher, image = FrozenTeacher('x', 'y'), torch.randn(1, 3, *SIZE)
    teacher._model = ebseg
    own = ebseg.data_preprocessor
    with torch.no_grad():
        expected = ebseg(image, mode='tensor')
    assert expected.shape[1] == 1
    assert torch.equal(teacher(image, own)['logits'], expected)


def test_it_may_not_have_seen_what_is_hidden(student):
    data = SimpleNamespace(metainfo=dict(classes=CLASSES))

    def start(classes):
        model, _ = student(classes)
        runner = SimpleNamespace(
            model=model, train_dataloader=SimpleNamespace(dataset=data))
        hook = TeacherHook()
        hook.before_train(runner)
        hook.after_train(runner)

    start([name for name in CLASSES if name not in ('car', 'truck')])
    start(('bicycle', 'wall', 'road'))
    for classes in (CLASSES, ('wall', 'Truck')):
        with pytest.raises(ValueError, match=r"trained with \[.*'truck'\]"):
            start(classes)


def test_a_network_without_embeddings_is_refused(student, tmp_path):
    model, _ = student()
    plain = tiny_config(tmp_path)
    plain.dump(tmp_path / 'ebseg.py')
    state = MODELS.build(plain.model).state_dict()
    torch.save(dict(state_dict=state, meta=dict()), tmp_path / 'ebseg.pth')
    with pytest.raises(ValueError, match='no pixel embeddings, as EBSeg'):
        model.teacher(torch.zeros(1, 3, *SIZE), model.data_preprocessor)
