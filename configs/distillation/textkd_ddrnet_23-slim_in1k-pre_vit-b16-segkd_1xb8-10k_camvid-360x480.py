_base_ = [
    '../text_classifier/textkd_ddrnet_23-slim_in1k-pre_vit-b16_1xb8-10k_camvid-360x480.py',  # noqa: E501
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_teachers['camvid'],
    decode_head=dict(text_losses=_base_.text_from_segmentor))
custom_hooks = [*_base_.custom_hooks, *_base_.text_teacher_hooks]
