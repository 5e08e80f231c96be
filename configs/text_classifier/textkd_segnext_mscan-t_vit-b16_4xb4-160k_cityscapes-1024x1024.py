_base_ = [
    '../stock/segnext_mscan-t_4xb4-160k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(
    decode_head=dict(type='TextLightHamHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise_x10)
