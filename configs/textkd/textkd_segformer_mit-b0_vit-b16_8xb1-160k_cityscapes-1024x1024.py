_base_ = [
    '../stock/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/text/vit-b16_cityscapes.py'
]
model = dict(
    decode_head=dict(type='TextSegformerHead', text=_base_.text_provider))
# Text learns at the rate that the stock config gives to its head.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            '.text.': dict(lr_mult=10., decay_mult=0.),
            'log_scale': dict(lr_mult=10., decay_mult=0.)
        }))
