# Copyright (c) mmseg_textkd contributors. All rights reserved.
import pytest


@pytest.fixture
def text(make_embeddings):
    """Config of text of six classes."""
    return dict(type='ClassEmbeddings', file=make_embeddings(6, 16, 'abcdef'))
