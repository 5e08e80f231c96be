# Ours: a surface and an object, each with a seen class that is like it (road,
# car).
text_unseen = ['sidewalk', 'truck']
