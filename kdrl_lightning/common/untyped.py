"""Names for values whose types other libraries or users decide.

Type checkers know nothing about these values. They are ``Any`` for one of these reasons:

- Users decide the columns of a row.
- Models, configurations and tokenizers of transformers share no typed base class.
- Lightning and torch read states and checkpoints as dictionaries of anything.
- YAML and JSON hold values of any kind until somebody checks them.
- Presets pass ``**policy`` on; jsonargparse finds these settings and their types in
  ``PolicyObjective``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
HFModel: TypeAlias = Any
HFConfig: TypeAlias = Any
HFTokenizer: TypeAlias = Any
State: TypeAlias = dict[str, Any]
Value: TypeAlias = Any
Tree: TypeAlias = dict[str, Any]
PolicySetting: TypeAlias = Any
