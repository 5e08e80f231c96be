_base_ = [
    '../stock/ddrnet_23-slim_in1k-pre_1xb8-10k_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py', '../_base_/text/lseg.py'
]
model = dict(
    decode_head=dict(
        type='TextDDRHead',
        text=_base_.text_provider.embeddings,
        text_branch=_base_.text_branch))
# No stage 2: the text is fixed. The hook compares its names with the data's.
custom_hooks = [dict(type='PromptLearnerHook')]
