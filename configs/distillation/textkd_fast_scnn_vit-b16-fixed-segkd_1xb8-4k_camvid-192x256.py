_base_ = [
    '../stock/fast_scnn_1xb8-4k_camvid-192x256.py',
    '../_base_/text/vit-b16_camvid.py', '../_base_/distillation/segmentor.py'
]
# The teacher is the released stock network, found in a clone.
released = 'efficientnet-lite0_in1k-pre_segformer_1xb8-1600i_camvid-360x480'
# The first stage only: the vectors stay as they are.
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(
        config='{{fileDirname}}/../stock/' + released + '.py',
        checkpoint='{{fileDirname}}/../../model_zoo/' + released +
        '_20261130_093344-fa72e23b.pth'),
    decode_head=dict(
        type='TextDepthwiseSeparableFCNHead',
        text=_base_.text_provider.embeddings,
        text_losses=_base_.text_from_segmentor))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
custom_hooks = [dict(type='PromptLearnerHook'), *_base_.text_teacher_hooks]
