# Copyright (c) mmseg_textkd contributors. All rights reserved.
import io
import logging
from pathlib import Path
from typing import Dict, Iterator

import pytest
from mmengine.logging import MMLogger
from tiny_clip import VARIANTS, save_model


@pytest.fixture(scope='session')
def clip_dirs(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """Folders of all variants."""
    root = tmp_path_factory.mktemp('clip')
    for variant in VARIANTS:
        save_model(root / variant, variant)
    return {variant: root / variant for variant in VARIANTS}


@pytest.fixture(scope='session')
def clip_name(clip_dirs: Dict[str, Path]) -> str:
    """Name of the plain causal model."""
    return f'local-dir:{clip_dirs["clip"]}'


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged during a test."""
    logger, stream = MMLogger.get_current_instance(), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
