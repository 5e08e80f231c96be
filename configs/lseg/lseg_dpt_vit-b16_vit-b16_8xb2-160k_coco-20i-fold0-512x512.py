_base_ = [
    './lseg_dpt_vit-b16_vit-b16_8xb2-160k_coco-stuff164k-512x512.py',
    '../_base_/zero_shot/coco-20i.py'
]
text_hidden, train_dataloader, val_evaluator = __import__(
    'mmseg_textkd').zero_shot(
        _base_.train_dataloader,
        vocabulary='coco_stuff',
        unseen=_base_.text_folds[0],
        before='RandomResize')
model = dict(decode_head=dict(text_branch=text_hidden))
test_evaluator = val_evaluator
