# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'cgnet/cgnet_fcn_4xb8-60k_cityscapes-512x1024.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
