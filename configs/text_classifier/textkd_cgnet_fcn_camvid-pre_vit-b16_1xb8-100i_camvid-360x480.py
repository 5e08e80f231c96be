_base_ = [
    '../stock/cgnet_fcn_camvid-pre_1xb8-100i_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py'
]
# Made by tools/model_converters/mmseg2textkd.py of the stock config's.
load_from = 'data/cgnet_camvid11_trainval_textkd.pth'
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)
