# COCO-20i: fold i holds the classes i, i + 4, i + 8, ... of the 80 things of
# COCO in the order of their ids. Source: Nguyen and Todorovic, Feature
# Weighting and Boosting for Few-Shot Segmentation, ICCV 2019; so does HSNet,
# whose folds LSeg takes.
text_folds = [
    [
        'person', 'airplane', 'boat', 'parking meter', 'dog', 'elephant',
        'backpack', 'suitcase', 'sports ball', 'skateboard', 'wine glass',
        'spoon', 'sandwich', 'hot dog', 'chair', 'dining table', 'mouse',
        'microwave', 'refrigerator', 'scissors'
    ],
    [
        'bicycle', 'bus', 'traffic light', 'bench', 'horse', 'bear',
        'umbrella', 'frisbee', 'kite', 'surfboard', 'cup', 'bowl', 'orange',
        'pizza', 'couch', 'toilet', 'remote', 'oven', 'book', 'teddy bear'
    ],
    [
        'car', 'train', 'fire hydrant', 'bird', 'sheep', 'zebra', 'handbag',
        'skis', 'baseball bat', 'tennis racket', 'fork', 'banana', 'broccoli',
        'donut', 'potted plant', 'tv', 'keyboard', 'toaster', 'clock',
        'hair drier'
    ],
    [
        'motorcycle', 'truck', 'stop sign', 'cat', 'cow', 'giraffe', 'tie',
        'snowboard', 'baseball glove', 'bottle', 'knife', 'apple', 'carrot',
        'cake', 'bed', 'laptop', 'cell phone', 'sink', 'vase', 'toothbrush'
    ],
]
