_base_ = [
    __import__('mmseg_textkd').stock_config(
        'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py'),
    '../_base_/text/vit-b16_ade20k.py', '../_base_/text/lseg.py'
]
custom_imports = dict(imports=['mmseg_textkd'], allow_failed_imports=False)
model = dict(
    decode_head=dict(
        type='TextDPTHead',
        text=_base_.text_provider.embeddings,
        text_branch=_base_.text_branch))
# No stage 2: the text is fixed. The hook compares its names with the data's.
custom_hooks = [dict(type='PromptLearnerHook')]
