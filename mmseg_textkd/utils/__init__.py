# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Utilities for files, checkpoints, configs and reports."""
