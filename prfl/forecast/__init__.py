"""What a run will cost and what it lacks, found out before it starts and without the model's weights."""

from prfl.forecast import tables as tables
from prfl.forecast.inputs import missing_inputs as missing_inputs
from prfl.forecast.knobs import out_of_memory as out_of_memory
from prfl.forecast.memory import Memory as Memory
from prfl.forecast.memory import predict_memory as predict_memory
from prfl.forecast.work import Work as Work
from prfl.forecast.work import count_work as count_work
