_base_ = [
    '../text_classifier/textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py',
    '../_base_/text/context.py'
]
model = dict(decode_head=dict(fusion=_base_.text_context))
