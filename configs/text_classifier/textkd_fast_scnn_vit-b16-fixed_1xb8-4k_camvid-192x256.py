_base_ = [
    '../stock/fast_scnn_1xb8-4k_camvid-192x256.py',
    '../_base_/text/vit-b16_camvid.py'
]
# The first stage only: the vectors stay as they are.
model = dict(
    decode_head=dict(
        type='TextDepthwiseSeparableFCNHead',
        text=_base_.text_provider.embeddings))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
custom_hooks = [dict(type='PromptLearnerHook', switch_at=None)]
