"""Objectives, ordered by what is differentiated.

- a reward's gradient through the sampler: ``reward_gradient.py`` carries out the methods of ``methods/``
- a loss of the data: ``sft.py``
- a reward itself, from labels or preferences: ``preference.py``, ``pixel_preference.py``

Each other kind has a file for what its methods share and a folder for them: a policy gradient (the likelihood of
sampled steps), the forward process (a loss at noised samples, weighed by their rewards), preferences of policies.
"""

from prfl.objective.base import Objective as Objective
from prfl.objective.base import Stateful as Stateful
