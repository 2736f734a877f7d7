"""The shapes world: captioned videos of one moving shape, an exact oracle, and the model trained on them.

``world`` draws, ``oracle`` judges, ``samples`` writes clips as files, ``untrained`` makes what training starts from.
"""
