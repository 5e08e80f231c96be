_base_ = [
    '../stock/icnet_r18-d8-in1k-pre_4xb2-160k_cityscapes-832x832.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
