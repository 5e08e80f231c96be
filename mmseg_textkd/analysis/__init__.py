# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Benchmarks and comparison of networks."""
