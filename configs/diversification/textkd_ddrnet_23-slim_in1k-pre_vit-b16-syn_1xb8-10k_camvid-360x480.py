_base_ = [
    '../text_classifier/textkd_ddrnet_23-slim_in1k-pre_vit-b16_1xb8-10k_camvid-360x480.py',  # noqa: E501
    '../_base_/text/synonyms.py'
]
model = dict(
    decode_head=dict(text=dict(embeddings=_base_.text_synonyms['camvid'])))
