# MMSegmentation's own: 21 classes, background among them. Training takes
# train.txt and aug.txt (10582 images), label 255 is ignored.
_base_ = __import__('mmseg_textkd').stock_config(
    '_base_/datasets/pascal_voc12_aug.py')
