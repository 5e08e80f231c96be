# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'icnet/icnet_r18-d8-in1k-pre_4xb2-160k_cityscapes-832x832.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
