# The stock classifier stays; text only trains, beside it.
_base_ = './textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py'
model = dict(decode_head=dict(role='auxiliary'))
custom_hooks = _base_.auxiliary_hooks
