"""Settings of small models whose rotary embedding changes at a length."""

from __future__ import annotations

from typing import Any

# The length.
LIMIT = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0, 1.5, 1.2, 1.1, 1.0, 1.0, 1.0, 1.0],
    "long_factor": [3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
# Name -> model type and settings, for ``small_models.build``.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": LONG,
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 128,
            "sliding_window": None,
        },
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC},
            "max_position_embeddings": LIMIT,
        },
    ),
}
