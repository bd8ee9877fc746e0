"""Published weights into checkpoints of ours: which layouts there are (layouts.py), the AR part of BLIP3o-NEXT
(blip3o.py), EMF's two time embedders (branches.py), and the conversion itself (run.py)."""

from __future__ import annotations

from .branches import PREFIX, add_time_branches, time_branches

__all__ = ["PREFIX", "add_time_branches", "time_branches"]
