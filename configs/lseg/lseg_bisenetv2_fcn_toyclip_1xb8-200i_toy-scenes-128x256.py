_base_ = [
    '../stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/toyclip_toy_scenes.py', '../_base_/text/lseg.py'
]
model = dict(
    decode_head=dict(
        type='TextFCNHead',
        text=_base_.text_provider.embeddings,
        text_branch=_base_.text_branch))
# No stage 2: the text is fixed. The hook compares its names with the data's.
custom_hooks = [dict(type='PromptLearnerHook')]
