"""Detection: uniformity, total variation and response statistics, standardised against clean models.

`measure` paints under the found trigger and returns raw statistics; `judge` turns them into a verdict against a
`Calibration`. The parts: `images` and `statistics` (what is measured), `calibration` (what clean models show) and
`decide`.
"""

from diffdefend_core.detection import decide, peers
from diffdefend_core.detection.calibration import Calibration, CleanModel
from diffdefend_core.detection.detect import Measurement, judge, measure

__all__ = ["Calibration", "CleanModel", "Measurement", "decide", "judge", "measure", "peers"]
