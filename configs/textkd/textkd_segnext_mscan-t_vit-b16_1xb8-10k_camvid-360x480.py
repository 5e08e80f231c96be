_base_ = [
    '../stock/segnext_mscan-t_1xb8-10k_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py'
]
model = dict(
    decode_head=dict(type='TextLightHamHead', text=_base_.text_provider))
# Text learns at the rate that the stock config gives to its head.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            '.text.': dict(lr_mult=10., decay_mult=0.),
            'log_scale': dict(lr_mult=10., decay_mult=0.)
        }))
