# MMSegmentation's own: 171 classes, label 255 is ignored.
_base_ = __import__('mmseg_textkd').stock_config(
    '_base_/datasets/coco-stuff164k.py')
