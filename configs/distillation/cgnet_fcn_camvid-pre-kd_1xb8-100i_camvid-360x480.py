# The stock network, with logit distillation from a network that is released
# with this package.
_base_ = [
    '../stock/cgnet_fcn_camvid-pre_1xb8-100i_camvid-360x480.py',
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(
        config='{{fileDirname}}/../stock/'
        'efficientnet-lite0_in1k-pre_segformer_1xb8-1600i_camvid-360x480.py',
        checkpoint='{{fileDirname}}/../../model_zoo/'
        'efficientnet-lite0_in1k-pre_segformer_1xb8-1600i_camvid-360x480_'
        '20261130_093344-fa72e23b.pth'),
    distill_losses=_base_.text_peers['kd'])
custom_hooks = _base_.text_teacher_hooks
