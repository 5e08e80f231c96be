_base_ = [
    '../text_classifier/textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py',
    '../_base_/text/synonyms.py'
]
model = dict(
    decode_head=dict(text=dict(embeddings=_base_.text_synonyms['camvid'])))
