_base_ = [
    '../stock/'
    'efficientnet-lite0_in1k-pre_segformer_1xb8-1600i_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py'
]
# The first stage only: the vectors stay as they are.
model = dict(
    decode_head=dict(
        type='TextSegformerHead', text=_base_.text_provider.embeddings))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise_x10)
custom_hooks = [dict(type='PromptLearnerHook', switch_at=None)]
