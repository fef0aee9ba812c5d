"""Merging: methods, models, slices and vocabularies, planned tensor by tensor."""
