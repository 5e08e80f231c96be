# Copyright (c) mmseg_textkd contributors. All rights reserved.
from words_data import data, network_cfg  # noqa: F401
