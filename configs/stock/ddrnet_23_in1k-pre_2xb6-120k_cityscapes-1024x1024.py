# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'ddrnet/ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
