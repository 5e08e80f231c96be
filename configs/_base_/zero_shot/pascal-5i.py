# PASCAL-5i: fold i holds the classes 5i to 5i + 4 of PASCAL VOC in its own
# order, which is alphabetical, without the background. Source: Shaban et al.,
# One-Shot Learning for Semantic Segmentation, BMVC 2017, table 1.
text_folds = [
    ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle'],
    ['bus', 'car', 'cat', 'chair', 'cow'],
    ['diningtable', 'dog', 'horse', 'motorbike', 'person'],
    ['pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor'],
]
