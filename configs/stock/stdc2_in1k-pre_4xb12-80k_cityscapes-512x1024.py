# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'stdc/stdc2_in1k-pre_4xb12-80k_cityscapes-512x1024.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
