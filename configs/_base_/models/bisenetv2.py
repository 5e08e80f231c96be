# MMSegmentation's own model, wherever that is installed.
_base_ = __import__('mmseg_textkd').stock_config('_base_/models/bisenetv2.py')
