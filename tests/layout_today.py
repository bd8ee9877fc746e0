"""What does not hold yet of tests/test_layout.py; nothing is added here, and the file goes with its last entry."""

TODAY: dict[str, set[str]] = {
    "circle": set(),
    "upwards": set(),
    "cli": set(),
    "name": set(),
    "long": set(),
    "arguments": {
        "emf/sample/emf_pipeline.py __call__",
    },
}
