_base_ = [
    '../text_classifier/textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/context.py'
]
model = dict(decode_head=dict(fusion=_base_.text_context))
