# MMSegmentation's own: 150 classes; label 0 (nothing, or none of them) is
# ignored and the others move down by one.
_base_ = __import__('mmseg_textkd').stock_config('_base_/datasets/ade20k.py')
