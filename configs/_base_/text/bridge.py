# Image and text meet: for training only, or for good.
text_bridge = dict(type='TwoWayBridge')
text_bridge_kept = dict(type='TwoWayBridge', use='inference')
