"""What no search of the initial noise can see, by name. A verdict says nothing about these."""

from __future__ import annotations

NOT_COVERED = (
    ("gungnir", "a style of the input picture as trigger, in image-to-image models"),
    ("text triggers", "words or characters in the prompt of a text-to-image model"),
    ("conditioning pictures", "triggers in a mask, an inpainting input or another conditioning picture"),
)
