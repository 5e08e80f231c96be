_base_ = [
    '../stock/bisenetv1_r18-d32-in1k-pre_4xb4-160k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
