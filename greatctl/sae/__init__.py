"""Sparse autoencoders: one small file an architecture, and one data reader, trainer, evaluation and folder
for all of them.
"""
