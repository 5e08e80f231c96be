# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What every other part may use: files, checkpoints, configs, reports."""
