"""The shapes world: captioned videos of one moving shape, an exact oracle, and the model trained on them.

``renderer`` draws, ``oracle`` judges, ``clips`` writes videos as files, ``recipe`` makes what training starts from.
"""
