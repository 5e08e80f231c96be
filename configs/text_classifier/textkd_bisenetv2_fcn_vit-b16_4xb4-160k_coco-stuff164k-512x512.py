_base_ = [
    '../stock/bisenetv2_fcn_4xb4-160k_coco-stuff164k-512x512.py',
    '../_base_/text/vit-b16_coco_stuff.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
