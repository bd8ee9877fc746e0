"""The paper in miniature: its tables and figures on the digits' world, with text encoders of different quality."""
