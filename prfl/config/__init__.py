"""The config: its schema and the strict loader.  See configs/tiny/ for examples."""

from prfl.config.load import config_hash as config_hash
from prfl.config.load import dump_resolved as dump_resolved
from prfl.config.load import identity as identity
from prfl.config.load import load_config as load_config
from prfl.config.schema import Config as Config
from prfl.config.schema import json_schema as json_schema
from prfl.config.stages import Stage as Stage
from prfl.config.stages import load_stages as load_stages
