# For `text_losses` of any text head: classes lie to each other as their names.
text_structure = dict(type='SemanticStructureLoss', loss_weight=1.0)
