# MMSegmentation's own: the 19 classes of Cityscapes on images of 1280x720,
# label 255 is ignored.
_base_ = __import__('mmseg_textkd').stock_config('_base_/datasets/bdd100k.py')
