_base_ = [
    '../text_classifier/textkd_ddrnet_23-slim_in1k-pre_vit-b16_1xb8-10k_camvid-360x480.py',  # noqa: E501
    '../_base_/text/bridge.py'
]
model = dict(decode_head=dict(fusion=_base_.text_bridge))
