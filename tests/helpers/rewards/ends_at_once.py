"""A module whose import ends the process, as one does that is killed while it starts."""

import os

os._exit(1)
