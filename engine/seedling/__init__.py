"""How the embedded demo model is made: scenes and captions, the training of its parts, quantising and export."""
