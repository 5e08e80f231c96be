_base_ = [
    '../stock/ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(decode_head=dict(type='TextDDRHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
