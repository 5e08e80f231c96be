# A peer: the stock network, with channel-wise distillation.
_base_ = [
    '../stock/ddrnet_23-slim_in1k-pre_1xb8-10k_camvid-360x480.py',
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_teachers['camvid'],
    distill_losses=_base_.text_peers['cwd'])
custom_hooks = _base_.text_teacher_hooks
