_base_ = [
    '../stock/fast_scnn_8xb4-160k_cityscapes-512x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(
    decode_head=dict(
        type='TextDepthwiseSeparableFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
