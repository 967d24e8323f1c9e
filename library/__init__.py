"""What the scripts share. Rooms and arrows between them: docs/architecture.md."""

import logging

# bitsandbytes warns on import about an optional kernel package that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
