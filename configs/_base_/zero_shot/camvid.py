# Ours: a surface and an object, each with a seen class that is like it (road,
# pedestrian).
text_unseen = ['pavement', 'bicyclist']
