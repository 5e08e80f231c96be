# A peer: the stock network, with logit distillation.
_base_ = [
    '../stock/ddrnet_23-slim_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/distillation/segmentor.py'
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_teachers['toy_scenes'],
    distill_losses=_base_.text_peers['kd'])
custom_hooks = _base_.text_teacher_hooks
