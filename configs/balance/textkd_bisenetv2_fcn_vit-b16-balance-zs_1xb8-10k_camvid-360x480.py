# No stage 2: the text is fixed.
_base_ = [
    '../stock/bisenetv2_fcn_1xb8-10k_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py', '../_base_/distillation/clip.py',
    '../_base_/zero_shot/camvid.py'
]
text_hidden, train_dataloader, val_evaluator = __import__(
    'mmseg_textkd').zero_shot(
        _base_.train_dataloader,
        vocabulary='camvid',
        unseen=_base_.text_unseen,
        before='RandomResize')
test_evaluator = val_evaluator
model = dict(
    type='DistilledEncoderDecoder',
    teacher=_base_.text_clip_teachers['camvid'],
    decode_head=dict(
        type='TextFCNHead',
        text=_base_.text_provider.embeddings,
        text_branch=dict(_base_.text_balanced['camvid'], **text_hidden),
        text_losses=_base_.text_from_clip))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
custom_hooks = _base_.text_clip_hooks
