# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Measuring networks: time and memory, and two of them side by side."""
