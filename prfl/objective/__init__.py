"""Objectives: one file per method; each picks what is differentiated and with which gradient."""

from prfl.objective.base import Objective as Objective
from prfl.objective.base import Stateful as Stateful
