"""``python -m kdrl_lightning.tiny``: train the shipped models again from their seed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kdrl_lightning.tiny.models import SHIPPED, TinyModel, pack, shipped_checksum


def main() -> None:
    """Write the weight files and print whether their checksums match ``shipped/SHA256SUMS``."""
    for role in ("teacher", "student", "reader", "merging_teacher"):
        model = TinyModel(role)
        with tempfile.TemporaryDirectory() as folder:
            model.train(Path(folder))
            file = SHIPPED / f"{model.recipe_name}.safetensors"
            checksum = pack(Path(folder), file)
        same = "as in" if shipped_checksum(file.name) == checksum else "other than in"
        print(f"{checksum}  {file.name}  ({same} SHA256SUMS)")


if __name__ == "__main__":
    main()
