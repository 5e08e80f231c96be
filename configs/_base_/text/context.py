# The text looks at the image; its score map is a further loss.
text_context = dict(type='ContextAwareText')
