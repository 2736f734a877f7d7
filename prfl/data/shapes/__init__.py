"""The shapes world: captioned videos of one moving shape, an exact oracle, and the model trained on them.

``world`` draws, ``oracle`` judges, ``pretrain`` makes the model folder that ships with the package.
"""
