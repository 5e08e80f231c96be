# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
