"""Objectives, ordered by what is differentiated.

- the gradient of a reward through the sampler: ``reward_gradient.py`` carries out the methods of ``methods/``
- a loss on the data: ``sft.py``
- the reward itself, trained from labels or preferences: ``preference.py``, ``pixel_preference.py``

A further kind of objective gets a file for what its methods share and a folder with its methods.  Such kinds are a
policy gradient (the likelihood of sampled steps), the forward process (a loss at noised samples, weighted by their
rewards) and preferences between samples of the policy.
"""

from prfl.objective.base import Objective as Objective
from prfl.objective.base import Stateful as Stateful
