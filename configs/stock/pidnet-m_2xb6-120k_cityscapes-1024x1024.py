# MMSegmentation's own config, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config(
    'pidnet/pidnet-m_2xb6-120k_1024x1024-cityscapes.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
