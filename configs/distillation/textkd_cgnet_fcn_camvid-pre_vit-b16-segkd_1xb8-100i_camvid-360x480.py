_base_ = [
    '../text_classifier/textkd_cgnet_fcn_camvid-pre_vit-b16_1xb8-100i_camvid-360x480.py',  # noqa: E501
    '../_base_/distillation/segmentor.py'
]
# The teacher is the released stock network, found in a clone.
released = 'efficientnet-lite0_in1k-pre_segformer_1xb8-1600i_camvid-360x480'
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(
        config='{{fileDirname}}/../stock/' + released + '.py',
        checkpoint='{{fileDirname}}/../../model_zoo/' + released +
        '_20261130_093344-fa72e23b.pth'),
    decode_head=dict(text_losses=_base_.text_from_segmentor))
custom_hooks = [*_base_.custom_hooks, *_base_.text_teacher_hooks]
