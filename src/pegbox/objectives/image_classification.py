"""Image classification: one class of C an image, or any set of them.

The loss is that of `pegbox.objectives.sequence_classification`, of logits (B, C) that a vision model makes of
`pixel_values` (B, 3, H, W).
"""

from __future__ import annotations

from dataclasses import replace

from pegbox.objectives import sequence_classification

OBJECTIVE = replace(sequence_classification.OBJECTIVE, name="image_classification")
