_base_ = [
    '../text_classifier/textkd_fast_scnn_vit-b16-fixed_1xb8-4k_camvid-192x256.py',  # noqa: E501
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_teachers['efficientnet'],
    decode_head=dict(text_losses=_base_.text_from_segmentor))
custom_hooks = [*_base_.custom_hooks, *_base_.text_teacher_hooks]
