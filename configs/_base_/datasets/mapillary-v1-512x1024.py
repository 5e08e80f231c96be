# MMSegmentation's own: Mapillary Vistas v1.2 with 65 classes; label 65
# (unlabeled) is ignored.
_base_ = __import__('mmseg_textkd').stock_config(
    '_base_/datasets/mapillary_v1_65.py')
