# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Registries of the scope ``mmseg_textkd``: what they have is in mmseg's.

MMEngine takes them for configs that inherit ``mmseg_textkd::NAME``.
"""
from mmengine.registry import Registry
from mmseg import registry

for _name in registry.__all__:
    _parent = getattr(registry, _name)
    Registry(
        _parent.name,
        scope='mmseg_textkd',
        parent=_parent,
        locations=['mmseg_textkd', *_parent._locations])
