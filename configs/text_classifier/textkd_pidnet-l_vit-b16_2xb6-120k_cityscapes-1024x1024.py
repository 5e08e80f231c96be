_base_ = [
    '../stock/pidnet-l_2xb6-120k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(decode_head=dict(type='TextPIDHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
