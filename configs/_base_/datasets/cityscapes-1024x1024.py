# MMSegmentation's own, for networks that have no stock Cityscapes config.
_base_ = __import__('mmseg_textkd').stock_config(
    '_base_/datasets/cityscapes_1024x1024.py')
