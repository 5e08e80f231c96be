# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
