"""Training: the loop, checkpoints, the average of the weights, guards and the log."""

from prfl.training.checkpoint import find_checkpoint as find_checkpoint
from prfl.training.learning import Watched as Watched
from prfl.training.log import RunFolder as RunFolder
from prfl.training.log import make_accelerator as make_accelerator
from prfl.training.log import read_metrics as read_metrics
from prfl.training.loop import Hook as Hook
from prfl.training.loop import TrainResult as TrainResult
from prfl.training.loop import train as train
from prfl.training.regulariser import Regulariser as Regulariser
