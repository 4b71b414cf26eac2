"""scripts/check_gpu.py on a pretended GPU, as a program of its own: it forks, and nothing may have used autograd
before. bitsandbytes, whose kernels know no pretended GPU, is missing.
"""

import sys

import check_gpu

from minilora.system.errors import run_script
from support.pretended_gpu import PretendedGpu

sys.modules["bitsandbytes"] = None
check_gpu.OVERTIME = 600  # A busy machine is no fault of the code.
with PretendedGpu(capability=(9, 0)):
    run_script(check_gpu.main)
