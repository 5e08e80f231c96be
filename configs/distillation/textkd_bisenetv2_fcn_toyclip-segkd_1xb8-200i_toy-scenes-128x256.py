_base_ = [
    '../text_classifier/textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_teachers['toy_scenes'],
    decode_head=dict(text_losses=_base_.text_from_segmentor))
custom_hooks = [*_base_.custom_hooks, *_base_.text_teacher_hooks]
