# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The balance of the three embeddings, and what counts as seen."""
import pytest
import torch
from each_case import each_case
from torch.testing import assert_close

from mmseg_textkd.models.ebseg import balance_probabilities, seen_classes
from mmseg_textkd.text import Vocabulary


@each_case('alpha,beta,gamma', [(0.09, 0.3, 0.7), (0.12, 0.4, 0.6),
                                (0., 0., 0.), (0.2, 0.5, 0.1)])
def test_each_probability_is_the_weighted_geometric_mean(alpha, beta, gamma):
    a, b, d = torch.rand(3, 2, 5, 4, dtype=torch.double)
    seen = torch.tensor([True, False, True, False])
    found = balance_probabilities(a, b, d, seen, alpha, beta, gamma)
    share = torch.tensor([alpha, beta, alpha, beta], dtype=a.dtype)
    logs = ((1 - share - gamma) * a.log() + share * d.log() + gamma * b.log())
    assert_close(found, logs.exp(), rtol=1e-9, atol=0)


def test_the_defaults_are_those_published_for_vit_b16():
    a, b, d = torch.rand(3, 7, 2)
    seen = torch.tensor([True, False])
    found = balance_probabilities(a, b, d, seen)
    assert_close(found[:, 0], (a**.21 * d**.09 * b**.7)[:, 0])
    # A says nothing about new classes.
    assert_close(found[:, 1], (d**.3 * b**.7)[:, 1])


def test_a_probability_of_zero_does_not_blow_up():
    a = torch.tensor([0., 0.])
    b = d = torch.tensor([.5, .5])
    # 1 - 0.3 - 0.7 is a little below zero in floating point.
    found = balance_probabilities(a, b, d, torch.tensor([True, False]))
    assert found.isfinite().all()
    assert found[0] == 0 and found[1] == pytest.approx(.5)


@each_case('exponents', [(-.1, .3, .7), (.1, .5, .7), (.6, .3, .7)])
def test_exponents_that_are_no_weights_are_refused(exponents):
    p, seen = torch.rand(2), torch.tensor([True, False])
    with pytest.raises(ValueError, match='exponents'):
        balance_probabilities(p, p, p, seen, *exponents)


def test_classes_are_seen_by_name_synonym_or_phrase():
    trained = Vocabulary.from_spec({
        'wall-brick': ['brick wall'],
        'building-other': ['building'],
        'door-stuff': 'door',
        'couch': ['couch', 'sofa'],
        'motorcycle': ['motorcycle', 'motorbike'],
        'traffic light': 'traffic light',
    })
    asked = Vocabulary.from_spec({
        'Building': 'large house',  # by name, without '-other'
        'door': 'door',
        'sofa, lounge': 'lounge suite',  # by a synonym within the name
        'motorbike': 'motorbike',  # by a phrase of the training
        'two-wheeler': ['motorcycle'],  # by a phrase of its own
        'traffic_light': 'signal',
        'wall': 'wall',
        'light': 'lamp',
        'mother': 'mother',
        'doorbell': 'doorbell',
    })
    assert seen_classes(asked, trained) == [True] * 6 + [False] * 4
    assert seen_classes(trained, trained) == [True] * 6


def test_seen_classes_of_ade20k_after_coco_stuff():
    coco, ade = map(Vocabulary.from_spec, ('coco_stuff', 'ade20k'))
    seen = dict(zip(ade.names, seen_classes(ade, coco)))
    for name in ('sky', 'person', 'car', 'bed ', 'sofa', 'sidewalk'):
        assert seen[name], name
    for name in ('chandelier', 'sconce', 'fireplace', 'poster'):
        assert not seen[name], name
