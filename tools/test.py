# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Test a segmentor: MMSegmentation's ``tools/test.py`` and its arguments."""
from mmseg_textkd.compat import load_stock_tool

if __name__ == '__main__':
    load_stock_tool('test.py').main()
