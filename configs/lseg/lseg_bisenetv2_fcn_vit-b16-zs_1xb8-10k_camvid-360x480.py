_base_ = [
    './lseg_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py',
    '../_base_/zero_shot/camvid.py'
]
text_hidden, train_dataloader, val_evaluator = __import__(
    'mmseg_textkd').zero_shot(
        _base_.train_dataloader,
        vocabulary='camvid',
        unseen=_base_.text_unseen,
        before='RandomResize')
model = dict(decode_head=dict(text_branch=text_hidden))
test_evaluator = val_evaluator
