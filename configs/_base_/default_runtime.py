# MMSegmentation's own runtime, and the plugin.
_base_ = __import__('mmseg_textkd').stock_config('_base_/default_runtime.py')
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
