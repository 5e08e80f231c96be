# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Sphinx configuration: ``bash tools/build_docs.sh``."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import *  # noqa: E402, F401, F403

language = 'zh_CN'
