# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""For ``-p``: of pytest-xdist's processes only workers read conftest.py.

The one that hands out the tests then imports no PyTorch, which the workers
would wait for.
"""
import os

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Tell pytest before it looks for them."""
    options = early_config.known_args_namespace
    if options.numprocesses and 'PYTEST_XDIST_WORKER' not in os.environ:
        options.noconftest = True
    return (yield)
