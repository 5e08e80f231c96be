_base_ = [
    '../stock/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(
    decode_head=dict(type='TextSegformerHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise_x10)
