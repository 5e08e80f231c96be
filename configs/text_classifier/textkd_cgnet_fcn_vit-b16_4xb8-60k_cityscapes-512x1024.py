_base_ = [
    '../stock/cgnet_fcn_4xb8-60k_cityscapes-512x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
