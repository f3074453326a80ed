"""A kernel whose import ends the process, as a compiler's crash does."""

import os
import signal

os.kill(os.getpid(), signal.SIGSEGV)
