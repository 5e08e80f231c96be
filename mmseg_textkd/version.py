# Copyright (c) mmseg_textkd contributors. All rights reserved.
__version__ = '0.1.0'
