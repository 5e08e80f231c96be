# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Several data sets with different classes: labels, losses, metrics."""
import itertools

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATA_SAMPLERS, DATASETS, MODELS
from network_tester import samples
from tiny import BACKBONE, CONTROL, HEAD, SIZE
from torch.testing import assert_close
from words_data import OWN, SPACES, WORDS, dataset_cfg, multi_cfg

from mmseg_textkd import add_region_embeddings
from mmseg_textkd.datasets.label_spaces import label_space, narrower_words
from mmseg_textkd.models import DistilledEncoderDecoder, TextKD
from mmseg_textkd.models.label_spaces import own_label_spaces, own_logits
from mmseg_textkd.text import TextEmbeddings, united_embeddings
from mmseg_textkd.text.united_embeddings import load_united


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
    (dict(a=['c'], b=['c']), r"'c' is narrower than \['a', 'b'\]"),
])
def test_bad_relations_are_told(relations, message):
    words = ('a', 'b', 'c')
    with pytest.raises(ValueError, match=message):
        label_space(('a', 'b'), words, narrower_words(relations, words))


def test_labels_become_words(data):
    dataset = DATASETS.build(multi_cfg(data.root))
    assert dataset.metainfo['classes'] == WORDS
    spaces = dataset.metainfo['label_spaces']
    assert {name: own['space'] for name, own in spaces.items()} == SPACES
    assert len(dataset) == 8
    for index, (name, number) in ((4, ('town', 4)), (6, ('lane', 1))):
        sample = dataset[index]['data_samples']
        assert sample.dataset == name and sample.label_space == SPACES[name]
        raw = cv2.imread(str(data.root / name / 'ann' / f'{number}.png'), 0)
        expected = np.full_like(raw, 255)
        for value, word in enumerate(OWN[name]):
            expected[raw == value] = WORDS.index(word)
        found = sample.gt_sem_seg.data[0].numpy()
        assert np.array_equal(found, expected) and (raw == 255).any()


def test_regions_get_the_words_of_their_labels(data, tmp_path):
    cfg = multi_cfg(
        data.root, words=dict(lane=dict(truck='car')), relations=None)
    load = dict(
        type='LoadRegionEmbeddings',
        model='toyclip',
        folder=str(tmp_path),
        min_pixels=1)
    plain = add_region_embeddings(
        dict(dataset=cfg['datasets'][1]), dict(load))['dataset']
    cfg['datasets'] = [
        add_region_embeddings(dict(dataset=d), dict(load))['dataset']
        for d in cfg['datasets']
    ]
    sample = DATASETS.build(cfg)[6]['data_samples']
    own = DATASETS.build(plain)[1]['data_samples'].region_embeddings
    assert own.labels.tolist() == [0, 1, 2, 3]
    found = sample.region_embeddings
    words = DATASETS.build(cfg).metainfo['classes']
    names = [words[k] for k in found.labels]
    assert sorted(names) == ['car', 'road', 'tree']
    present = sample.gt_sem_seg.data.unique()
    assert found.labels.tolist() == present[present != 255].tolist()
    expected = dict(
        road=own.vectors[0],
        car=F.normalize(own.vectors[1] + own.vectors[2], dim=0),
        tree=own.vectors[3])
    assert_close(found.vectors, torch.stack([expected[n] for n in names]))


def test_classes_get_other_words(data):
    """Two labels of one word are one class."""
    words = dict(lane=dict(truck='car', tree='sky'))
    dataset = DATASETS.build(multi_cfg(data.root, words=words, relations=None))
    assert dataset.metainfo['classes'] == (*WORDS[:4], 'car')
    assert dataset.metainfo['label_spaces']['lane'] == dict(
        words=['road', 'car', 'sky'], space=[0, 1, -1, -1, 4])
    labels = dataset[7]['data_samples'].gt_sem_seg.data
    assert {*labels.unique().tolist()} <= {0, 1, 4, 255}


@each_case('changes, message', [
    (dict(names=['town', 'town']), 'a name of its own for each of the 2'),
    (dict(words=dict(city={})), r"given for \['city'\], but the data sets"),
    (dict(words=dict(lane=dict(sky='a'))), r"rename the classes \['sky'\]"),
    (dict(ignore_index=6), '7 words need more labels than there are below'),
])
def test_bad_data_sets_are_told(data, changes, message):
    with pytest.raises(ValueError, match=message):
        DATASETS.build(multi_cfg(data.root, **changes))


def test_another_ignored_label(data):
    """Of many words; the label maps still have 255 for it."""
    plain, wide = (
        DATASETS.build(multi_cfg(data.root, ignore_index=index))
        for index in (255, 65535))
    for i in (0, 6):
        labels, found = (
            d[i]['data_samples'].gt_sem_seg.data.long() for d in (plain, wide))
        assert (labels == 255).any()
        assert torch.equal(found, labels.masked_fill(labels == 255, 65535))


def test_a_label_beyond_the_classes_is_told(data, tmp_path):
    image, labels = np.zeros((4, 4, 3)), np.full((4, 4), 9)
    for kind, array in (('img', image), ('ann', labels)):
        (tmp_path / kind).mkdir()
        cv2.imwrite(f'{tmp_path}/{kind}/0.png', array.astype(np.uint8))
    one = dataset_cfg(data.root, 'lane', data_root=str(tmp_path))
    dataset = DATASETS.build(
        multi_cfg(data.root, datasets=[dataset_cfg(data.root, 'town'), one]))
    with pytest.raises(ValueError, match=r'0.png has the labels \[9\]'):
        dataset[5]


def test_the_sampler_gives_each_data_set_its_share(data):
    dataset = DATASETS.build(multi_cfg(data.root))

    def draw(number, **kwargs):
        cfg = dict(type='BalancedDatasetSampler', dataset=dataset, seed=3)
        return [*itertools.islice(DATA_SAMPLERS.build(cfg | kwargs), number)]

    drawn = draw(4000)
    first = [i for i in drawn if i < 5]
    assert abs(len(first) - 2000) < 150
    # All images of a data set before one comes again.
    for k in range(0, 500, 5):
        assert sorted(first[k:k + 5]) == list(range(5))
    assert drawn[:50] == draw(50)
    assert drawn != draw(4000, weights=dict(town=1, lane=3))
    assert set(draw(99, weights=dict(town=0, lane=1))) == {5, 6, 7}
    with pytest.raises(ValueError, match='a share for each of'):
        draw(1, weights=dict(town=1))


def test_files_are_united_and_colliding_words_told(tmp_path, monkeypatch):
    rows = F.normalize(torch.tensor([[1., 0, 0], [0, 1, 0], [3, 0, 4]]), dim=1)
    files = dict(
        a=(rows[:2], ('light', 'road'), (('lamp', ), ('road', ))),
        b=(rows[[1, 2, 0]], ('road', 'light', 'sky'),
           (('road', ), ('traffic light', ), ('sky', ))),
        c=(rows[:1], ('a', )))
    for name, parts in files.items():
        model = 'other' if name == 'c' else 'm'
        TextEmbeddings(*parts, model=model).save(tmp_path / name)
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
    with pytest.raises(ValueError, match='different towers'):
        load_united([tmp_path / 'a', tmp_path / 'c'])


def naive(logits, labels, space):
    """Cross entropy of one image, summed: of what counts as a class."""
    space, total = torch.tensor(space), 0.
    for label in set(labels.unique().tolist()) - {255}:
        of_words = logits[:, labels == label]
        own = of_words[space >= 0].logsumexp(0)
        total = total + (own - of_words[space == label].logsumexp(0)).sum()
    return total


def test_own_logits_against_a_naive_loop():
    spaces = [SPACES['town'], SPACES['lane'], SPACES['town']]
    logits = torch.randn(3, 7, 3, 4).double().requires_grad_()
    classes = torch.tensor([[0, 1, 2, 3], [1, 4, 5, 6], [0, 1, 2, 3]])
    labels = classes.gather(1, torch.randint(4, (3, 12))).view(3, 3, 4)
    labels[0, 0, 0] = 255
    expected = sum(map(naive, logits, labels, spaces))
    wanted, = torch.autograd.grad(expected, logits)
    own = own_logits(logits, torch.tensor(spaces))
    loss = F.cross_entropy(own, labels, ignore_index=255, reduction='sum')
    assert_close(loss, expected)
    found, = torch.autograd.grad(loss, logits)
    assert_close(found, wanted)
    # What an image's data set does not have is left alone.
    assert not found[1, [0, 2, 3]].any() and not found[0, 6].any()
    assert found[0, 4, 1:].all()  # a car is a vehicle


@each_case('role', ['classifier', 'auxiliary'])
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
    features, head = model.extract_feat(inputs), model.decode_head
    labels = torch.stack([s.gt_sem_seg.data for s in samples])
    spaces = [sample.label_space for sample in samples]

    def check(name, logits, labels, number):
        loss = sum(map(naive, logits.double(), labels[:, 0], spaces)) / number
        assert_close(losses[name], loss, rtol=1e-6, atol=0)

    for name, part in (('aux_0', model.auxiliary_head[0]), ('decode', head)):
        logits = F.interpolate(
            part(features), size=labels.shape[2:], mode='bilinear')
        check(f'{name}.loss_ce', logits, labels, labels.numel())
    if role == 'auxiliary':
        feat = head.text_branch.projection(head._forward_feature(features))
        cosines = torch.einsum('ndhw,kd->nkhw', F.normalize(feat, dim=1),
                               head.text_branch.text().double())
        logits = head.text_losses[0].scale() * cosines
        small = F.interpolate(labels.float(), size=logits.shape[2:]).long()
        number = (small != 255).sum() / .4
        check('decode.loss_text_align', logits, small, number)
    # Nothing stays behind.
    assert 'loss_by_feat' not in vars(head)
    # With all words in one softmax it would be another loss.
    union = head.loss(features, samples, {})
    assert union['loss_ce'] > losses['decode.loss_ce'] + .1


def test_two_words_have_label_spaces_too():
    """But heads that predict boundaries have none."""
    stock = dict(HEAD, num_classes=2)
    model = MODELS.build(
        dict(
            type='MultiDatasetEncoderDecoder',
            backbone=BACKBONE,
            decode_head=dict(stock, type='TextFCNHead', text=CONTROL),
            auxiliary_head=[stock, dict(stock, type='STDCHead')]))
    batch = samples(SIZE, 2)
    for sample in batch:
        sample.set_metainfo(dict(label_space=[0, -1]))
    with own_label_spaces(model, batch):
        own = [
            name for name, head in model.named_modules()
            if 'loss_by_feat' in vars(head)
        ]
    assert own == ['decode_head', 'auxiliary_head.0']


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
