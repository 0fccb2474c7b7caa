"""Refuse to commit a file of more than 2 MiB: what is large is fetched (aquila2_tut/assets.json), not stored."""

import sys
from pathlib import Path

LIMIT = 2 * 2**20

large = [name for name in sys.argv[1:] if Path(name).is_file() and Path(name).stat().st_size > LIMIT]
for name in large:
    print(f"{name}: {Path(name).stat().st_size / 2**20:.1f} MiB, the limit is {LIMIT / 2**20:.0f} MiB")
sys.exit(bool(large))
