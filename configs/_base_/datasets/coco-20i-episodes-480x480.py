# HSNet's lists (https://github.com/juhongm999/hsnet, data/splits/coco) go to
# data/COCO2014/splits/coco, its label maps to data/COCO2014/annotations.
_base_ = './pascal-5i-episodes-480x480.py'
test_dataloader = dict(
    dataset=dict(
        type='COCO20iEpisodes',
        data_root='data/COCO2014',
        data_prefix=dict(img_path='', seg_map_path='annotations')))
