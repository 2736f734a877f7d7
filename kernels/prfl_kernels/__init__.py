"""Operations of a video transformer under reward gradients: plain torch references, and the switch to faster kernels.

Imports torch and triton only, and triton only where a kernel is used.
"""

from prfl_kernels.dispatch import OPERATIONS as OPERATIONS
from prfl_kernels.dispatch import Choice as Choice
from prfl_kernels.dispatch import choose_backend as choose_backend
