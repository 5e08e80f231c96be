# No stage 2: the text is fixed. The split is that of configs/ebseg.
_base_ = [
    '../stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/toyclip_toy_scenes.py', '../_base_/distillation/clip.py'
]
text_hidden, train_dataloader, val_evaluator = __import__(
    'mmseg_textkd').zero_shot(
        _base_.train_dataloader,
        vocabulary='toy_scenes',
        unseen=['car', 'truck'],
        before='RandomFlip')
test_evaluator = val_evaluator
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_clip_teachers['toy_scenes'],
    decode_head=dict(
        type='TextFCNHead',
        text=_base_.text_provider.embeddings,
        text_branch=dict(_base_.text_balanced['toy_scenes'], **text_hidden),
        text_losses=_base_.text_from_clip))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
custom_hooks = _base_.text_clip_hooks
