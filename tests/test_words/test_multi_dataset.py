# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Several data sets with different classes: labels, losses, metrics."""
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATA_SAMPLERS, DATASETS, MODELS
from words_data import OWN, SPACES, WORDS, dataset_cfg, multi_cfg

from mmseg_textkd.datasets.label_spaces import label_space, narrower_words
from mmseg_textkd.models import DistilledEncoderDecoder, TextKD
from mmseg_textkd.models.label_spaces import own_logits
from mmseg_textkd.text import TextEmbeddings, united_embeddings
from mmseg_textkd.text.united_embeddings import load_united


# ------------------------------------------------------------------- labels
def test_relations_are_followed_to_their_ends():
    words = ('thing', 'vehicle', 'car', 'taxi', 'road')
    below = narrower_words(
        dict(thing=['vehicle'], vehicle=['car'], car=['taxi']), words)
    assert below['thing'] == {'vehicle', 'car', 'taxi'}
    # A taxi is a car where there are cars, else a thing.
    assert label_space(('thing', 'car'), words, below) == [0, 0, 2, 2, -1]
    assert label_space(('road', 'thing'), words, below) == [0, 0, 0, 0, 4]
    # Cars and trucks of a data set that are both called vehicles.
    assert label_space(('vehicle', 'vehicle'), words,
                       below) == [-1, 1, 1, 1, -1]


@each_case('relations, message', [
    (dict(a=['b'], b=['c'], c=['a']), 'in a circle: a > b > c > a'),
    (dict(a=['a']), 'in a circle: a > a'),
    (dict(a=['x', 'y']), r"the words \['x', 'y'\], which no data set has"),
])
def test_bad_relations_are_told(relations, message):
    with pytest.raises(ValueError, match=message):
        narrower_words(relations, ('a', 'b', 'c'))


def test_a_word_under_two_classes_is_told():
    below = narrower_words(dict(a=['c'], b=['c']), ('a', 'b', 'c'))
    with pytest.raises(ValueError, match=r"'c' is narrower than \['a', 'b'\]"):
        label_space(('a', 'b'), ('a', 'b', 'c'), below)


def test_labels_become_words(data):
    dataset = DATASETS.build(multi_cfg(data.root))
    assert dataset.metainfo['classes'] == WORDS
    assert {
        name: space['space']
        for name, space in dataset.metainfo['label_spaces'].items()
    } == SPACES
    assert len(dataset) == 8
    for index, (name, number) in ((4, ('town', 4)), (6, ('lane', 1))):
        sample = dataset[index]['data_samples']
        assert sample.dataset == name and sample.label_space == SPACES[name]
        raw = cv2.imread(str(data.root / name / 'ann' / f'{number}.png'), 0)
        for value, word in zip(raw.ravel(),
                               sample.gt_sem_seg.data[0].ravel().tolist()):
            assert word == (255
                            if value == 255 else WORDS.index(OWN[name][value]))


def test_classes_get_other_words(data):
    """Two labels of one word are one class."""
    dataset = DATASETS.build(
        multi_cfg(
            data.root,
            words=dict(lane=dict(truck='car', tree='sky')),
            relations=None))
    assert dataset.metainfo['classes'] == (*WORDS[:4], 'car')
    assert dataset.metainfo['label_spaces']['lane'] == dict(
        words=['road', 'car', 'sky'], space=[0, 1, -1, -1, 4])
    assert set(
        dataset[7]['data_samples'].gt_sem_seg.data.unique().tolist()) <= {
            0, 1, 4, 255
        }


@each_case('changes, message', [
    (dict(names=['town', 'town']), 'a name of its own for each of the 2'),
    (dict(words=dict(city={})), r"given for \['city'\], but the data sets"),
    (dict(words=dict(lane=dict(sky='a'))), r"rename the classes \['sky'\]"),
    (dict(ignore_index=6), '7 words need more labels than there are below'),
])
def test_bad_data_sets_are_told(data, changes, message):
    with pytest.raises(ValueError, match=message):
        DATASETS.build(multi_cfg(data.root, **changes))


def test_a_label_beyond_the_classes_is_told(data, tmp_path):
    one = dataset_cfg(data.root, 'lane', data_root=str(tmp_path))
    for kind in ('img', 'ann'):
        (tmp_path / kind).mkdir()
    cv2.imwrite(str(tmp_path / 'img/0.png'), np.zeros((4, 4, 3), np.uint8))
    cv2.imwrite(str(tmp_path / 'ann/0.png'), np.full((4, 4), 9, np.uint8))
    dataset = DATASETS.build(
        multi_cfg(data.root, datasets=[dataset_cfg(data.root, 'town'), one]))
    with pytest.raises(ValueError, match=r'0.png has the labels \[9\]'):
        dataset[5]


def test_the_sampler_gives_each_data_set_its_share(data):
    dataset = DATASETS.build(multi_cfg(data.root))

    def draw(number, **kwargs):
        sampler = DATA_SAMPLERS.build(
            dict(
                type='BalancedDatasetSampler',
                dataset=dataset,
                seed=3,
                **kwargs))
        return [i for i, _ in zip(sampler, range(number))]

    drawn = draw(4000)
    counts = Counter(index // 5 for index in drawn)
    assert abs(counts[0] - 2000) < 150
    # All images of a data set before one comes again.
    first = [i for i in drawn if i < 5]
    assert all(
        sorted(first[k:k + 5]) == list(range(5)) for k in range(0, 500, 5))
    assert drawn[:50] == draw(50) and drawn != draw(
        4000, weights=dict(town=1, lane=3))
    assert set(draw(99, weights=dict(town=0, lane=1))) == {5, 6, 7}
    with pytest.raises(ValueError, match='a share for each of'):
        draw(1, weights=dict(town=1))


# -------------------------------------------------------------------- words
def test_files_are_united_and_colliding_words_told(tmp_path, monkeypatch):
    rows = F.normalize(torch.tensor([[1., 0, 0], [0, 1, 0], [3, 0, 4]]), dim=1)
    TextEmbeddings(
        rows[:2], ('light', 'road'), (('lamp', ), ('road', )),
        model='m').save(tmp_path / 'a')
    TextEmbeddings(
        rows[[1, 2, 0]], ('road', 'light', 'sky'),
        (('road', ), ('traffic light', ), ('sky', )),
        model='m').save(tmp_path / 'b')
    messages = []
    monkeypatch.setattr(united_embeddings, 'print_log',
                        lambda text, *args: messages.append(text))
    found = load_united([tmp_path / 'a', tmp_path / 'b'])
    assert found.names == ('light', 'road', 'sky')
    assert torch.equal(found.vectors, rows[[0, 1, 0]])
    assert found.phrases[0] == ('lamp', )
    text, = messages
    assert 'cosine 0.600' in text and "'road'" not in text
    assert 'lamp' in text and 'traffic light' in text
    TextEmbeddings(rows[:1], ('a', ), model='other').save(tmp_path / 'c')
    with pytest.raises(ValueError, match='different towers'):
        load_united([tmp_path / 'a', tmp_path / 'c'])


# ------------------------------------------------------------------- losses
def naive(logits, labels, space):
    """Cross entropy of one image, pixel by pixel; the sum and the number."""
    total = logits.new_zeros(())
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = int(labels[y, x])
            if label == 255:
                continue
            own = [w for w in range(len(space)) if space[w] >= 0]
            right = [w for w in own if space[w] == label]
            values = logits[:, y, x].exp()
            total = total - (values[right].sum() / values[own].sum()).log()
    return total


def test_own_logits_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    spaces = torch.tensor([SPACES['town'], SPACES['lane'], SPACES['town']])
    logits = torch.randn(3, 7, 3, 4, generator=generator).double()
    logits.requires_grad_()
    classes = [[0, 1, 2, 3], [1, 4, 5, 6], [0, 1, 2, 3]]
    labels = torch.stack([
        torch.tensor(own)[torch.randint(4, (3, 4), generator=generator)]
        for own in classes
    ])
    labels[0, 0, 0] = 255
    expected = sum(
        naive(*parts, space) for *parts, space in zip(logits, labels, spaces))
    wanted, = torch.autograd.grad(expected, logits)
    loss = F.cross_entropy(
        own_logits(logits, spaces), labels, ignore_index=255, reduction='sum')
    torch.testing.assert_close(loss, expected)
    found, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted)
    # What an image's data set does not have is left alone.
    assert not found[1, [0, 2, 3]].any() and not found[0, 6].any()
    assert found[0, 4, 1:].all()  # a car is a vehicle


@pytest.mark.parametrize('role', ['classifier', 'auxiliary'])
def test_every_head_learns_in_the_own_label_space(network_cfg, data, role):
    """Decode head, stock auxiliary head and alignment loss, mixed batch."""
    cfg = network_cfg(role)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).double().train()
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch = pseudo_collate([dataset[i] for i in (0, 6, 3)])
    batch = model.data_preprocessor(batch, True)
    inputs, samples = batch['inputs'].double(), batch['data_samples']
    losses = model.loss(inputs, samples)
    # A second time by hand, from the heads' own logits.
    for module in model.modules():
        if hasattr(module, 'running_mean'):
            module.momentum = 0
    features = model.extract_feat(inputs)
    labels = [sample.gt_sem_seg.data[0] for sample in samples]
    spaces = [sample.label_space for sample in samples]

    def by_hand(logits):
        logits = F.interpolate(
            logits, size=labels[0].shape, mode='bilinear').double()
        return sum(map(naive, logits, labels, spaces))

    number = sum(label.numel() for label in labels)
    aux = by_hand(model.auxiliary_head[0](features)) / number
    torch.testing.assert_close(losses['aux_0.loss_ce'], aux, rtol=1e-6, atol=0)
    main = by_hand(model.decode_head(features)) / number
    torch.testing.assert_close(
        losses['decode.loss_ce'], main, rtol=1e-6, atol=0)
    if role == 'auxiliary':
        head = model.decode_head
        feat = head._forward_feature(features)
        embeddings = F.normalize(head.text_branch.projection(feat), dim=1)
        cosines = torch.einsum('ndhw,kd->nkhw', embeddings,
                               head.text_branch.text().double())
        scale = head.text_losses[0].scale()
        labels = [
            F.interpolate(label[None, None].float(),
                          size=cosines.shape[2:])[0, 0].long()
            for label in labels
        ]
        own = sum(map(naive, scale * cosines, labels, spaces))
        own = own / sum(int((label != 255).sum()) for label in labels)
        torch.testing.assert_close(
            losses['decode.loss_text_align'], .4 * own, rtol=1e-6, atol=0)
    # Nothing stays behind.
    assert 'loss_by_feat' not in vars(model.decode_head)
    # With all words in one softmax it would be another loss.
    union = model.decode_head.loss(features, samples, {})
    assert union['loss_ce'] > losses['decode.loss_ce'] + .1


def test_heads_of_another_number_of_classes_are_told(network_cfg):
    cfg = network_cfg()
    cfg.model.auxiliary_head[0].num_classes = 4
    model = MODELS.build(cfg.model)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch = model.data_preprocessor(pseudo_collate([dataset[0]]), True)
    with pytest.raises(
            ValueError,
            match='auxiliary_head.0 has num_classes=4, .* 7 words'):
        model(**batch, mode='loss')


@each_case('kind', [TextKD, DistilledEncoderDecoder])
def test_other_segmentors_refuse_label_spaces(data, kind):
    """Before anything else is computed."""
    dataset = DATASETS.build(multi_cfg(data.root))
    samples = [dataset[i]['data_samples'] for i in (0, 6)]
    model = kind.__new__(kind)
    with pytest.raises(ValueError, match=f'{kind.__name__} .* MultiDataset'):
        model.loss(None, samples)
